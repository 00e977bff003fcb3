"""MFPO (arXiv 2604.14698): mean flow policy optimisation, with pooled estimates for an average velocity in two steps.

Candidates from noise and from the policy give two estimates, weighted by their effective sample sizes (`Pooled`). The
temperature follows the entropy of the sampler (`Pushforward`). It is `RFM` with these settings;
docs/methods/mfpo.md lists the deviations.
"""

from dataclasses import replace

from contraflow.agents.base import Preset
from contraflow.agents.online.common import BOX, CRITIC, ONE, OPTIM
from contraflow.agents.online.rfm import RFM, Choice, PosteriorTarget
from contraflow.flow.fewstep import MeanFlow
from contraflow.flow.likelihood import Pushforward
from contraflow.flow.model import Ddim
from contraflow.flow.posterior.importance import Pooled
from contraflow.nets.heads import Categorical
from contraflow.policy.best_of import Argmax, First
from contraflow.rl.temperature import Tuned

MFPO = RFM(
    flow=replace(BOX, solver=Ddim(2)),
    target=PosteriorTarget(Pooled(), query=First(16)),
    choose=Choice(**ONE, greedy=Argmax(10)),
    temperature=Tuned(-0.5, start=0.01),
    density=Pushforward(),
    objective=MeanFlow(),
    critic=replace(CRITIC, head=Categorical(), depth=3, block="normalised"),
    optim=OPTIM,
)
PRESETS = (Preset("mfpo", MFPO, "Mean flow policy optimisation", "2604.14698", "average velocities, pooled estimates"),)
