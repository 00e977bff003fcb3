"""TempFlow-GRPO (arXiv 2508.04324): one noisy step with several children, compared with each other.

The samples of a tree share their start and all steps but one, so the differences of their rewards are due to that step.
Steps are weighted by their noise, which removes a factor from the size of gradients that grows towards the data.
"""

from contraflow.agents.align.flow_grpo import FlowGRPO
from contraflow.agents.base import Preset
from contraflow.flow.plan import Plan

PRESETS = (
    Preset(
        "temp-flow-grpo",
        FlowGRPO(plan=Plan(window=1, place="random", branches=(4,)), group="start", weight="noise"),
        "TempFlow-GRPO",
        "2508.04324",
        "several children at one noisy step",
        "conditions",
    ),
)
