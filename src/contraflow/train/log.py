"""Records of a run: `metrics.jsonl` and `eval.csv` always, trackers on request."""

import csv
import json
from pathlib import Path
from typing import Any, Literal, Protocol

from contraflow.types import UserError

TrackerName = Literal["tensorboard", "wandb", "trackio"]


class Tracker(Protocol):
    def log(self, step: int, values: dict[str, float]) -> None: ...
    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, folder: Path, config: dict[str, Any]):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("config", f"```\n{json.dumps(config, indent=1)}\n```")

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Remote:
    """W&B, and Trackio, which keeps its interface."""

    def __init__(self, module: TrackerName, folder: Path, config: dict[str, Any]):
        try:
            client = __import__(module)
        except ImportError:
            raise UserError(f'tracker {module} is not installed: pip install "contraflow[{module}]"') from None
        self._client = client
        client.init(project="contraflow", name=folder.name, config=config)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._client.log(values, step=step)

    def close(self) -> None:
        self._client.finish()


class Log:
    """Appends rows; on resume, rows later than the restored checkpoint are dropped first."""

    def __init__(self, folder: Path, trackers: tuple[TrackerName, ...], config: dict[str, Any], step: int = 0):
        self._metrics, self._eval = folder / "metrics.jsonl", folder / "eval.csv"
        _keep(self._metrics, lambda line: json.loads(line)["step"] <= step)
        _keep(self._eval, lambda line: not line[0].isdigit() or int(line.split(",")[0]) <= step)
        self._trackers: list[Tracker] = [
            _TensorBoard(folder, config) if name == "tensorboard" else _Remote(name, folder, config) for name in trackers
        ]

    def metrics(self, step: int, values: dict[str, float]) -> None:
        with self._metrics.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for tracker in self._trackers:
            tracker.log(step, {f"train/{name}": value for name, value in values.items()})

    def evaluation(self, step: int, row: dict[str, float]) -> None:
        new = not self._eval.exists()
        with self._eval.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["step", *row])
            writer.writerow([step, *(f"{v:.6g}" for v in row.values())])
        for tracker in self._trackers:
            tracker.log(step, {f"eval/{name}": value for name, value in row.items()})

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


def _keep(path: Path, wanted: Any) -> None:
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if line and wanted(line)]
        path.write_text("".join(line + "\n" for line in lines))


def read_evaluations(folder: Path) -> list[dict[str, float]]:
    """Rows of `eval.csv` as numbers; [] if there is none yet."""
    path = folder / "eval.csv"
    if not path.exists():
        return []
    with path.open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
