"""Named runs: `contraflow train NAME`; and the run of an agent of the user's."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from contraflow.agents import needs, presets
from contraflow.training.run import Run
from contraflow.training.sources import BY_NEED

USUAL: dict[str, dict[str, Any]] = {
    "replay": {},
    "rollout": {"steps": 1_000_000, "eval_every": 50_000, "log_every": 10_000},
    "dataset": {"steps": 20_000, "eval_every": 5_000, "log_every": 500},
    "conditions": {"steps": 50_000, "eval_every": 10_000, "eval_episodes": 500, "log_every": 1_000},
}
"""What differs from the defaults of `Run` by what an agent learns from."""


def default_run(agent: Any, changes: Mapping[str, Any] | None = None) -> Run:
    """The run of an agent with the source that it needs; `changes` are fields of either."""
    need = needs(agent)
    kind, values = BY_NEED[need], USUAL[need] | dict(changes or {})
    own = {field.name for field in fields(kind)}
    source = kind(**{name: value for name, value in values.items() if name in own})
    return Run(agent, source, **{name: value for name, value in values.items() if name not in own})


def preset_run(name: str) -> Run:
    """The run of a preset that exists."""
    preset = presets()[name]
    return default_run(preset.agent, preset.run)


PRESETS: dict[str, Run] = {name: preset_run(name) for name in presets()}
