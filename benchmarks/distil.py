"""Policies of ten network evaluations per action made into policies of one, the critic standing still.

    python benchmarks/distil.py RUN [RUN ...] [--students one one-shortcut one-split ten]   # adds to results/distil.csv

RUN is a finished run of the agent `ten` of the matrix "one", or of any `RFM`. A student starts from fresh networks and
learns from the run's replay by RFM's own targets, at the run's temperature, with the run's critic, which stays as it
is. Teacher and students are judged on the same episodes. The student `ten` tells what learning anew costs by itself.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax.random as jr
import tyro
from passive import CHUNK, beside, judged, replayed, study
from tables import append

from contraflow.core.types import EnvSpec
from contraflow.rl.temperature import Constant
from contraflow.runtime.policy import Policy


def distilled(name: str, run: Any, spec: EnvSpec, learner: Any, updates: int) -> Policy:
    """The student `name` after `updates` updates."""
    k_init, k_learn = jr.split(jr.key(run.seed))
    lam = Constant(float(run.agent.lam(learner.agent)))
    agent, state = beside(name, run.agent, learner.agent.critic, spec, k_init, temperature=lam)
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
            about = {"env": run.env, "steps": run.steps, "policy": name, "seed": run.seed}
            rows = [about | row | {"episodes": episodes} for row in judged(policy(), jr.key(run.seed), episodes)]
            append(Path(__file__).parent / "results" / "distil.csv", rows)
            print(rows, flush=True)


if __name__ == "__main__":
    tyro.cli(main)
