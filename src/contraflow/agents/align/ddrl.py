"""DDRL (arXiv 2512.04332): policy gradients anchored by the matching loss on data.

    max E_p[lambda((r - Z) / beta)] - KL(p_data | p),    lambda(z) = -exp(-z),    Z = beta log E_data exp(r / beta)

has the optimum p_data exp((r - Z) / beta). With lambda(z) = z, the default here and in the release, it is
p_data / (mu - r / beta), which gives less to high rewards and more to low ones.
"""

from contraflow.agents.align.flow_grpo import FlowGRPO
from contraflow.agents.base import Preset

PRESETS = (
    Preset(
        "ddrl",
        FlowGRPO(kl=0.0, data=0.01),
        "DDRL",
        "2512.04332",
        "Flow-GRPO anchored by the matching loss on data",
        "conditions",
    ),
)
