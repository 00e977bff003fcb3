"""The verdict of docs/study.md: interquartile means over tasks and seeds, and differences to one of the agents.

    python benchmarks/verdict.py [TABLE] [--than rfm-paper] [--without TASK ...]    # prints the tables in Markdown

TABLE is one of collect.py's with its companion. Scores: return / 1000 for the DeepMind Control Suite, elsewhere 0 is
random actions and 1 the best last policy of any agent. Seeds that an agent has not finished on all tasks are left out.
Intervals: stratified bootstrap, 95 % unless asked otherwise. An agent is not inferior if the lower end of its relative
difference is above -5 %. "Evaluations" is the mean of those after half of the steps.
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

import numpy as np
import tyro

from contraflow.experiments.report.scores import is_dmc
from contraflow.experiments.report.statistics import Estimate, estimate, improvement, iqm, iqm_difference

RULES = ("own", "one particle", "uniform actions")
Returns = dict[str, dict[str, dict[int, float]]]  # agent -> environment -> seed -> return


def read(table: Path) -> tuple[dict[str, Returns], dict[str, float]]:
    """Returns by rule of acting, and those of random actions by environment."""
    returns: dict[str, Returns] = {name: defaultdict(lambda: defaultdict(dict)) for name in (*RULES, "evaluations")}
    random: dict[str, list[float]] = defaultdict(list)
    steps = 0
    with table.open() as file:
        for row in csv.DictReader(file):
            if row["policy"] == "last":
                returns[row["rule"]][row["agent"]][row["env"]][int(row["seed"])] = float(row["return"])
            elif row["policy"] == "random":
                random[row["env"]].append(float(row["return"]))
            steps = int(row["steps"])
    late: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    with table.with_stem(f"{table.stem}_inside").open() as file:
        for row in csv.DictReader(file):
            if row["return"] and int(row["step"]) >= steps // 2:
                late[row["agent"], row["env"], int(row["seed"])].append(float(row["return"]))
    for (agent, env, seed), values in late.items():
        returns["evaluations"][agent][env][seed] = mean(values)
    return returns, {env: mean(values) for env, values in random.items()}


def scales(returns: Returns, random: dict[str, float]) -> dict[str, tuple[float, float]]:
    """The returns that are score 0 and 1, by environment; `returns` are those by the agents' own rules."""
    envs = sorted({env for by_env in returns.values() for env in by_env})
    best = {env: max(max(by_env[env].values(), default=-np.inf) for by_env in returns.values()) for env in envs}
    return {env: (0.0, 1000.0) if is_dmc(env) else (random[env], best[env]) for env in envs}


def main(
    table: tyro.conf.Positional[Path] = Path(__file__).parent / "results" / "study_test.csv",
    than: str = "rfm-paper",
    without: tuple[str, ...] = (),
    level: float = 0.95,
) -> None:
    """Print the tables."""
    returns, random = read(table)
    bounds = scales(returns["own"], random)
    if unknown := set(without) - set(bounds):
        sys.exit(f"no such task: {', '.join(sorted(unknown))}; there are {', '.join(bounds)}")
    envs = [env for env in bounds if env not in without]

    def scores(rule: str, agent: str) -> np.ndarray:
        """[seeds, tasks]"""
        by_env = returns[rule].get(agent, {})
        seeds = sorted(set.intersection(*(set(by_env.get(env, {})) for env in envs)))
        rows = [[(by_env[env][s] - bounds[env][0]) / (bounds[env][1] - bounds[env][0]) for env in envs] for s in seeds]
        return np.array(rows).reshape(len(rows), len(envs))

    def told(e: Estimate) -> str:
        return f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]"

    print("Scores: " + ", ".join(f"{env.rpartition(':')[2]} {bounds[env]}" for env in envs))
    print("\nMean return over seeds, own rule / one particle / uniform actions\n")
    print("| agent | " + " | ".join(env.rpartition(":")[2] for env in envs) + " |\n" + "|---" * (len(envs) + 1) + "|")
    for agent in returns["own"]:
        cells = []
        for env in envs:
            of = [returns[rule].get(agent, {}).get(env, {}) for rule in RULES]
            cells.append(" / ".join(f"{mean(x.values()):.0f}" if x else "-" for x in of) + f" ({len(of[0])})")
        print(f"| `{agent}` | " + " | ".join(cells) + " |")
    print(f"\nChance that a run of the agent ends better than one of `{than}`, own rule\n")
    print("| agent | " + " | ".join(env.rpartition(":")[2] for env in envs) + " |\n" + "|---" * (len(envs) + 1) + "|")
    for agent in returns["own"]:
        x, y = scores("own", agent), scores("own", than)
        if agent != than and len(x) and len(y):
            chances = [float(improvement(x[:, [i]], y[:, [i]])) for i in range(len(envs))]
            print(f"| `{agent}` | " + " | ".join(f"{p:.2f}" for p in chances) + " |")
    for rule in returns:
        print(f"\nInterquartile mean, {rule}\n\n| agent | seeds | score | less `{than}` | in % of it | not inferior |")
        print("|---|---|---|---|---|---|")
        base = scores(rule, than)
        for agent in returns[rule]:
            x = scores(rule, agent)
            if not len(x):
                continue
            line = f"| `{agent}` | {len(x)} | {told(estimate(iqm, x, level=level))} |"
            if agent != than and len(base):
                gap = estimate(lambda a, b: 100 * (iqm(a) / iqm(b) - 1), x, base, level=level)
                verdict = "-" if np.isnan(gap.low) else "yes" if gap.low > -5 else "not shown"
                percent = f"{gap.value:+.0f} [{gap.low:+.0f}, {gap.high:+.0f}]"
                line += f" {told(estimate(iqm_difference, x, base, level=level))} | {percent} | {verdict} |"
            else:
                line += " | | |"
            print(line)


if __name__ == "__main__":
    tyro.cli(main)
