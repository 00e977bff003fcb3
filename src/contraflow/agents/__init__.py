"""The agents. `AGENTS` is the only registry: it serves the command line; a script passes its own to `train`."""

from contraflow.agents.offline.bc import BC
from contraflow.agents.online.dacer import DACER
from contraflow.agents.online.pmd import PMD
from contraflow.agents.online.rfm import RFM
from contraflow.agents.online.sac import SAC
from contraflow.agents.online.sir import SIR
from contraflow.agents.online.td3 import TD3
from contraflow.agents.onpolicy.dppo import DPPO
from contraflow.agents.onpolicy.fpo import FPO
from contraflow.agents.onpolicy.ppo import PPO
from contraflow.agents.onpolicy.reinflow import ReinFlow

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
