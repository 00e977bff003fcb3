"""The chain of the study in one figure: bias of the target -> law of the actions -> return.

    python benchmarks/chain.py docs/img/chain.png [TABLE] [--agents rfm-paper rfm]

TABLE is one of collect.py's with its companion. One point per run: what its last evaluation of diagnostics says, and
the scores (see verdict.py) of its last policy, by its own rule and with one particle.
"""

import csv
from pathlib import Path

import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from verdict import read, scales

MARKS = "os^Dvp*h"
Runs = dict[tuple[str, str, int], dict[str, float]]


def runs_of(table: Path) -> Runs:
    """bias at t = .1, saturation and scores of every run that has all of them, by agent, environment and seed."""
    returns, random = read(table)
    scale = scales(returns["own"], random)
    runs: Runs = {}
    with table.with_stem(f"{table.stem}_inside").open() as file:
        for row in csv.DictReader(file):
            agent, env, seed = row["agent"], row["env"], int(row["seed"])
            mine = {rule: returns[rule].get(agent, {}).get(env, {}).get(seed) for rule in ("own", "one particle")}
            if row["target_bias/0.1"] and None not in mine.values():
                low, high = scale[env]
                runs[agent, env, seed] = {k: (v - low) / (high - low) for k, v in mine.items() if v is not None}
                runs[agent, env, seed] |= {"bias": float(row["target_bias/0.1"]), "saturated": float(row["saturated"])}
    return runs


def main(
    picture: Path,
    table: tyro.conf.Positional[Path] = Path(__file__).parent / "results" / "study_test.csv",
    /,
    agents: tuple[str, ...] = (),
) -> None:
    """Draw `picture` with all or some of the agents."""
    runs = {key: run for key, run in runs_of(table).items() if not agents or key[0] in agents}
    agents = agents or tuple(sorted({key[0] for key in runs}))
    envs = sorted({key[1] for key in runs})
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    law, own, one = figure.subplots(1, 3)
    law.set(xscale="log", xlabel="bias of the target at t = .1 (root mean square)", ylabel="P(|a| > .95)")
    own.set(xlabel="P(|a| > .95)", ylabel="score, own rule")
    one.set(xlabel="P(|a| > .95)", ylabel="score, one particle")
    own.sharey(one)
    for (agent, env, _), run in runs.items():
        look = {"marker": MARKS[envs.index(env)], "color": f"C{agents.index(agent)}", "s": 28, "alpha": 0.8}
        for axes, x, y in (law, "bias", "saturated"), (own, "saturated", "own"), (one, "saturated", "one particle"):
            axes.scatter(run[x], run[y], linewidths=0, **look)
    for axes in (law, own, one):
        axes.grid(alpha=0.3)
    names = [law.scatter([], [], color=f"C{i}", s=28, label=agent) for i, agent in enumerate(agents)]
    tasks = [
        law.scatter([], [], color="0.4", marker=mark, s=28, label=env.rpartition(":")[2])
        for env, mark in zip(envs, MARKS, strict=False)
    ]
    figure.legend(handles=names + tasks, loc="outside right center", frameon=False, fontsize=8)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=160)
    print(f"{len(runs)} runs in {picture}")


if __name__ == "__main__":
    tyro.cli(main)
