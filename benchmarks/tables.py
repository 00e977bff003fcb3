"""Tables of results: written anew, or growing run by run."""

import csv
from pathlib import Path
from typing import Any


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """`rows` as the CSV file `path`; columns are all their keys, in order of appearance."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _put(path, "w", list(dict.fromkeys(name for row in rows for name in row)), rows)
    print(f"{len(rows)} rows in {path.name}")


def append(path: Path, rows: list[dict[str, Any]], columns: tuple[str, ...] = ()) -> None:
    """Add `rows` to the CSV file at `path`; the first ones bring the header, `columns` or their keys."""
    _put(path, "a", columns or tuple(rows[0]), rows)


def _put(path: Path, mode: str, columns: Any, rows: list[dict[str, Any]]) -> None:
    with path.open(mode, newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)
