"""What the benchmarks share: where results go, tables as CSV, figures, implementations kept outside this repository."""

import csv
import importlib
import sys
from pathlib import Path
from typing import Any

import jax

DOCS = Path(__file__).resolve().parents[1] / "docs"
DATA, PICTURES = DOCS / "data", DOCS / "img"
Row = dict[str, Any]


def write(path: Path, rows: list[Row]) -> None:
    """`rows` as the CSV file `path`; columns are all their keys, in order of appearance."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _put(path, "w", list(dict.fromkeys(name for row in rows for name in row)), rows)
    print(f"{len(rows)} rows in {path.name}")


def append(path: Path, rows: list[Row], columns: tuple[str, ...]) -> None:
    """Add `rows` to the CSV file at `path`, which begins with the names of its `columns`."""
    _put(path, "a", columns, [{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows])


def _put(path: Path, mode: str, columns: Any, rows: list[Row]) -> None:
    with path.open(mode, newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[Row]:
    """Rows with numbers for numbers; none without a file."""

    def value(text: str) -> Any:
        if text in ("True", "False"):
            return text == "True"
        try:
            return int(text) if text.isdigit() else float(text)
        except ValueError:
            return text

    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{k: value(v) for k, v in row.items()} for row in csv.DictReader(file)]


def figure(width: float, height: float) -> Any:
    """A figure that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def peer(name: str | None, case: str, **sizes: int) -> dict[str, Any]:
    """What the function `module:function` on PYTHONPATH has to compare in this case: calls by name."""
    if name is None:
        return {}
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)(case, **sizes)


def machine() -> str:
    device = jax.devices()[0]
    return f"jax {jax.__version__}, {device.platform} ({device.device_kind}), Python {sys.version.split()[0]}"
