"""Finding finished runs below a folder, and the reasons why other folders are left out."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from contraflow.core.settings import check_schema
from contraflow.core.types import UserError
from contraflow.experiments import bridge
from contraflow.experiments.compare.matrix import FAILED, FINAL, cell_folder, failure, read_record, steps_taken
from contraflow.runtime.variants import OWN
from contraflow.training.log import read_evaluations
from contraflow.training.run import read_config


@dataclass(frozen=True)
class Record:
    """A finished run of any kind. `agent` is its name in the comparison, `settings` its flat config.json.

    `evaluations` are the rows of eval.csv, `diagnostics` those of metrics.jsonl, and `final` is the result of
    `compare`.
    """

    folder: Path
    agent: str
    env: str
    seed: int
    settings: dict[str, Any]
    version: str
    evaluations: list[dict[str, float]]
    diagnostics: list[dict[str, float]]
    final: dict[str, Any] | None
    cost: dict[str, int] | None
    own: bool

    def place(self, by: str, row: Mapping[str, float]) -> float | None:
        """Returns `steps` of the environment, gradient `updates` or `time` of an evaluation; None if not known."""
        if by == "time":
            return row["seconds"] / 60
        count = bridge.gradient_steps if by == "updates" else bridge.env_steps
        return count(self.settings, row["step"])

    def curve(self, by: str, value: str = "return_mean") -> tuple[np.ndarray, np.ndarray] | None:
        """Places and values of the evaluations during training; the last of those at one place. None if not known."""
        points = [(self.place(by, row), row[value]) for row in self.evaluations if value in row]
        if not points or any(x is None for x, _ in points):
            return None
        x, y = np.array(points, float).T
        last = np.append(np.diff(x) > 0, True)
        return x[last], y[last]

    def switch(self, by: str) -> float | None:
        """Where a run went from recorded data to the environment; None if it did not, or if that is not known."""
        first, rows = self.settings.get("offline_steps"), self.evaluations
        if not first or rows[-1]["step"] <= first:
            return None
        if by == "time":  # of the evaluation then, or between two
            return float(np.interp(first, [row["step"] for row in rows], [row["seconds"] / 60 for row in rows]))
        return self.place(by, {"step": first})

    @property
    def success(self) -> float | None:
        """Share of episodes with success of the policy at the end of training; None if the environment said nothing."""
        own = [row["success"] for row in self.after("last") if row["rule"] == OWN and "success" in row]
        return own[0] if own else self.evaluations[-1].get("success")

    def after(self, policy: str) -> list[dict[str, Any]]:
        """Returns the evaluations after training of the `last`, the `best` or a `random` policy."""
        return [row for row in (self.final or {"evaluations": []})["evaluations"] if row["policy"] == policy]


def read(folder: Path) -> tuple[list[Record], dict[str, str]]:
    """Returns the finished runs in or below `folder`, by agent, environment and seed, and what was left out and why.

    In a folder of `contraflow compare`, agents have the names given there. Elsewhere they have the name of their kind,
    numbered if their settings differ in more than environment, data and seed. Raises UserError when no finished run is
    found.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the folder of a comparison, or one that holds runs")
    cells: dict[Path, tuple[str, bool]] = {}
    if (folder / "matrix.json").exists():
        matrix = read_record(folder)
        for name, entry in matrix["agents"].items():
            places = [cell_folder(folder, name, env, s) for env in matrix["envs"] for s in range(matrix["seeds"])]
            cells |= dict.fromkeys(places, (name, bool(entry["own"])))
    left = {place: "not started" for place in cells if not place.is_dir()}
    found = []
    for place in _places(folder):
        try:
            if cells and place not in cells:
                raise UserError("is not a cell of this matrix")
            found.append(_record(place, *cells.get(place, ("", False))))
        except UserError as error:
            left[place] = " ".join(str(error).split())
    kept: dict[Any, Record] = {}
    for record in sorted(found if cells else _named(found), key=lambda r: (r.agent, r.env, r.seed, str(r.folder))):
        first = kept.setdefault((record.agent, record.env, record.seed), record)
        if first is not record:
            left[record.folder] = f"repeats the settings and the seed of {first.folder.name}"
    reasons = {place.relative_to(folder).as_posix(): left[place] for place in sorted(left)}
    if not kept:
        place, reason = next(iter(reasons.items()), ("", ""))
        why = f"; {len(left)} left out, the first ({place}): {reason}" if left else ""
        raise UserError(f"there is no finished run in {folder}{why}")
    return list(kept.values()), reasons


def _places(folder: Path) -> Iterator[Path]:
    """Yields folders that are runs, or that hold files and no runs below them."""
    if (folder / "config.json").exists():
        yield folder
        return
    entries = sorted(folder.iterdir())
    inside = [place for e in entries if e.is_dir() and not e.name.startswith(".") for place in _places(e)]
    yield from inside
    if not inside and any(entry.is_file() for entry in entries) and not (folder / "matrix.json").exists():
        yield folder


def _record(folder: Path, name: str, own: bool) -> Record:
    """Returns the run in `folder`, a cell if `name` is given. Raises UserError with the reason to leave it out."""
    file, final, rows = folder / "config.json", None, []
    if (folder / FAILED).exists():
        raise UserError(f"failed: {failure(folder)}")
    if not file.exists():
        raise UserError("is not the folder of a run (it has no config.json)")
    try:
        config = json.loads(file.read_text())
        check_schema(config, file)
        run = bridge.flat(config["run"])
        env, seed, steps, kind = run["env"], run["seed"], run["steps"], str(run["agent"].get("kind", "agent"))
        file = folder / "eval.csv"
        evaluations = read_evaluations(folder)
        if (file := folder / FINAL).exists():
            final = json.loads(file.read_text())
            assert all(row["policy"] and row["rule"] and row["returns"] for row in final["evaluations"])
        if (file := folder / "metrics.jsonl").exists():  # a killed process may have left an incomplete line
            rows = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        remedy = ": delete it, and let `contraflow compare` evaluate again" if file.name == FINAL else ""
        raise UserError(f"its {file.name} is damaged{remedy}") from None
    if not env:
        raise UserError("was not evaluated: it has no environment")
    if not evaluations or evaluations[-1].get("step", 0) < steps:
        raise UserError(f"is not finished ({steps_taken(folder):,} of {steps:,} steps)")
    if name and final is None:
        raise UserError("is trained, but not evaluated yet")
    try:
        cost = bridge.cost(read_config(folder).agent)
    except UserError:  # code outside the library is not imported
        cost = None
    version, cut = str(config.get("version", "unknown")), "diagnostics/"
    inside = [{k.removeprefix(cut): v for k, v in row.items()} for row in rows if any(k.startswith(cut) for k in row)]
    agent = name or kind.rpartition(":")[2].lower()
    return Record(folder, agent, env, seed, run, version, evaluations, inside, final, cost, own)


def _named(records: list[Record]) -> list[Record]:
    """Numbers the runs of one kind by their settings where these differ; for runs without a matrix."""
    out = []
    for kind in {record.agent for record in records}:
        alike: dict[str, list[Record]] = {}
        for r in (r for r in records if r.agent == kind):
            mine = {k: v for k, v in r.settings.items() if k not in ("env", "data", "seed")}
            alike.setdefault(json.dumps(mine, sort_keys=True), []).append(r)
        for i, text in enumerate(sorted(alike), 1):
            out += [replace(r, agent=kind if len(alike) == 1 else f"{kind} {i}") for r in alike[text]]
    return out
