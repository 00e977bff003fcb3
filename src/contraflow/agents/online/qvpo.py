"""QVPO (arXiv 2405.16173): Q-weighted variational policy optimisation.

It is `PMD` matched only to the best candidate, weighted by its advantage, and to uniform actions that keep the policy
wide. docs/methods/pmd.md lists the deviations.
"""

from dataclasses import replace

from contraflow.agents.base import Preset
from contraflow.agents.online.common import CRITIC, OPTIM
from contraflow.agents.online.pmd import DIFFUSION, PMD, Candidates, Selection
from contraflow.core.optim import Optim
from contraflow.flow.path import Cosine
from contraflow.policy.best_of import Argmax
from contraflow.rl.temperature import Constant

QVPO = PMD(
    flow=replace(DIFFUSION, path=Cosine()),
    candidates=Candidates(weight="advantage", uniform=10, noise=0.0),
    choose=Selection(explore=Argmax(4), backup=Argmax(4)),
    temperature=Constant(0.02),
    tau=0.005,
    critic=replace(CRITIC, optim=Optim(1e-3)),
    optim=OPTIM,
)
PRESETS = (Preset("qvpo", QVPO, "Q-weighted variational policy optimisation", "2405.16173", "matched to the best"),)
