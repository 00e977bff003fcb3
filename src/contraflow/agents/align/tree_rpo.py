"""Dynamic-TreeRPO (arXiv 2509.23352): a binary tree of noisy steps in a moving window, noisier with depth.

Leaves share the steps above their branches. The gradient of a shared step is the mean over the leaves below it.
"""

from contraflow.agents.align.flow_grpo import FlowGRPO
from contraflow.agents.base import Preset
from contraflow.flow.plan import Plan

PRESETS = (
    Preset(
        "tree-rpo",
        FlowGRPO(
            plan=Plan(window=4, place="sweep", every=10, branches=(2, 2, 2, 2), deepen=0.5),
            kl=0.0,
        ),
        "Dynamic-TreeRPO",
        "2509.23352",
        "trees of noisy steps",
        "conditions",
    ),
)
