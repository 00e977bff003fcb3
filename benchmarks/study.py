"""The comparison of docs/background/study.md on its test tasks, and its tables.

    python benchmarks/study.py run --out DIR [--seeds N] [--jobs J] [--agents rfm sac]   # the same again continues
    python benchmarks/study.py collect DIR TABLE                    # rows of a finished comparison, and TABLE_inside
    python benchmarks/study.py tables [TABLE] [--than rfm-paper]    # interquartile means and differences, in Markdown

`run` makes a folder of `contraflow compare`, of which `contraflow report DIR` makes a page. TABLE is
docs/data/study_test.csv unless said; its companion with `_inside` holds the diagnostics of every evaluation. Scores:
return / 1000 for the DeepMind Control Suite, elsewhere 0 is random actions and 1 the best last policy of any agent.
Seeds that an agent has not finished on all tasks are left out. Intervals: stratified bootstrap. An agent is not
inferior if the lower end of its relative difference is above -5 %.
"""

import json
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import numpy as np
import tyro
from common import DATA, Row, read, write

from contraflow.agents.online.sac import SAC
from contraflow.agents.online.sir import SIR
from contraflow.experiments.compare.matrix import Matrix, Settings
from contraflow.experiments.compare.runner import Local, run_cells
from contraflow.experiments.report.scores import is_dmc
from contraflow.experiments.report.statistics import Estimate, estimate, iqm, iqm_difference
from contraflow.presets import PRESETS
from contraflow.rl.critics import Critics

TASKS = tuple(f"envpool:{task}" for task in ("CheetahRun-v1", "WalkerRun-v1", "QuadrupedWalk-v1", "HalfCheetah-v5"))
SETTINGS = Settings(
    steps=40_000, collect=4_000, num_envs=4, updates=2, batch_size=128, n_step=3, critic=Critics(tau=0.02),
    buffer_size=40_000, eval_every=10_000, eval_episodes=4, final_episodes=8, log_every=2_000,
)  # fmt: skip
INSIDE = ("saturated", "action_entropy", "action_std", "q_gap", "target_bias")
RULES = ("own", "one particle", "uniform actions")
Returns = dict[str, dict[str, dict[int, float]]]  # agent -> environment -> seed -> return


def agents() -> dict[str, Any]:
    """Runs by name: the default, the paper's agent, no actor (32 actions of two laws), and SAC with a faster actor."""
    sac, sir = PRESETS["sac"], PRESETS["sir"]
    assert isinstance(sac.agent, SAC) and isinstance(sir.agent, SIR)
    fast = replace(sac.agent, optim=replace(sac.agent.optim, lr=1e-3))
    return {
        "rfm-paper": PRESETS["rfm-paper"],
        "rfm": PRESETS["rfm"],
        "sac-fast": replace(sac, agent=fast),
        "sir-quarter": replace(sir, agent=replace(sir.agent, kappa=0.25)),
        "corners": replace(sir, agent=replace(sir.agent, kappa=0.02)),
    }


def run(
    out: Path,
    seeds: int = 5,
    jobs: int = 2,
    agents_: Annotated[tuple[str, ...], tyro.conf.arg(name="agents")] = (),
    envs: tuple[str, ...] = TASKS,
) -> None:
    """Train and evaluate, seed by seed."""
    chosen = {name: run for name, run in agents().items() if not agents_ or name in agents_}
    matrix = Matrix(out, chosen, envs, SETTINGS, seeds)
    matrix.record()
    outcome = run_cells(matrix.cells(), out, Local(jobs), SETTINGS.final_episodes, quiet=not sys.stdout.isatty())
    for cell, reason in outcome.failed.items():
        print(f"failed: {cell}: {reason}")
    sys.exit(1 if outcome.failed or outcome.interrupted else 0)


def collect(folder: Path, table: Path, /) -> None:
    """A row per cell and rule of acting, and in the companion one per cell and evaluation; rows of other cells stay."""
    rows, inside = [], []
    for file in sorted(folder.glob("*/*/seed*/final.json")):
        config = json.loads((file.parent / "config.json").read_text())["run"]
        cell: Row = {"agent": file.parts[-4], "env": config["source"]["env"], "seed": config["seed"]}
        for row in json.loads(file.read_text())["evaluations"]:
            cost = row["cost"] or {"particles": "", "nfe": "", "critic_calls": ""}
            told = {"steps": config["steps"], "policy": row["policy"], "rule": row["rule"]} | cost
            rows.append(cell | told | {"episodes": len(row["returns"]), "return": round(mean(row["returns"]), 1)})
        returns = {row["step"]: row["return_mean"] for row in read(file.parent / "eval.csv")}
        for line in (file.parent / "metrics.jsonl").read_text().splitlines():
            values = {k.removeprefix("diagnostics/"): v for k, v in json.loads(line).items()}
            seen = {k: float(f"{v:.4g}") for k, v in values.items() if k.split("/")[0] in INSIDE}
            if "saturated" in seen:
                inside.append(cell | {"step": values["step"], "return": round(returns[values["step"]], 1)} | seen)
    for path, new in ((table, rows), (companion(table), inside)):
        name = lambda row: (row["agent"], row["env"], int(row["seed"]))
        have = {name(row) for row in new}
        write(path, sorted([row for row in read(path) if name(row) not in have] + new, key=name))


