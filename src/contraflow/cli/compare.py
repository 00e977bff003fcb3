"""`contraflow compare`: a matrix of agents, environments and seeds."""

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from contraflow.cli.flags import Modules, Switch, read_flags
from contraflow.cli.settings import find_preset
from contraflow.core.settings import suggest
from contraflow.core.trust import Trust
from contraflow.core.types import UserError
from contraflow.envs import check
from contraflow.experiments import bridge
from contraflow.experiments.compare.matrix import Matrix, Settings
from contraflow.experiments.compare.runner import Local, OnRay, Outcome, run_cells
from contraflow.training.run import Run

DESCRIPTION = """Train a matrix of agents, environments and seeds, and evaluate every run in the same way.

Run the same command again to continue after an interruption and to retry failed cells.

The settings from --steps on hold for every agent and replace those of its preset."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Options of `contraflow compare` in addition to the settings that all cells share."""

    agents: Annotated[str, tyro.conf.arg(metavar="A,B,...")]
    """Presets, module:Class (with --trust module), or NAME=run folder, config.json or preset; separated by commas."""
    envs: Annotated[str, tyro.conf.arg(metavar="A,B,...")]
    """Environments, separated by commas; `contraflow list envs` shows them."""
    out: Path
    """Folder of the matrix; a run goes to OUT/AGENT/ENV/seedK."""
    data: Annotated[str, tyro.conf.arg(metavar="A,B,...")] = ""
    """Datasets for agents that learn from one: one for each environment, in the same order."""
    seeds: int = 5
    """Seeds 0, 1, ... of each agent on each environment."""
    own: Annotated[str, tyro.conf.arg(metavar="A,B,...")] = ""
    """Agents that keep the networks and the optimiser of their preset; the report marks them."""
    jobs: int | None = None
    """Processes at a time, with one thread each if there are several; None is one per core."""
    together: Annotated[bool, Switch] = False
    """For environments written in JAX, train all seeds of an agent at once, in one process and one program."""
    ray: Annotated[str | None, tyro.conf.arg(metavar="ADDRESS")] = None
    """Run the cells as tasks of a Ray cluster: host:port, `auto` (the one on this machine) or `local` (a new one)."""
    quiet: Annotated[bool, Switch] = False
    """Print only the closing lines."""
    trust: Modules = ""
    """Modules outside the library that may be imported, separated by commas; `all` allows any."""


@dataclass(frozen=True, kw_only=True)
class Compare(Settings, Selection):
    """Orders the fields for `--help`: the selection first."""

    def __post_init__(self):
        super().__post_init__()
        if self.seeds < 1 or (self.jobs is not None and self.jobs < 1):
            raise ValueError("seeds and jobs must be at least 1")
        if self.ray is not None and self.jobs is not None:
            raise ValueError("a Ray cluster decides how many cells run at a time: leave out jobs, or ray")
        if self.ray is not None and self.together:
            raise ValueError("a Ray task trains one cell: leave out together, or ray")


def compare_command(args: list[str]) -> int:
    """Runs `contraflow compare`; returns 0, 1 when a cell failed, or 130 after Ctrl-C."""
    options = read_flags(Compare, args, prog="contraflow compare", description=DESCRIPTION)
    agents = named_agents(options.agents, options.trust)
    envs = _names("envs", options.envs)
    own = frozenset(_names("own", options.own)) if options.own else frozenset()
    data = options.data.split(",") if options.data else []
    if data and len(data) != len(envs):
        raise UserError(f"--data names {len(data)} datasets for {len(envs)} environments: give one for each, in order")
    for name in own - agents.keys():
        raise UserError(f"--own {name} is not one of the agents; {suggest(name, agents)}")
    for env in envs:
        check(env, trust=options.trust)
    settings = Settings(**{name: getattr(options, name) for name in Settings.__dataclass_fields__})
    named = dict(zip(envs, data, strict=False))
    matrix = Matrix(options.out, agents, envs, settings, options.seeds, own, named, options.trust)
    cells = matrix.cells()
    matrix.record()
    costs = [bridge.cost(run.agent) for run in agents.values()]
    if not options.quiet and not any(cost is not None and cost["nfe"] == 0 for cost in costs):
        print("note: add `sir`, the agent without an actor, to see what the critic does alone")
    runner = Local(options.jobs or cores()) if options.ray is None else OnRay(options.ray)
    rest = options.final_episodes, options.trust, options.quiet, options.together
    return _finish(run_cells(cells, options.out, runner, *rest), len(cells), options.out, args)


def named_agents(text: str, trust: Trust) -> dict[str, Run]:
    """Returns agents by name, each as a run of its preset, from `rfm,mine=runs/a/config.json,...`.

    Raises UserError for an agent that does not exist.
    """
    agents = {}
    for item in _names("agents", text):
        name, _, source = item.partition("=") if "=" in item else (item.rpartition(":")[2], "", item)
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UserError(f"agent {item} needs a name for its folder, of letters, digits and .-_: give NAME={source}")
        if name in agents:
            raise UserError(f"two agents are called {name}: give one another name, as NAME={source}")
        agents[name] = find_preset(source, trust)
    return agents


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _names(flag: str, text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if not name:
            raise UserError(f"--{flag} {text!r} names nothing between two commas: give names like a,b")
        if names.count(name) > 1:
            raise UserError(f"--{flag} names {name} twice: leave one out")
    return names


def _finish(outcome: Outcome, total: int, out: Path, args: list[str]) -> int:
    """Prints the closing report; returns the exit code."""
    again = f"contraflow compare {shlex.join(args)}"
    done = outcome.before + outcome.done
    print(f"{done} of {total} cells done, {outcome.done} of them now, {len(outcome.failed)} failed")
    for cell, reason in outcome.failed.items():
        print(f"  failed: {cell}: {reason}")
    if outcome.interrupted:
        print(f"interrupted; what was done is saved, the same command continues: {again}")
        return 130
    if outcome.failed:
        print(f"once it is fixed, the same command tries the failed cells again: {again}")
    print(f"report  contraflow report {shlex.quote(str(out))} --out report.html")
    return 1 if outcome.failed else 0
