"""The finished cells of a matrix as a table to publish: one row per cell and rule of acting.

    python benchmarks/collect.py DIR benchmarks/results/study_development.csv

The table is written anew.
"""

import csv
import json
from pathlib import Path
from statistics import mean

import tyro


def main(matrix: Path, table: Path, /) -> None:
    """Write `table` from `matrix`."""
    rows = []
    for file in sorted(matrix.glob("*/*/seed*/final.json")):
        run = json.loads((file.parent / "config.json").read_text())["run"]
        for row in json.loads(file.read_text())["evaluations"]:
            cost = row["cost"] or {"particles": "", "nfe": "", "critic_calls": ""}
            rows.append(
                {"agent": file.parts[-4], "env": run["env"], "seed": run["seed"], "steps": run["steps"]}
                | {"policy": row["policy"], "rule": row["rule"]}
                | cost
                | {"episodes": len(row["returns"]), "return": round(mean(row["returns"]), 1)}
            )
    with table.open("w", newline="") as out:
        writer = csv.DictWriter(out, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} rows in {table}")


if __name__ == "__main__":
    tyro.cli(main)
