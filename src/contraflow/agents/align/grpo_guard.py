"""GRPO-Guard (arXiv 2510.22319): ratios whose logarithm has mean 0 and a deviation that does not depend on std.

    log rho = -(old mean - mean) . noise,    noise = (x_{k+1} - old mean) / std,

which takes the place of the true log ratio, and each step weighs 1 / h. At the old flow the gradient is that of
Flow-GRPO with the weights std / h.
"""

from contraflow.agents.align.flow_grpo import Clip, FlowGRPO
from contraflow.agents.base import Preset

PRESETS = (
    Preset(
        "grpo-guard",
        FlowGRPO(guard=True, trust=Clip(0.02), kl=0.0),
        "GRPO-Guard",
        "2510.22319",
        "Flow-GRPO with a normalised ratio",
        "conditions",
    ),
)
