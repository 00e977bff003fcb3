"""SDAC (arXiv 2502.00361): soft diffusion actor-critic, noise expectation at the policy's best of 32 endpoints.

It is `RFM` with these settings; docs/methods/sdac.md lists the deviations. The second method of
the paper, DPMD, is in dpmd.py.
"""

from dataclasses import replace

from contraflow.agents.base import Preset
from contraflow.agents.online.common import BEST, CRITIC, NOISE_IN_BOX, OPTIM
from contraflow.agents.online.rfm import RFM, Choice, PosteriorTarget
from contraflow.flow.path import VP
from contraflow.flow.posterior.control import Fixed
from contraflow.flow.posterior.importance import Reverse
from contraflow.flow.posterior.proposal import Noise
from contraflow.policy.best_of import Argmax
from contraflow.rl.temperature import Constant

SDAC = RFM(
    flow=replace(NOISE_IN_BOX, path=VP()),
    target=PosteriorTarget(Reverse(64, Noise(), Fixed(0.0)), query=Argmax(32)),
    choose=Choice(**BEST),
    temperature=Constant(0.05),
    critic=CRITIC,
    optim=OPTIM,
)
PRESETS = (Preset("sdac", SDAC, "Soft diffusion actor-critic", "2502.00361", "noise expectation at the best"),)
