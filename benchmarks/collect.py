"""The finished cells of a matrix as tables to publish: one row per cell and rule of acting, and one of diagnostics per
cell and evaluation.

    python benchmarks/collect.py DIR benchmarks/results/study_development.csv   # and study_development_inside.csv

Rows of other cells that the tables hold already are kept.
"""

import csv
import json
from pathlib import Path
from statistics import mean
from typing import Any

import tyro
from tables import write

INSIDE = ("saturated", "action_entropy", "action_std", "q_gap", "target_bias", "ess")


Row = dict[str, Any]


def joined(table: Path, rows: list[Row]) -> list[Row]:
    """`rows`, and those of `table` that are of other cells."""
    cell = lambda row: (row["agent"], row["env"], int(row["seed"]))
    new = {cell(row) for row in rows}
    old: list[Row] = list(csv.DictReader(table.read_text().splitlines())) if table.exists() else []
    return sorted([row for row in old if cell(row) not in new] + rows, key=cell)


def main(matrix: Path, table: Path, /) -> None:
    """Write `table` and its companion from `matrix`."""
    rows, inside = [], []
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
        cell = {"agent": file.parts[-4], "env": run["env"], "seed": run["seed"]}
        with (file.parent / "eval.csv").open() as evaluations:
            returns = {int(row["step"]): row["return_mean"] for row in csv.DictReader(evaluations)}
        for line in (file.parent / "metrics.jsonl").read_text().splitlines():
            values = {k.removeprefix("diagnostics/"): v for k, v in json.loads(line).items()}
            seen = {k: float(f"{v:.4g}") for k, v in values.items() if k.split("/")[0] in INSIDE and k != "ess"}
            if "saturated" in seen:
                step = values["step"]
                inside.append(cell | {"step": step, "return": round(float(returns[step]), 1)} | seen)
    companion = table.with_stem(f"{table.stem}_inside")
    write(table, joined(table, rows))
    write(companion, joined(companion, inside))


if __name__ == "__main__":
    tyro.cli(main)
