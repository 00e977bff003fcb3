"""IDQL (arXiv 2304.10573): implicit Q-learning with a cloned diffusion policy, of whose 64 actions the best acts.

The variance-preserving path whose noise rate grows from .1 to 10, the noise predicted, x_1 clipped to the box within
every step. kappa = .7 and N = 64 are of its paper (locomotion); for mazes it takes .9. The paper has five steps with
noise in each; of ours, which have none, five leave too little spread, so there are 20.
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
