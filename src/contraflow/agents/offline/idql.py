"""IDQL (arXiv 2304.10573): implicit Q-learning with a cloned diffusion policy. The best of 64 of its actions acts.

The path is variance preserving with a noise rate from .1 to 10. The network predicts the noise, and x_1 is clipped to
the box in every step. kappa = .7 and N = 64 are the paper's for locomotion. It takes kappa = .9 for mazes. The paper
has five steps with noise in each. Steps here have no noise, and five of them leave too little spread: there are 20.
"""

from contraflow.agents.base import Preset
from contraflow.agents.offline.iql import IQL, Cloned
from contraflow.flow.model import Ddim, FlowSpec
from contraflow.flow.path import VP
from contraflow.nets.velocity import ResidualMLP

DIFFUSION = FlowSpec(path=VP(0.1, 10.0), predict="noise", clip=1.0, solver=Ddim(20), network=ResidualMLP(256, 3))
IDQL = IQL(Cloned(DIFFUSION, 64), kappa=0.7, ema=0.999)

PRESETS = (
    Preset(
        "idql", IDQL, "Implicit diffusion Q-learning", "2304.10573", "best of a cloned diffusion's actions", "dataset"
    ),
)
