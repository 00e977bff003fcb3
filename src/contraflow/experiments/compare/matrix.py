"""The cells of a comparison, the settings that they share, and what is done of them.

`OUT/matrix.json` holds the settings. The state of a cell is read off its folder `OUT/AGENT/ENV/seedK`, which is the
folder of an ordinary run, so nothing is lost with the process that looks after the matrix.
"""

import dataclasses
import fcntl
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from contraflow.core.settings import VERSION, to_json
from contraflow.core.types import UserError
from contraflow.envs import jittable
from contraflow.rl.critics import Critics
from contraflow.rl.flow_policy import FlowPolicy
from contraflow.training import checkpoint
from contraflow.training.run import Run, write_config

SCHEMA = 1
FINAL, FAILED, LOG, LOCK = "final.json", "failed.json", "worker.log", "worker.lock"
OURS = {FAILED, LOG, LOCK, "config.json.tmp"}  # what may lie in a folder that has no config.json yet


@dataclass(frozen=True)
class Settings:
    """What all cells of a matrix share, whatever their presets say: the comparison is of agents, not of settings."""

    steps: int
    """Environment steps of a run, summed over `num_envs`; one step is one decision of the agent."""
    collect: int = 5_000
    """Steps of uniformly random actions before learning starts."""
    num_envs: int = 1
    """Environments stepped in parallel."""
    updates: int = 1
    """Gradient steps after each step of all environments."""
    batch_size: int = 256
    n_step: int = 1
    """Rewards summed before the value is asked."""
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


NETWORK = ("critic", "width", "depth", "decay_steps", "max_grad_norm")
"""The settings that are fields of agents; the others are fields of `Run`, but for `final_episodes`."""

State = Literal["new", "started", "failed", "done"]


@dataclass(frozen=True)
class Cell:
    """One agent on one environment with one seed; `run` is the whole of its settings."""

    agent: str
    env: str
    seed: int
    run: Run
    folder: Path

    def __str__(self):
        return f"{self.agent} on {self.env}, seed {self.seed}"


def plan(
    agents: Mapping[str, Any], envs: Sequence[str], seeds: int, settings: Settings, own: frozenset[str], out: Path
) -> list[Cell]:
    """All cells, seed by seed, so that a matrix broken off early still compares all agents on all environments.

    `agents` by name; those in `own` keep their own networks and optimiser, the others take them from `settings`.
    Raises UserError for settings that do not fit an agent.
    """
    shared = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    network = {name: shared.pop(name) for name in NETWORK}
    del shared["final_episodes"]
    cells = []
    for seed in range(seeds):
        for env in envs:
            for name, agent in agents.items():
                try:
                    agent = agent if name in own else with_networks(agent, network)
                    run = Run(env=env, agent=agent, seed=seed, trackers=(), **shared)
                except (TypeError, ValueError) as error:
                    raise UserError(f"agent {name}: {error}") from None
                cells.append(Cell(name, env, seed, run, cell_folder(out, name, env, seed)))
    return cells


def with_networks(agent: Any, network: Mapping[str, Any]) -> Any:
    """The agent with those settings of `NETWORK` that it has itself or, for the size of the actor, in its policy."""
    mine = {f.name for f in dataclasses.fields(agent)}
    policy = getattr(agent, "policy", None)
    if isinstance(policy, FlowPolicy):
        agent = replace(agent, policy=replace(policy, **{k: network[k] for k in ("width", "depth") if k in network}))
    return replace(agent, **{k: v for k, v in network.items() if k in mine})


def cell_folder(out: Path, agent: str, env: str, seed: int) -> Path:
    """OUT/AGENT/ENV/seedK, in letters that a path may hold."""
    return out / agent / re.sub(r"[^\w.-]", "-", env) / f"seed{seed}"


def record(
    agents: Mapping[str, Any], envs: Sequence[str], seeds: int, settings: Settings, own: frozenset[str], out: Path
) -> None:
    """Write `out`/matrix.json, or check the one that is there.

    A later call may add agents, environments and seeds, and may name fewer. Raises UserError when the settings, or
    those of an agent of the same name, are others than recorded, or when `out` is something else.
    """
    file = out / "matrix.json"
    have = read_record(out) if file.exists() else None
    if have is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists and holds no matrix: choose another --out")
    wanted: dict[str, Any] = {
        "settings": to_json(settings),
        "agents": {name: {"own": name in own, "agent": to_json(agent)} for name, agent in agents.items()},
    }
    seen = {"agents": {}, "envs": [], "seeds": 0} if have is None else have
    if have is not None:
        both = {name for name in wanted["agents"] if name in have["agents"]}
        pairs: list[tuple[str, Any, Any]] = [("", have["settings"], settings)]
        pairs += [(f"agent {name}: ", have["agents"][name]["agent"], agents[name]) for name in sorted(both)]
        pairs += [(f"agent {name}: own", have["agents"][name]["own"], name in own) for name in sorted(both)]
        for where, old, new in pairs:
            if difference := changed(old, new):
                name, was, now = difference
                raise UserError(
                    f"{out} holds a matrix with {where}{name} = {was}, not {now}: "
                    "use the same settings, or another --out"
                )
    data = {
        "schema": SCHEMA,
        "version": VERSION,
        "settings": wanted["settings"],
        "agents": seen["agents"] | wanted["agents"],
        "envs": list(dict.fromkeys([*seen["envs"], *envs])),
        "seeds": max(seen["seeds"], seeds),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(file, data)


def read_record(out: Path) -> dict[str, Any]:
    """`out`/matrix.json. Raises UserError if it is damaged or of a newer release."""
    file = out / "matrix.json"
    try:
        data = json.loads(file.read_text())
        schema = data["schema"]
        if schema <= SCHEMA:
            _ = data["settings"]["steps"], list(data["envs"]), range(data["seeds"])
            _ = [(agent["own"], agent["agent"]) for agent in data["agents"].values()]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file} is damaged: restore it, or compare anew with another --out") from None
    if schema > SCHEMA:
        raise UserError(f"{file} has schema {schema}, this release reads up to {SCHEMA}: upgrade contraflow")
    return data


