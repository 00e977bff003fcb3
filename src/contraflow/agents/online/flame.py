"""FLAME (arXiv 2602.01606): flow matching with noise expectation and a soft backup; FLAME-M acts in one step.

`flame` is variant R of the paper: 100 truncated candidates, eta = 0, queries from the buffer, and log pi by the change
of variables in two steps with one probe. `flame-m` trains an average velocity (MeanFlow, 2505.13447) that acts in one
evaluation. Both are `RFM` with these settings; docs/methods/flame.md lists the deviations.
"""

from dataclasses import replace

from contraflow.agents.base import Preset
from contraflow.agents.online.common import BEST, BOX, CRITIC, OPTIM
from contraflow.agents.online.rfm import RFM, Choice, PosteriorTarget
from contraflow.flow.fewstep import MeanFlow
from contraflow.flow.likelihood import ChangeOfVariables, Hutchinson
from contraflow.flow.model import Ddim
from contraflow.flow.posterior.control import Fixed
from contraflow.flow.posterior.importance import Reverse
from contraflow.flow.posterior.proposal import TruncatedNoise
from contraflow.flow.solver import Euler
from contraflow.rl.temperature import Constant

FLAME = RFM(
    flow=BOX,
    target=PosteriorTarget(Reverse(100, TruncatedNoise(), Fixed(0.0)), endpoint="buffer"),
    choose=Choice(**BEST),
    temperature=Constant(0.01),
    density=ChangeOfVariables(Euler(2), Hutchinson(1)),
    critic=CRITIC,
    optim=OPTIM,
)
FLAME_M = replace(FLAME, objective=MeanFlow(), flow=replace(BOX, solver=Ddim(1)))
TITLE, PAPER = "FLAME", "2602.01606"
PRESETS = (
    Preset("flame", FLAME, TITLE, PAPER, "variant R: noise expectation, soft backup along the flow"),
    Preset("flame-m", FLAME_M, TITLE, PAPER, "variant M: an average velocity that acts in one evaluation"),
)
