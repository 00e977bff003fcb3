"""MaxEntDP (arXiv 2502.11612): noise expectation (QNE) in the box, with a soft backup from denoising errors.

x_t is noised from actions of the buffer, and 500 truncated candidates estimate E[x0 | x_t] with eta = 0. It is `RFM`
with these settings; docs/methods/maxentdp.md lists the deviations.
"""

from dataclasses import replace

from contraflow.agents.base import Preset
from contraflow.agents.online.common import CRITIC, NOISE_IN_BOX, ONE, OPTIM
from contraflow.agents.online.rfm import RFM, Choice, PosteriorTarget
from contraflow.flow.likelihood import Denoising
from contraflow.flow.path import Cosine
from contraflow.flow.posterior.control import Fixed
from contraflow.flow.posterior.importance import Reverse
from contraflow.flow.posterior.proposal import TruncatedNoise
from contraflow.policy.best_of import Argmax
from contraflow.rl.temperature import Constant

MAXENTDP = RFM(
    flow=replace(NOISE_IN_BOX, path=Cosine()),
    target=PosteriorTarget(Reverse(500, TruncatedNoise(), Fixed(0.0)), endpoint="buffer"),
    choose=Choice(**ONE, greedy=Argmax(10)),
    temperature=Constant(0.05),
    density=Denoising(20, 50),
    critic=CRITIC,
    optim=OPTIM,
)
PRESETS = (
    Preset("maxentdp", MAXENTDP, "Maximum entropy diffusion policy", "2502.11612", "noise expectation in the box"),
)