def write_json(path: Path, data: Any) -> None:
    """All of it or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=1))
    temporary.rename(path)


def changed(old: Any, value: Any) -> tuple[str, Any, Any] | None:
    """The first field, as `first_difference`, in which the JSON `old` does not describe `value`.

    A field that `old` lacks had no name when `old` was written, and the effect that its default has now.
    """
    return first_difference(_completed(old, value), json.loads(json.dumps(to_json(value))))


def _completed(old: Any, value: Any) -> Any:
    if isinstance(old, list) and isinstance(value, tuple) and len(old) == len(value):
        return [_completed(*pair) for pair in zip(old, value, strict=True)]
    if not isinstance(old, dict) or not dataclasses.is_dataclass(value):
        return old
    out = dict(old)
    for field in dataclasses.fields(value):
        if field.name in old:
            out[field.name] = _completed(old[field.name], getattr(value, field.name))
        elif field.default is not dataclasses.MISSING:
            out[field.name] = json.loads(json.dumps(to_json(field.default)))
    return out


def first_difference(old: Any, new: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """(dotted name, old, new) of the first field in which two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            if found := first_difference(old.get(key), new.get(key), f"{where}.{key}".lstrip(".")):
                return found
        return None
    return None if old == new else (where, old, new)


def state(folder: Path) -> State:
    """What is done of a cell: `failed` means that the last attempt failed, `started` that none has come to an end."""
    if (folder / FINAL).exists():
        return "done"
    if (folder / FAILED).exists():
        return "failed"
    return "started" if (folder / "config.json").exists() else "new"


def prepare(cell: Cell) -> State:
    """Make the folder of a cell ready for a worker; its state. Raises UserError when it is not this cell's."""
    folder = cell.folder
    now = state(folder)
    if (folder / "config.json").exists():
        try:
            have = json.loads((folder / "config.json").read_text())["run"]
        except (ValueError, KeyError, TypeError):
            have = {}
        if difference := changed(have, cell.run):
            raise UserError(
                f"{folder} belongs to another run ({difference[0]} = {difference[1]}, not {difference[2]}): "
                "move it away, or choose another --out"
            )
        return now
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - OURS):
        raise UserError(f"{folder} holds something else than a run: move it away, or choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_config(cell.run, folder)
    return now


def at_work(folder: Path) -> bool:
    """Whether a worker holds the lock of a cell, on this machine or another that shares its file system."""
    try:
        with (folder / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def grouped(cells: Sequence[Cell], trust: bool) -> list[tuple[Cell, ...]]:
    """The cells in groups that one program can train: one agent on one environment written in JAX, at the same step.

    Seeds that have parted, and cells of other environments, are groups of their own.
    """
    in_jax = {env: _in_jax(env, trust) for env in dict.fromkeys(cell.env for cell in cells)}
    groups: dict[Any, list[Cell]] = {}
    for cell in cells:
        # The start is checkpoint 0, also where it has not been written yet.
        alike = (cell.agent, cell.env, checkpoint.latest(cell.folder) or 0) if in_jax[cell.env] else cell
        groups.setdefault(alike, []).append(cell)
    return [tuple(group) for group in groups.values()]


def _in_jax(env: str, trust: bool) -> bool:
    try:
        return jittable(env, trust=trust)
    except Exception:  # whatever the user's own code raises: its cells will fail, each with the reason
        return False


def failure(folder: Path) -> str:
    """Why the last attempt failed, in one line."""
    try:
        return str(json.loads((folder / FAILED).read_text())["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"unknown; see {folder / LOG}"


def steps_taken(folder: Path) -> int | None:
    """Environment steps of the last complete line of metrics.jsonl; cheap enough to ask every second."""
    return _last(folder).get("step")


def _last(folder: Path) -> dict[str, Any]:
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 16_384))
            lines = [line for line in file.read().split(b"\n")[:-1] if line.startswith(b"{")]
        return json.loads(lines[-1]) if lines else {}
    except (OSError, ValueError):
        return {}