def companion(table: Path) -> Path:
    return table.with_stem(f"{table.stem}_inside")


def read_returns(table: Path) -> tuple[dict[str, Returns], dict[str, float]]:
    """Returns by rule of acting, and those of random actions by environment; "evaluations" is the mean of those after
    half of the steps."""
    returns: dict[str, Returns] = {name: defaultdict(lambda: defaultdict(dict)) for name in (*RULES, "evaluations")}
    random, late, rows = defaultdict(list), defaultdict(list), read(table)
    for row in rows:
        if row["policy"] == "last":
            returns[row["rule"]][row["agent"]][row["env"]][row["seed"]] = row["return"]
        elif row["policy"] == "random":
            random[row["env"]].append(row["return"])
    for row in read(companion(table)):
        if row["return"] != "" and row["step"] >= rows[0]["steps"] // 2:
            late[row["agent"], row["env"], row["seed"]].append(row["return"])
    for (agent, env, seed), values in late.items():
        returns["evaluations"][agent][env][seed] = mean(values)
    return returns, {env: mean(values) for env, values in random.items()}


def tables(
    table: tyro.conf.Positional[Path] = DATA / "study_test.csv", than: str = "rfm-paper", level: float = 0.95
) -> None:
    """Print them; intervals have the coverage `level`."""
    if not any(row["policy"] == "last" for row in read(table)):
        sys.exit(f"{table} holds no finished run: `study.py collect` writes it")
    returns, random = read_returns(table)
    own = returns["own"]
    envs = sorted({env for by_env in own.values() for env in by_env})
    best = {env: max(max(by_env[env].values(), default=-np.inf) for by_env in own.values()) for env in envs}
    low = np.array([0.0 if is_dmc(env) else random[env] for env in envs])
    high = np.array([1000.0 if is_dmc(env) else best[env] for env in envs])

    def scores(rule: str, agent: str) -> np.ndarray:
        """[seeds, tasks]"""
        by_env = returns[rule].get(agent, {})
        seeds = sorted(set.intersection(*(set(by_env.get(env, {})) for env in envs)))
        raw = np.array([[by_env[env][seed] for env in envs] for seed in seeds]).reshape(-1, len(envs))
        return (raw - low) / (high - low)

    def told(e: Estimate) -> str:
        return f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]"

    def head(*names: str) -> None:
        print("| agent | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|")

    tasks = [env.rpartition(":")[2] for env in envs]
    print("Mean return over seeds, " + " / ".join(RULES) + " (seeds)\n")
    head(*tasks)
    for agent in own:
        of = [[returns[rule].get(agent, {}).get(env, {}) for rule in RULES] for env in envs]
        cells = [" / ".join(f"{mean(x.values()):.0f}" if x else "-" for x in row) + f" ({len(row[0])})" for row in of]
        print(f"| `{agent}` | " + " | ".join(cells) + " |")
    for rule in returns:
        print(f"\nInterquartile mean, {rule}\n")
        head("seeds", "score", f"less `{than}`", "in % of it", "not inferior")
        base = scores(rule, than)
        for agent in returns[rule]:
            x, line = scores(rule, agent), " | | |"
            if len(x) and agent != than and len(base):
                gap = estimate(lambda a, b: 100 * (iqm(a) / iqm(b) - 1), x, base, level=level)
                verdict = "-" if np.isnan(gap.low) else "yes" if gap.low > -5 else "not shown"
                percent = f"{gap.value:+.0f} [{gap.low:+.0f}, {gap.high:+.0f}]"
                line = f" {told(estimate(iqm_difference, x, base, level=level))} | {percent} | {verdict} |"
            if len(x):
                print(f"| `{agent}` | {len(x)} | {told(estimate(iqm, x, level=level))} |{line}")


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"run": run, "collect": collect, "tables": tables})
