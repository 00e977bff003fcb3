"""MixGRPO (arXiv 2507.21802): noise and policy gradients in a window of steps that moves from noise to data.

Outside of the window, samples follow the ODE. Flash takes fewer steps behind the window, with a solver of second order;
Flash* also leaves the window at the beginning.
"""

from dataclasses import replace

from contraflow.agents.align.flow_grpo import FlowGRPO
from contraflow.agents.base import Preset
from contraflow.flow.plan import Plan
from contraflow.rl.group import GroupAdvantage

MIX = FlowGRPO(
    plan=Plan(25, window=4, place="sweep", every=5, shared=True),
    advantage=GroupAdvantage(std="group", separate=True),
    kl=0.0,
)
FLASH = replace(MIX, plan=replace(MIX.plan, compress=0.4))
STAR = replace(MIX, plan=replace(MIX.plan, place="first", compress=0.2))

PRESETS = (
    Preset("mix-grpo", MIX, "MixGRPO", "2507.21802", "noise in a moving window of steps", "conditions"),
    Preset("mix-grpo-flash", FLASH, "MixGRPO-Flash", "2507.21802", "MixGRPO with a shorter end", "conditions"),
    Preset(
        "mix-grpo-flash-star", STAR, "MixGRPO-Flash*", "2507.21802", "noise in the first steps, a short end",
        "conditions",
    ),
)  # fmt: skip
