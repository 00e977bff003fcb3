"""The agents. `AGENTS` is the only registry: it serves the command line; a script passes its own to `train`."""

from contraflow.agents.rfm import RFM
from contraflow.agents.sac import SAC
from contraflow.agents.sir import SIR

AnyAgent = RFM | SAC | SIR
AGENTS: dict[str, type[AnyAgent]] = {"rfm": RFM, "sac": SAC, "sir": SIR}
