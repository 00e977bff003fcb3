"""Records of a run: `metrics.jsonl` and `eval.csv` always, trackers on request."""

import csv
import importlib
import importlib.util
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

from contraflow.core.errors import UserError
from contraflow.core.files import read_json, write_json, write_text

TRACKERS = "trackers.json"  # ids of this run in W&B and Trackio
REVISION = "revision"  # the column of eval.csv that is no number
TrackerName = Literal["tensorboard", "wandb", "trackio"]


class Tracker(Protocol):
    """Receives the metrics and evaluations of a run."""

    def log(self, step: int, values: dict[str, float]) -> None: ...
    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, folder: Path, config: dict[str, Any], step: int):
        from tensorboardX import SummaryWriter

        # Hides what an earlier process recorded after the restored checkpoint.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step or None)
        self._writer.add_text("config", f"```\n{json.dumps(config, indent=1)}\n```")

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Remote:
    """A run in W&B, or in Trackio, which has the same interface; each run folder continues one run by its id."""

    def __init__(self, module: TrackerName, folder: Path, group: str | None, config: dict[str, Any]):
        file = folder / TRACKERS
        ids = read_json(file) if file.exists() else {}
        if module not in ids:
            ids[module] = f"{folder.name}-{uuid.uuid4().hex[:8]}"
            write_json(file, ids)
        options: dict[str, Any] = {"project": "contraflow", "group": group, "config": config, "resume": "allow"}
        if module == "wandb":  # Trackio continues a run by its name, W&B by its id
            options |= {"id": ids[module], "reinit": "create_new"}  # several runs in one process
        name = folder.name if module == "wandb" else ids[module]
        self._run = importlib.import_module(module).init(name=name, **options)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def check_trackers(trackers: tuple[TrackerName, ...]) -> None:
    """Raises UserError if the package of a tracker is missing."""
    for name in trackers:
        if name != "tensorboard" and importlib.util.find_spec(name) is None:
            raise UserError(f'tracker {name} is not installed: pip install "contraflow[{name}]"')


class Log:
    """Appends rows of metrics and evaluations. On resume, it drops rows later than the restored checkpoint."""

    def __init__(
        self,
        folder: Path,
        trackers: tuple[TrackerName, ...],
        config: dict[str, Any],
        step: int = 0,
        group: str | None = None,
    ):
        """`group` is shared by the runs of several seeds."""
        self._metrics, self._eval = folder / "metrics.jsonl", folder / "eval.csv"
        _keep(self._metrics, lambda line: json.loads(line)["step"] <= step)
        _keep(self._eval, lambda line: not line[:1].isdigit() or int(line.split(",")[0]) <= step)
        self._trackers: list[Tracker] = [
            _TensorBoard(folder, config, step) if name == "tensorboard" else _Remote(name, folder, group, config)
            for name in trackers
        ]

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Appends a row to metrics.jsonl and passes it to the trackers."""
        with self._metrics.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for tracker in self._trackers:
            tracker.log(step, {f"train/{name}": value for name, value in values.items()})

    def evaluation(self, step: int, row: dict[str, float | str | None]) -> None:
        """Appends a row to eval.csv and passes its numbers to the trackers. None is an empty cell; a file of an older
        version keeps its columns."""
        names = ["step", *row]
        if self._eval.exists():
            with self._eval.open() as file:
                names = next(csv.reader(file), names)
        else:
            self._eval.write_text(",".join(names) + "\n")
        numbers = {name: value for name, value in row.items() if value is not None and not isinstance(value, str)}
        known: dict[str, Any] = {name: value for name, value in row.items() if isinstance(value, str | int)}
        known |= {name: f"{value:.6g}" for name, value in numbers.items() if name not in known} | {"step": step}
        with self._eval.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow([known.get(name, "") for name in names])
        for tracker in self._trackers:
            tracker.log(step, {f"eval/{name}": value for name, value in numbers.items()})

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


def _keep(path: Path, wanted: Callable[[str], bool]) -> None:
    """Keeps the wanted lines and drops an incomplete line left by a killed process.

    Raises UserError for lines in another format.
    """
    if path.exists():
        try:
            lines = path.read_text().splitlines(keepends=True)
            kept = "".join(line for line in lines if line.endswith("\n") and wanted(line))
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(path, error) from None
        write_text(path, kept)


def read_evaluations(folder: Path, *needed: str) -> list[dict[str, float]]:
    """Returns the numbers in the rows of `eval.csv`, or [] if there is none yet. `success` is there only if the
    environment reports it.

    Raises UserError if the file is damaged or lacks one of the columns `needed`.
    """
    path = folder / "eval.csv"
    if not path.exists():
        return []
    try:
        with path.open() as file:
            rows = [
                {k: float(v) for k, v in row.items() if k != REVISION and (k, v) != ("success", "")}
                for row in csv.DictReader(file)
            ]
    except (ValueError, TypeError) as error:
        raise _damaged(path, error) from None
    for name in needed:
        if any(name not in row for row in rows):
            raise _damaged(path, f"it has no column {name}")
    return rows


def _damaged(path: Path, reason: object) -> UserError:
    return UserError(f"{path} is damaged ({reason}); restore it, or delete it: the checkpoints do not need it")
