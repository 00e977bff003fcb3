"""The agents. `AGENTS` is the only registry: it serves the command line; a script passes its own to `train`."""

from contraflow.agents.bc import BC
from contraflow.agents.dacer import DACER
from contraflow.agents.dppo import DPPO
from contraflow.agents.fpo import FPO
from contraflow.agents.pmd import PMD
from contraflow.agents.ppo import PPO
from contraflow.agents.reinflow import ReinFlow
from contraflow.agents.rfm import RFM
from contraflow.agents.sac import SAC
from contraflow.agents.sir import SIR
from contraflow.agents.td3 import TD3

OffPolicyAgent = RFM | PMD | DACER | SAC | TD3 | SIR
OnPolicyAgent = PPO | ReinFlow | DPPO | FPO
OfflineAgent = BC
AnyAgent = OffPolicyAgent | OnPolicyAgent | OfflineAgent
AGENTS: dict[str, type[AnyAgent]] = {
    "rfm": RFM,
    "pmd": PMD,
    "dacer": DACER,
    "sac": SAC,
    "td3": TD3,
    "sir": SIR,
    "ppo": PPO,
    "reinflow": ReinFlow,
    "dppo": DPPO,
    "fpo": FPO,
    "bc": BC,
}
