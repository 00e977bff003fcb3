"""IFQL: implicit Q-learning with a cloned flow. The best of 32 of its actions acts (2502.02538, baselines)."""

from contraflow.agents.base import Preset
from contraflow.agents.offline.iql import IQL, Cloned

PRESETS = (
    Preset(
        "ifql", IQL(Cloned()), "Implicit flow Q-learning", "2502.02538", "best of a cloned flow's actions", "dataset"
    ),
)
