"""Imitate a medium policy, then fine-tune: the runs of docs/finetuning.md, from data to table.

    python benchmarks/finetune.py data hopper --out DIR          # trains a policy half-way, records it
    python benchmarks/finetune.py imitate hopper --out DIR       # a flow and a diffusion, for every seed
    python benchmarks/finetune.py tune hopper --out DIR          # every method and seed; the same again continues
    python benchmarks/finetune.py table hopper --out DIR         # benchmarks/results/finetune.csv

Every cell is a run folder, DIR/TASK/METHOD/seedK. `--seeds` and `--methods` choose a part.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from contraflow import load
from contraflow.agents import BC, DPPO, FPO, PPO, ReinFlow
from contraflow.data.datasets.write import write
from contraflow.flow.path import VP
from contraflow.rl.flow_policy import FlowPolicy
from contraflow.runtime.collect import Behaviour, record
from contraflow.training.log import read_evaluations
from contraflow.training.offline import OfflineRun
from contraflow.training.onpolicy import OnPolicyRun
from contraflow.training.run import progress, read_config, resume, train

PASSES: dict[str, Any] = {"epochs": 10, "minibatches": 16}
REFERENCE = PPO(epochs=10, minibatches=16, critic_lr=1e-3)


@dataclass(frozen=True)
class Task:
    """`half`: environment steps of PPO before its policy is recorded; `steps`: those of every fine-tuning."""

    env: str
    steps: int
    half: int = 0
    """0 where the demonstrations are made by benchmarks/demonstrations.py, at OUT/TASK/data.npz."""
    horizon: int = 4
    episodes: int = 40
    imitation: int = 10_000
    source: str = ""
    """Environment that the recorded policy is trained on, where it is another."""


TASKS = {
    "hopper": Task("envpool:Hopper-v5", steps=600_000, half=200_000),
    "drawer": Task("envpool:MetaWorld/DrawerOpen-v3", steps=300_000),
    "sparse": Task("envpool:CartpoleSwingupSparse-v1", steps=400_000, half=300_000, source="jax:cartpole-swingup"),
}
FLOW = FlowPolicy(width=128, depth=3, steps=4)
DIFFUSION = FlowPolicy(path=VP(), predict="noise", steps=10, clip=1.0, width=128, depth=3)
TUNED = ReinFlow(steps=4, actor_lr=2e-4, clip=0.02, entropy=0.0, width=128, depth=2, **PASSES)
DENOISED = DPPO(learned=10, width=128, depth=2, **PASSES)
MATCHED = FPO(epochs=4, minibatches=16, actor_lr=5e-5, pairs=16, width=128, depth=2)

# Four settings of each, tried on the first task with a seed of their own; METHODS has the one that ended best.
TRIALS: dict[str, tuple[Any, ...]] = {
    "reinflow-4": (
        TUNED,
        replace(TUNED, clip=0.05, actor_lr=3e-4),
        replace(TUNED, ratio="sum", clip=0.2),
        replace(TUNED, std=(0.05, 0.15)),
    ),
    "dppo-10": (
        DENOISED,
        replace(DENOISED, clip=0.05, clip_first=0.05, actor_lr=3e-4),
        replace(DENOISED, ratio="sum", clip=0.1, clip_first=0.1, actor_lr=2e-4),
        replace(DENOISED, min_std=0.05),
    ),
    "fpo": (
        MATCHED,
        replace(MATCHED, epochs=10, actor_lr=2e-5),
        replace(MATCHED, weight="velocity"),
        replace(MATCHED, weight="elbo", ratio="sum", clip=0.2),
    ),
}
METHODS: dict[str, tuple[str, Any]] = {
    "reinflow-4": ("flow", TRIALS["reinflow-4"][0]),
    "reinflow-1": ("flow", replace(TRIALS["reinflow-4"][0], steps=1)),
    "dppo-10": ("diffusion", TRIALS["dppo-10"][2]),
    "fpo": ("flow", TRIALS["fpo"][3]),
    "ppo": ("", REFERENCE),  # three times as long
    "expert": ("", REFERENCE),  # three times as long, where the task has a source
}
TRIAL_STEPS, TRIAL_SEED = 300_000, 9


def finished(folder: Path) -> bool:
    return folder.exists() and progress(folder) >= read_config(folder).steps


def run(settings: Any, folder: Path) -> None:
    """Train, go on, or leave alone what is finished."""
    if finished(folder):
        return
    print(f"{folder} ...", flush=True)
    if folder.exists():
        resume(folder, quiet=True)
    else:
        train(settings, folder, quiet=True)
    if finished(folder):  # not interrupted
        print(f"{folder}: {read_evaluations(folder)[-1]['return_mean']:.1f}", flush=True)


def onpolicy(task: Task, agent: Any, seed: int, **more: Any) -> OnPolicyRun:
    """16 environments; 2 000 decisions between two updates."""
    horizon = more.pop("horizon", 1)
    settings = {"env": task.env, "steps": task.steps} | more
    return OnPolicyRun(
        agent=agent, num_envs=16, unroll=125, horizon=horizon, execute=horizon, eval_every=task.steps // 20,
        eval_episodes=8, log_every=50_000, seed=seed, trackers=(), **settings,
    )  # fmt: skip


def data(task: Task, out: Path) -> None:
    """A policy trained half-way, and a dataset of what it does, its own noise included."""
    run(onpolicy(task, REFERENCE, 100, env=task.source or task.env, steps=task.half), out / "half")
    file = out / "data.npz"
    if not file.exists():
        rows = record(load(out / "half"), task.episodes, task.env, behaviour=Behaviour(explore=True), seed=0)
        write(rows, str(file))
        print(f"{file}: {len(rows)} rows, mean return {rows.returns.mean():.1f}")


def imitate(task: Task, out: Path, seeds: tuple[int, ...]) -> None:
    """A flow and a diffusion on chunks."""
    for seed in seeds:
        for name, policy in (("flow", FLOW), ("diffusion", DIFFUSION)):
            agent = BC(policy, lr=1e-3, decay_steps=task.imitation)
            settings = OfflineRun(
                data=str(out / "data.npz"), env=task.env, agent=agent, steps=task.imitation, horizon=task.horizon,
                execute=task.horizon, eval_every=task.imitation, eval_episodes=16, seed=seed, trackers=(),
            )  # fmt: skip
            run(settings, out / name / f"seed{seed}")


def tune(task: Task, out: Path, seeds: tuple[int, ...], methods: tuple[str, ...]) -> None:
    """Every method from the imitation of the same seed; PPO from scratch."""
    for seed in seeds:
        for name in methods or METHODS:
            start, agent = METHODS[name]
            more: dict[str, Any] = {"steps": 3 * task.steps}
            if name == "expert":
                if not task.source:
                    continue
                more["env"] = task.source
            if start:
                more = {"pretrained": str(out / start / f"seed{seed}"), "horizon": task.horizon}
            run(onpolicy(task, agent, seed, **more), out / name / f"seed{seed}")


def trials(task: Task, out: Path, methods: tuple[str, ...]) -> None:
    """The settings that METHODS were chosen from."""
    imitate(task, out, (TRIAL_SEED,))
    for name in methods or TRIALS:
        start = out / METHODS[name][0] / f"seed{TRIAL_SEED}"
        for number, agent in enumerate(TRIALS[name]):
            settings = onpolicy(task, agent, TRIAL_SEED, steps=TRIAL_STEPS, pretrained=str(start), horizon=task.horizon)
            run(settings, out / "trials" / name / f"{number}")


def main(
    what: Literal["data", "imitate", "trials", "tune"],
    task: Literal["hopper", "drawer", "sparse"],
    /,
    out: Path,
    seeds: tuple[int, ...] = (0, 1, 2),
    methods: tuple[str, ...] = (),
) -> None:
    """One stage of one task."""
    chosen, folder = TASKS[task], out / task
    folder.mkdir(parents=True, exist_ok=True)
    if what == "data":
        data(chosen, folder)
    elif what == "imitate":
        imitate(chosen, folder, seeds)
    elif what == "trials":
        trials(chosen, folder, methods)
    else:
        tune(chosen, folder, seeds, methods)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
