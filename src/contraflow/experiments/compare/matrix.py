"""The cells of a comparison, the settings that they share, and their state.

`OUT/matrix.json` holds the settings. The state of a cell is determined from its folder `OUT/AGENT/ENV/seedK`, the
folder of an ordinary run, so nothing is lost with the process that supervises the matrix.
"""

import fcntl
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from contraflow.core.files import make_folder, read_json, write_json
from contraflow.core.settings import SCHEMA, check_schema, from_json, to_json, version
from contraflow.core.trust import Trust
from contraflow.core.types import UserError
from contraflow.experiments import bridge
from contraflow.rl.critics import Critics
from contraflow.training.run import Run, read_config, write_config

FINAL, FAILED, LOG, LOCK = "final.json", "failed.json", "worker.log", "worker.lock"
OURS = {FAILED, LOG, LOCK}  # files allowed in a folder without config.json, besides half-written ones
State = Literal["new", "started", "failed", "done"]


@dataclass(frozen=True)
class Settings:
    """Settings that all cells of a matrix share and that replace those of presets, so that only the agents differ."""

    steps: int
    """Environment steps of a run, summed over `num_envs`; one step is one decision of the agent. For agents that learn
    from a dataset, gradient steps."""
    collect: int | None = None
    """Steps of uniformly random actions before learning starts; None is a twentieth of all, at most 5000."""
    num_envs: int = 1
    """Environments stepped in parallel."""
    updates: int = 1
    """Gradient steps after each step of all environments."""
    batch_size: int = 256
    n_step: int = 1
    """Rewards summed before the value is bootstrapped."""
    buffer_size: int = 250_000
    eval_every: int = 10_000
    eval_episodes: int = 10
    log_every: int = 1_000
    final_episodes: int = 10
    """Episodes of each evaluation after training; the same ones for every cell of a task."""
    critic: Critics = Critics()
    """Networks of the critics and how they learn."""
    width: int = 64
    """Width of the actors."""
    depth: int = 2
    """Hidden layers of the actors."""
    decay_steps: int | None = None
    """Updates over which the actors' learning rates fall to a tenth; None keeps them constant."""
    max_grad_norm: float | None = 10.0
    """Gradients of the actors are clipped to this norm; None does not clip."""

    def __post_init__(self):
        if self.final_episodes < 1:
            raise ValueError(f"final_episodes must be at least 1, got {self.final_episodes}")


@dataclass(frozen=True)
class Cell:
    """One agent on one environment with one seed; `run` holds all settings."""

    agent: str
    env: str
    seed: int
    run: Run
    folder: Path

    def __str__(self):
        return f"{self.agent} on {self.env}, seed {self.seed}"


@dataclass(frozen=True)
class Matrix:
    """Agents by name, each a run of its preset, on environments and seeds.

    Agents in `own` keep their networks and optimiser. `data` maps environments to datasets, for agents that learn from
    one.
    """

    out: Path
    agents: Mapping[str, Run]
    envs: Sequence[str]
    settings: Settings
    seeds: int = 5
    own: frozenset[str] = frozenset()
    data: Mapping[str, str] = field(default_factory=dict)
    trust: Trust = ""

    def cells(self) -> list[Cell]:
        """Returns all cells, seed by seed, so that an interrupted matrix still compares all agents on all environments.

        Raises UserError for settings that do not fit an agent.
        """
        shared = {f.name: getattr(self.settings, f.name) for f in fields(self.settings)}
        cells = []
        for seed in range(self.seeds):
            for env in self.envs:
                for name, run in self.agents.items():
                    keeps, data = name in self.own, self.data.get(env, "")
                    try:
                        run = bridge.cell_run(run, env, seed, data, shared, keeps, self.trust)
                    except (TypeError, ValueError, UserError) as error:
                        raise UserError(f"agent {name}: {error}") from None
                    cells.append(Cell(name, env, seed, run, cell_folder(self.out, name, env, seed)))
        return cells

    def record(self) -> None:
        """Writes `out`/matrix.json, or checks the existing one.

        A later call may add agents, environments and seeds, and may name fewer. Raises UserError when the settings, or
        those of an agent with the same name, differ from the recorded ones, or when `out` is something else.
        """
        out, file = self.out, self.out / "matrix.json"
        if not file.exists() and out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} already exists and holds no matrix: choose another --out")
        shared = to_json(self.settings)
        agents = {name: {"own": name in self.own, **bridge.brings(run, shared)} for name, run in self.agents.items()}
        new = {"settings": shared, "agents": agents, "envs": [*self.envs], "seeds": self.seeds, "data": dict(self.data)}
        if file.exists():
            old = read_record(out)
            pairs = [("", to_json(from_json(old["settings"], Settings, where="matrix.json")), shared)]
            pairs.append(("data of ", old["data"], old["data"] | new["data"]))
            for name in sorted(old["agents"].keys() & agents.keys()):
                pairs.append((f"agent {name}: ", bridge.brought(old["agents"][name], self.trust), agents[name]))
            for where, was, now in pairs:
                if found := first_difference(was, {key: now[key] for key in was}):
                    field = re.sub(r"^(agent|source)\.", "", found[0])
                    raise UserError(
                        f"{out} holds a matrix with {where}{field} = {found[1]}, not {found[2]}: "
                        "use the same settings, or another --out"
                    )
            new |= {key: old[key] | new[key] for key in ("agents", "data")}
            new |= {"envs": list(dict.fromkeys([*old["envs"], *self.envs])), "seeds": max(old["seeds"], self.seeds)}
        make_folder(out)
        write_json(file, {"schema": SCHEMA, "version": version()} | new)


