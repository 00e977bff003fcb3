"""Flow-DPPO (arXiv 2606.11025): Flow-GRPO with a trust region in the divergence of a step in place of the clip."""

from contraflow.agents.align.flow_grpo import Filter, FlowGRPO
from contraflow.agents.base import Preset

PRESETS = (
    Preset(
        "flow-dppo",
        FlowGRPO(trust=Filter(), kl=0.0),
        "Flow-DPPO",
        "2606.11025",
        "Flow-GRPO with a trust region for each step",
        "conditions",
    ),
)
