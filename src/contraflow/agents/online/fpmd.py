"""FPMD (arXiv 2507.23675): flow policy mirror descent, variants R (`fpmd`) and M (`fpmd-m`, one step).

It is `PMD` with a slow copy that follows at once (tau = 1). The temperature keeps a KL of 2 nats between iterates.
docs/methods/pmd.md lists the deviations.
"""

from dataclasses import replace

from contraflow.agents.base import Preset
from contraflow.agents.online.common import BEST, CRITIC, OPTIM
from contraflow.agents.online.pmd import PMD, Candidates, Selection
from contraflow.flow.fewstep import MeanFlow
from contraflow.flow.model import Ddim, FlowSpec
from contraflow.nets.velocity import ResidualMLP
from contraflow.rl.temperature import Tuned

KL_OF_2 = Tuned(1.47, of="weights", start=1.0)  # log 32 - 2, for 32 candidates
NETWORK = ResidualMLP(256, 3, 32)
FPMD = PMD(
    flow=FlowSpec(solver=Ddim(20), network=NETWORK),
    candidates=Candidates(own=32, noise=0.1),
    choose=Selection(**BEST),
    temperature=KL_OF_2,
    tau=1.0,
    critic=CRITIC,
    optim=OPTIM,
)
FPMD_M = replace(FPMD, objective=MeanFlow(), flow=FlowSpec(solver=Ddim(1), network=NETWORK))
TITLE, PAPER = "Flow policy mirror descent", "2507.23675"
PRESETS = (
    Preset("fpmd", FPMD, TITLE, PAPER, "variant R: the flow in twenty steps"),
    Preset("fpmd-m", FPMD_M, TITLE, PAPER, "variant M: an average velocity in one step"),
)
