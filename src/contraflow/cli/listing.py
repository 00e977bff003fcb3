"""`contraflow list agents|envs|presets [PATTERN]`."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from contraflow.cli.flags import read_flags
from contraflow.core.errors import UserError


@dataclass(frozen=True)
class List:
    """List the names that can be used on the command line."""

    kind: Annotated[Literal["agents", "envs", "presets"], tyro.conf.Positional]
    """What to list."""
    pattern: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATTERN")] = ""
    """Only names that contain this, ignoring case."""


def list_command(args: list[str]) -> int:
    """Runs `contraflow list agents|envs|presets [PATTERN]`: prints a line for each; returns the exit code.

    Raises UserError if no name matches.
    """
    options = read_flags(List, args, prog="contraflow list")
    rows = {"agents": _agents, "envs": _envs, "presets": _presets}[options.kind]()
    rows = [row for row in rows if options.pattern.lower() in row[0].lower()]
    if not rows:
        raise UserError(f"no {options.kind} match {options.pattern}; `contraflow list {options.kind}` shows all")
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _agents() -> list[tuple[str, ...]]:
    from contraflow.agents import presets

    return [(p.name, p.title, p.paper or "-", p.needs, p.summary) for p in presets().values()]


def _presets() -> list[tuple[str, ...]]:
    from contraflow.presets import PRESETS

    return [(name, type(run.agent).__name__, run.env, f"{run.steps:,} steps") for name, run in PRESETS.items()]


def _envs() -> list[tuple[str, ...]]:
    from contraflow.envs import available

    return [(f"{prefix}:{id}",) for prefix, ids in available().items() for id in ids]
