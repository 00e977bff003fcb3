"""Tables of results that grow run by run."""

import csv
from pathlib import Path
from typing import Any


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add `rows` to the CSV file at `path`; the first ones bring the header."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
