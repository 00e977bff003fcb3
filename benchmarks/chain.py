"""The chain of the study in one figure: bias of the target -> law of the actions -> return.

    python benchmarks/chain.py docs/img/chain.png TABLE [TABLE ...]    # tables of collect.py, without their companions

One point per run: what its last evaluation of diagnostics says, and the return of its last policy by its own rule.
"""

import csv
from pathlib import Path

import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

MARKS = "os^Dvp*h"
Rows = list[dict[str, str]]


def read(tables: tuple[Path, ...]) -> list[dict[str, float | str]]:
    """agent, env, bias at t = .1, saturation and return of every run that has all three."""
    runs: dict[tuple[str, ...], dict[str, float | str]] = {}
    for table in tables:
        with table.with_stem(f"{table.stem}_inside").open() as file:
            for row in csv.DictReader(file):
                if row.get("target_bias/0.1"):
                    bias, share = float(row["target_bias/0.1"]), float(row["saturated"])
                    key = row["agent"], row["env"], row["seed"]
                    runs[key] = {"agent": row["agent"], "env": row["env"], "bias": bias, "saturated": share}
        with table.open() as file:
            for row in csv.DictReader(file):
                key = row["agent"], row["env"], row["seed"]
                if key in runs and row["policy"] == "last" and row["rule"] == "own":
                    runs[key]["return"] = float(row["return"])
    return [run for run in runs.values() if "return" in run]


def main(picture: Path, tables: tyro.conf.Positional[tuple[Path, ...]], /, agents: tuple[str, ...] = ()) -> None:
    """Draw `picture` with all or some of the agents."""
    runs = [run for run in read(tables) if not agents or run["agent"] in agents]
    agents = tuple(sorted({str(run["agent"]) for run in runs}))
    envs = sorted({str(run["env"]) for run in runs})
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for i, agent in enumerate(agents):
        for env, mark in zip(envs, MARKS, strict=False):
            own = [run for run in runs if run["agent"] == agent and run["env"] == env]
            look = {"marker": mark, "color": f"C{i % 10}", "s": 28, "alpha": 0.8, "linewidths": 0}
            left.scatter([r["bias"] for r in own], [r["saturated"] for r in own], **look)
            right.scatter([r["saturated"] for r in own], [r["return"] for r in own], **look)
    left.set(xscale="log", xlabel="bias of the target at t = .1 (root mean square)", ylabel="P(|a| > .95)")
    right.set(xlabel="P(|a| > .95)", ylabel="return")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    names = [left.scatter([], [], color=f"C{i % 10}", s=28, label=agent) for i, agent in enumerate(agents)]
    tasks = [
        left.scatter([], [], color="0.4", marker=mark, s=28, label=env.rpartition(":")[2])
        for env, mark in zip(envs, MARKS, strict=False)
    ]
    figure.legend(handles=names + tasks, loc="outside right center", frameon=False, fontsize=8)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=160)
    print(f"{len(runs)} runs in {picture}")


if __name__ == "__main__":
    tyro.cli(main)
