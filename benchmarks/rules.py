"""Trained policies under other rules of acting: what solver steps and the number of uniform actions do (E2, E5).

    python benchmarks/rules.py RUN [RUN ...]      # adds to benchmarks/results/rules.csv

The episodes are those of the matrix's own evaluation. For each finished run of a flow agent:

    own                     its own rule
    50 steps                the same with 50 steps of its solver
    one particle, 50 steps  the same without a choice
    1024 uniform actions    the best of so many by its critic, no actor: nearly the maximum of Q up to two dimensions
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.random as jr
import tyro
from tables import append

from contraflow import load
from contraflow.agents import SIR
from contraflow.envs import make
from contraflow.experiments.compare.worker import SEED
from contraflow.policy.select import Argmax, First
from contraflow.runtime.variants import without_actor
from contraflow.training.evaluate import evaluate


def rules(policy: Any) -> dict[str, tuple[Any, Any]]:
    """(agent, state) by name."""
    long = replace(policy.agent, solver=replace(policy.agent.solver, steps=50))
    uniform: tuple[SIR, Any] = without_actor(policy)
    return {
        "own": (policy.agent, policy.state),
        "50 steps": (long, policy.state),
        "one particle, 50 steps": (replace(long, greedy=First()), policy.state),
        "1024 uniform actions": (replace(uniform[0], greedy=Argmax(1024)), uniform[1]),
    }


def main(runs: tyro.conf.Positional[tuple[Path, ...]], /, episodes: int = 8) -> None:
    """Print and write the rows."""
    out = Path(__file__).parent / "results" / "rules.csv"
    for folder in runs:
        policy = load(folder)
        judge = make(policy.env, episodes, SEED)
        rows = []
        for name, (agent, state) in rules(policy).items():
            value = float(evaluate(agent, state, judge, jr.key(SEED), episodes).mean())
            entry = {"env": policy.env, "agent": folder.parts[-3], "seed": folder.name.removeprefix("seed")}
            rows.append(entry | {"rule": name, "return": round(value, 1)})
        append(out, rows)
        print(*rows, sep="\n", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
