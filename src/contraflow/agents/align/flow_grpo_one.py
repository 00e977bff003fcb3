"""Flow-SDE of pi_RL (arXiv 2510.25889): one noisy step at a random place; density and gradient there alone."""

from contraflow.agents.align.flow_grpo import FlowGRPO
from contraflow.agents.base import Preset
from contraflow.flow.plan import FlowSDE, Plan

PRESETS = (
    Preset(
        "flow-grpo-one",
        FlowGRPO(plan=Plan(noise=FlowSDE(0.5), window=1, place="random"), kl=0.0),
        "Flow-GRPO, one step",
        "2510.25889",
        "one noisy step at a random place",
        "conditions",
    ),
)
