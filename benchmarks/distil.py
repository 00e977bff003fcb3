"""Policies of ten network evaluations per action made into policies of one, the critic standing still.

    python benchmarks/distil.py RUN [RUN ...] [--students one one-shortcut one-split ten]   # adds to results/distil.csv

RUN is a finished run of the agent `ten` of the matrix "one", or of any `RFM`. A student starts from fresh networks and
learns from the run's replay by RFM's own targets, at the run's temperature, with the run's critic, which stays as it
is. Teacher and students are judged on the same episodes. The student `ten` tells what learning anew costs by itself.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import tyro
from passive import CHUNK, fitted, replayed, study
from tables import append

from contraflow.compare.worker import SEED
from contraflow.envs import make
from contraflow.rl.temperature import Constant
from contraflow.runtime.policy import Policy
from contraflow.runtime.variants import variants
from contraflow.train.evaluate import evaluate
from contraflow.types import EnvSpec


def judged(policy: Policy, name: str, run: Any, episodes: int) -> list[dict[str, Any]]:
    """One row for each rule of acting."""
    judge, key = make(run.env, episodes, SEED), jr.key(run.seed)
    rows = []
    for rule, (rival, state) in variants(policy).items():
        returns = evaluate(rival, state, judge, jr.clone(key), episodes)
        row: dict[str, Any] = {"env": run.env, "steps": run.steps, "policy": name, "seed": run.seed, "rule": rule}
        rows.append(row | {"return": round(float(returns.mean()), 1), "episodes": episodes})
    return rows


def distilled(name: str, run: Any, spec: EnvSpec, learner: Any, updates: int) -> Policy:
    """The student `name` after `updates` updates."""
    k_init, k_learn = jr.split(jr.key(run.seed))
    teacher = learner.agent
    lam = Constant(float(run.agent.lam(teacher)))
    agent = replace(fitted(name, run.agent), critic=replace(run.agent.critic, lr=1e-30), temperature=lam)
    state = jax.jit(lambda key: agent.init(key, spec))(k_init)
    critics = jax.tree.map(jnp.copy, (teacher.critic, teacher.critic))
    state = eqx.tree_at(lambda s: (s.critic, s.target), state, critics)
    for i in range(updates // CHUNK):
        state = study(run, agent, state, learner.buffer, jr.fold_in(k_learn, i))
    return Policy(agent, spec, run.env, state)


def main(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    /,
    students: tuple[str, ...] = ("one", "one-shortcut", "one-split", "ten"),
    updates: int = 10_000,
    episodes: int = 32,
) -> None:
    """Print and write the rows."""
    for folder in runs:
        run, env, learner = replayed(folder)
        policies = {"teacher": partial(Policy, run.agent, env.spec, run.env, learner.agent)}
        policies |= {name: partial(distilled, name, run, env.spec, learner, updates) for name in students}
        for name, policy in policies.items():
            rows = judged(policy(), name, run, episodes)
            append(Path(__file__).parent / "results" / "distil.csv", rows)
            print(rows, flush=True)


if __name__ == "__main__":
    tyro.cli(main)
