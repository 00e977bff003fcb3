"""Imitation whose policies act in one network evaluation, against flow matching in ten: returns and latency.

    python benchmarks/onestep.py train hopper --out DIR      # DIR of benchmarks/finetune.py, after its `imitate`
    python benchmarks/onestep.py returns hopper --out DIR    # benchmarks/results/onestep_hopper.csv
    python benchmarks/onestep.py latency hopper --out DIR

Same data, network, batch and number of updates for all objectives; every seed is a training of its own. Returns are
means over `--episodes` episodes, whose starts are the same for all policies of a seed.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax.random as jr
import numpy as np
import tyro
from finetune import FLOW, TASKS, Task, run
from tables import write
from timing import paired, report

from contraflow import load
from contraflow.agents import BC
from contraflow.flow.fewstep import Matching, MeanFlow, Shortcut, SplitMeanFlow
from contraflow.runtime.policy import Policy
from contraflow.runtime.variants import environment
from contraflow.training.evaluate import evaluate
from contraflow.training.offline import OfflineRun

OBJECTIVES: dict[str, Any] = {
    "matching": Matching(),
    "shortcut": Shortcut(),
    "shortcut-4": Shortcut(levels=2),  # one step is four Euler steps, not the exact flow
    "split-mean-flow": SplitMeanFlow(),
    "mean-flow": MeanFlow(power=1.0),
}
STEPS = {"matching": (1, 2, 4, 10, 100)}  # the others in one
UPDATES = 40_000  # 10 000 are enough for `matching`, not for averaged velocities


def train(task: Task, out: Path, seeds: tuple[int, ...]) -> None:
    """A policy for each objective and seed."""
    for seed in seeds:
        for name, objective in OBJECTIVES.items():
            agent = BC(FLOW, objective=objective, lr=1e-3, decay_steps=UPDATES)
            settings = OfflineRun(
                data=str(out / "data.npz"), env=task.env, agent=agent, steps=UPDATES, horizon=task.horizon,
                execute=task.horizon, eval_every=UPDATES, eval_episodes=8, seed=seed, trackers=(),
            )  # fmt: skip
            run(settings, out / "onestep" / name / f"seed{seed}")


def in_steps(policy: Policy, steps: int) -> Policy:
    """The policy with another number of network evaluations per action."""
    agent = replace(policy.agent, policy=replace(policy.agent.policy, steps=steps))
    return Policy(agent, policy.spec, policy.env, policy.state)


def policies(out: Path, seed: int) -> dict[tuple[str, int], Policy]:
    found = {}
    for name in OBJECTIVES:
        policy = load(out / "onestep" / name / f"seed{seed}")
        found |= {(name, steps): in_steps(policy, steps) for steps in STEPS.get(name, (1,))}
    return found


def returns(name: str, task: Task, out: Path, seeds: tuple[int, ...], episodes: int) -> None:
    """Means over episodes, and against ten steps of the flow of the same seed."""
    rows, by_key = [], {}
    for seed in seeds:
        chosen = policies(out, seed)
        with environment(chosen["matching", 10], task.env, 32, 50_000 + seed) as env:
            for (objective, steps), policy in chosen.items():
                values = evaluate(policy.agent, policy.state, env, jr.key(seed), episodes)
                error = values.std() / episodes**0.5
                row = {"task": name, "objective": objective, "steps": steps, "seed": seed}
                found = {"return_mean": round(float(values.mean()), 2), "standard_error": round(float(error), 2)}
                rows.append(row | found)
                by_key.setdefault((objective, steps), []).append(found["return_mean"])
    write(Path(__file__).parent / "results" / f"onestep_{name}.csv", rows)
    mean = {key: np.mean(values) for key, values in by_key.items()}
    for key, value in sorted(mean.items()):
        print(f"{key[0]:16s} {key[1]:2d} steps  {value:8.1f}  x {value / mean['matching', 10]:.3f} of matching in 10")


def latency(out: Path) -> None:
    """One action chunk for one observation, dispatch included."""
    obs = np.zeros(load(out / "onestep" / "matching" / "seed0").spec.obs_dim, np.float32)
    cases = {f"{name}, {steps} steps": partial(policy, obs) for (name, steps), policy in policies(out, 0).items()}
    report(paired(cases, rounds=41, inner=20), "matching, 10 steps", "us")


def main(
    what: Literal["train", "returns", "latency"],
    task: Literal["hopper", "drawer", "sparse"],
    /,
    out: Path,
    seeds: tuple[int, ...] = (0, 1, 2),
    episodes: int = 64,
) -> None:
    """One part for one task."""
    if what == "train":
        train(TASKS[task], out / task, seeds)
    elif what == "returns":
        returns(task, TASKS[task], out / task, seeds, episodes)
    else:
        latency(out / task)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