def cell_folder(out: Path, agent: str, env: str, seed: int) -> Path:
    """Returns OUT/AGENT/ENV/seedK, in characters that a path may contain."""
    return out / agent / re.sub(r"[^\w.-]", "-", env) / f"seed{seed}"


def read_record(out: Path) -> dict[str, Any]:
    """Returns `out`/matrix.json. Raises UserError if it is damaged or from another release."""
    file = out / "matrix.json"
    data = read_json(file)
    check_schema(data, file)
    try:
        _ = data["settings"]["steps"], list(data["envs"]), range(data["seeds"]), dict(data["data"])
        _ = [(agent["own"], agent["agent"], agent["source"]) for agent in data["agents"].values()]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{file} is damaged: restore it, or compare again with another --out") from None
    return data


def first_difference(old: Any, new: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """Returns (dotted name, old, new) of the first field in which two JSON values differ, or None."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            if found := first_difference(old.get(key), new.get(key), f"{where}.{key}".lstrip(".")):
                return found
        return None
    return None if old == new else (where, old, new)


def state(folder: Path) -> State:
    """Returns the state of a cell: `failed` if the last attempt failed, `started` if none has ended."""
    if (folder / FINAL).exists():
        return "done"
    if (folder / FAILED).exists():
        return "failed"
    return "started" if (folder / "config.json").exists() else "new"


def prepare(cell: Cell, trust: Trust = "") -> State:
    """Prepares the folder of a cell for a worker and returns its state. Raises UserError if it is not this cell's."""
    folder, now = cell.folder, state(cell.folder)
    if (folder / "config.json").exists():
        # Read and written again: a field that did not exist when it was written now has its default.
        if found := first_difference(to_json(read_config(folder, trust)), to_json(cell.run)):
            raise UserError(
                f"{folder} belongs to another run ({found[0]} = {found[1]}, not {found[2]}): "
                "move it away, or choose another --out"
            )
        return now
    if folder.exists() and (not folder.is_dir() or {p.name for p in folder.iterdir() if p.suffix != ".tmp"} - OURS):
        raise UserError(f"{folder} holds something other than a run: move it away, or choose another --out")
    make_folder(folder)
    write_config(cell.run, folder)
    return now


def at_work(folder: Path) -> bool:
    """Returns whether a worker holds the lock of a cell, on this machine or one that shares its file system."""
    try:
        with (folder / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def failure(folder: Path) -> str:
    """Returns why the last attempt failed, in one line."""
    try:
        return str(json.loads((folder / FAILED).read_text())["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"unknown; see {folder / LOG}"


def steps_taken(folder: Path) -> int:
    """Returns the step in the last complete line of metrics.jsonl; cheap enough to call every second."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 16_384))
            lines = [line for line in file.read().split(b"\n")[:-1] if line.startswith(b"{")]
        return json.loads(lines[-1])["step"]
    except (OSError, ValueError, LookupError):
        return 0
