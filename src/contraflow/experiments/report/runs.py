"""Finished runs below a folder, and what else lies there, with the reason why it is left out."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contraflow.agents.cost import acting_cost
from contraflow.core.types import UserError
from contraflow.experiments.compare.matrix import FAILED, FINAL, cell_folder, failure, read_record, steps_taken
from contraflow.training.artifact import check_schema
from contraflow.training.log import read_evaluations
from contraflow.training.run import read_config


@dataclass(frozen=True)
class Record:
    """A finished run. `agent` is its name in the comparison; `settings` its config.json as it is.

    `evaluations` are the rows of eval.csv, `metrics` those of metrics.jsonl, `final` the file that `compare` leaves.
    """

    folder: Path
    agent: str
    env: str
    seed: int
    settings: dict[str, Any]
    version: str
    evaluations: list[dict[str, float]]
    metrics: list[dict[str, Any]]
    final: dict[str, Any] | None
    cost: dict[str, int] | None
    own: bool = False

    def updates(self, step: float) -> float:
        """Gradient steps after `step` environment steps: `updates` after each step of all environments."""
        run = self.settings
        first = -(-run["collect"] // run["num_envs"]) * run["num_envs"]
        return max(0.0, step - first) / run["num_envs"] * run["updates"]


@dataclass(frozen=True)
class LeftOut:
    place: str
    reason: str


def read(folder: Path) -> tuple[list[Record], list[LeftOut]]:
    """Finished runs in or below `folder`, ordered by agent, environment and seed, and what was left out and why.

    In a folder of `contraflow compare` agents have the names given there; in any other the name of their kind, numbered
    when their settings differ in more than environment and seed. Raises UserError when no finished run is found.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the folder of a comparison, or one that holds runs")
    left: list[LeftOut] = []
    matrix = read_record(folder) if (folder / "matrix.json").exists() else None
    cells: dict[Path, tuple[str, bool]] = {}
    if matrix:
        for name, entry in matrix["agents"].items():
            for env in matrix["envs"]:
                for seed in range(matrix["seeds"]):
                    place = cell_folder(folder, name, env, seed)
                    cells[place] = name, bool(entry.get("own"))
                    if not place.is_dir():
                        left.append(LeftOut(_relative(place, folder), "not started"))
    found = []
    for place in _places(folder):
        try:
            if matrix and place not in cells:
                raise UserError("is not a cell of this matrix")
            name, own = cells.get(place, ("", False))
            found.append(_record(place, name, own, bool(matrix)))
        except UserError as error:
            left.append(LeftOut(_relative(place, folder), " ".join(str(error).split())))
    records, repeated = _unique(found if matrix else _named(found))
    left += [LeftOut(_relative(place, folder), reason) for place, reason in repeated]
    if not records:
        why = f"; {len(left)} left out, the first ({left[0].place}): {left[0].reason}" if left else ""
        raise UserError(f"there is no finished run in {folder}{why}")
    return records, sorted(left, key=lambda item: item.place)


def _relative(place: Path, folder: Path) -> str:
    return place.relative_to(folder).as_posix() or "."


def _places(folder: Path) -> Iterator[Path]:
    """Folders that are runs, or that hold files and no runs below them."""
    entries = sorted(folder.iterdir())
    if (folder / "config.json").exists():
        yield folder
        return
    below = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    inside = [place for entry in below for place in _places(entry)]
    yield from inside
    if not inside and any(entry.is_file() for entry in entries) and not (folder / "matrix.json").exists():
        yield folder


def _record(folder: Path, name: str, own: bool, in_matrix: bool) -> Record:
    """The run in `folder`. Raises UserError with the reason to leave it out."""
    if (folder / FAILED).exists():
        raise UserError(f"failed: {failure(folder)}")
    if not (folder / "config.json").exists():
        raise UserError("is not the folder of a run (it has no config.json)")
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError:
        raise UserError("its config.json is damaged") from None
    check_schema(config, folder)
    run = config.get("run")
    if not isinstance(run, dict) or not {"env", "seed", "steps", "num_envs", "collect", "updates", "agent"} <= set(run):
        raise UserError("its config.json does not describe a run")
    taken = steps_taken(folder) or 0
    try:
        evaluations = read_evaluations(folder)
    except (ValueError, TypeError):
        raise UserError("its eval.csv is damaged") from None
    if not evaluations or evaluations[-1].get("step", 0) < run["steps"]:
        raise UserError(f"is not finished ({taken:,} of {run['steps']:,} steps)")
    final = _final(folder)
    if in_matrix and final is None:
        raise UserError("is trained, but not evaluated yet")
    kind = str(run["agent"].get("kind", "agent")).rpartition(":")[2].lower()
    return Record(
        folder, name or kind, run["env"], run["seed"], run, str(config.get("version", "unknown")), evaluations,
        _metrics(folder), final, _cost(folder), own,
    )  # fmt: skip


def _final(folder: Path) -> dict[str, Any] | None:
    if not (folder / FINAL).exists():
        return None
    try:
        final = json.loads((folder / FINAL).read_text())
        for row in final["evaluations"]:
            assert row["policy"] and row["rule"] and len(row["returns"]) > 0
        return final
    except (ValueError, KeyError, TypeError, AssertionError):
        raise UserError(f"its {FINAL} is damaged: delete it, and let `contraflow compare` evaluate again") from None


def _metrics(folder: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl; what a killed process left of a line is skipped."""
    rows = []
    path = folder / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _cost(folder: Path) -> dict[str, int] | None:
    """Particles, NFE and critic calls of one action; None where the agent is code outside the library."""
    try:
        cost = acting_cost(read_config(folder).agent)
    except UserError:
        return None
    return None if cost is None else vars(cost)


def _named(records: list[Record]) -> list[Record]:
    """Runs without a matrix: those of one kind with different settings get numbers, in the order of their settings."""
    from dataclasses import replace

    def signature(record: Record) -> str:
        return json.dumps({k: v for k, v in record.settings.items() if k not in ("env", "seed")}, sort_keys=True)

    kinds: dict[str, list[str]] = {}
    for record in records:
        kinds.setdefault(record.agent, []).append(signature(record))
    names = {
        (kind, one): kind if len(set(all)) == 1 else f"{kind} {i + 1}"
        for kind, all in kinds.items()
        for i, one in enumerate(sorted(set(all)))
    }
    return [replace(record, agent=names[record.agent, signature(record)]) for record in records]


def _unique(records: list[Record]) -> tuple[list[Record], list[tuple[Path, str]]]:
    """Ordered, without those that repeat the agent, environment and seed of another."""
    kept: dict[tuple[str, str, int], Record] = {}
    repeated = []
    for record in sorted(records, key=lambda r: (r.agent, r.env, r.seed, str(r.folder))):
        key = record.agent, record.env, record.seed
        if key in kept:
            repeated.append((record.folder, f"repeats the settings and the seed of {kept[key].folder.name}"))
        else:
            kept[key] = record
    return list(kept.values()), repeated
