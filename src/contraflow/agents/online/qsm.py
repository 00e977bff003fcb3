"""QSM (arXiv 2312.11752): Q-score matching, x0 = -beta grad Q / lambda at x_t itself, not at the noised endpoint.

It needs one gradient and no candidates but is right only in the limit t -> 1 (`flow.posterior.local.Local`). It is
`RFM` with these settings; docs/methods/qsm.md lists the deviations.
"""

from dataclasses import replace

from contraflow.agents.base import Preset
from contraflow.agents.online.common import CRITIC, DEEPER, NOISE_IN_BOX, ONE, OPTIM
from contraflow.agents.online.rfm import RFM, Choice, PosteriorTarget
from contraflow.flow.path import VP
from contraflow.flow.posterior.local import Local
from contraflow.policy.best_of import First
from contraflow.rl.temperature import Constant

QSM = RFM(
    flow=replace(NOISE_IN_BOX, path=VP(), network=DEEPER),
    target=PosteriorTarget(Local(), endpoint="buffer"),
    choose=Choice(**ONE, greedy=First()),
    temperature=Constant(0.02),
    critic=CRITIC,
    optim=OPTIM,
)
PRESETS = (Preset("qsm", QSM, "Q-score matching", "2312.11752", "the score of Q at the noisy point itself"),)
