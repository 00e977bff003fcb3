"""What the benchmarks share: where results go, tables as CSV, implementations kept outside this repository."""

import csv
import importlib
import sys
from pathlib import Path
from typing import Any

import jax

DATA = Path(__file__).resolve().parents[1] / "docs" / "data"
Row = dict[str, Any]


def write(path: Path, rows: list[Row], columns: tuple[str, ...] = (), mode: str = "w") -> None:
    """`rows` as the CSV file `path`, or with mode "a" behind those that it has; `columns` are all keys unless given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open(mode, newline="") as file:
        names = columns or tuple(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(file, names, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    print(f"{len(rows)} rows in {path.name}")


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


def peer(name: str | None, case: str, **sizes: int) -> dict[str, Any]:
    """What the function `module:function` on PYTHONPATH has to compare in this case: calls by name."""
    if name is None:
        return {}
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)(case, **sizes)


def machine() -> str:
    device = jax.devices()[0]
    return f"jax {jax.__version__}, {device.platform} ({device.device_kind}), Python {sys.version.split()[0]}"
