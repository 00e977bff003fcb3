"""Imitate a medium policy, then fine-tune: the runs of docs/background/finetuning-results.md, from data to table.

    python benchmarks/finetune.py data hopper --out DIR          # trains a policy half-way, records it
    python benchmarks/finetune.py imitate hopper --out DIR       # a flow and a diffusion, for every seed
    python benchmarks/finetune.py tune hopper --out DIR          # every method and seed; the same again continues
    python benchmarks/finetune.py table hopper --out DIR         # docs/data/finetune_hopper.csv, 64 fresh episodes each

Every cell is a run folder, DIR/TASK/METHOD/seedK. `--seeds` and `--methods` choose a part; `--scale` multiplies all
numbers of steps and episodes. The table reports R, the mean return of a run's last policy, and its way,
(R - R_BC) / (R_ref - R_BC): R_BC is that of the imitation it started from, R_ref that of the best policies of PPO in
three times the steps or, if that is better, of who gave the demonstrations.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax.random as jr
import numpy as np
import tyro
from common import DATA, write

from contraflow import load
from contraflow.agents import presets
from contraflow.data.datasets.write import write as write_data
from contraflow.flow.model import Ddim, FlowSpec
from contraflow.nets.velocity import ResidualMLP
from contraflow.runtime.collect import Behaviour, record
from contraflow.runtime.variants import environment
from contraflow.training.evaluate import evaluate
from contraflow.training.log import read_evaluations
from contraflow.training.run import Run, progress, read_config, resume, train
from contraflow.training.sources import Dataset, Rollouts

NETWORK = ResidualMLP(128, 3, 32)
BC, PPO, REINFLOW, DPPO, FPO = (presets()[name].agent for name in ("bc", "ppo", "reinflow", "dppo", "fpo"))
FLOW = FlowSpec(solver=Ddim(4), network=NETWORK)
DIFFUSION = replace(DPPO.flow, solver=Ddim(10), network=NETWORK)


def passes(agent: Any, epochs: int, lr: float, **more: Any) -> Any:
    """The agent with a critic of 128 x 2, 16 minibatches and its own other settings."""
    ppo = replace(agent.ppo, epochs=epochs, minibatches=16, critic=replace(agent.ppo.critic, width=128, depth=2))
    return replace(agent, ppo=replace(ppo, actor_optim=replace(ppo.actor_optim, lr=lr)), **more)


REFERENCE = replace(PPO, ppo=replace(PPO.ppo, minibatches=16, critic_optim=replace(PPO.ppo.critic_optim, lr=1e-3)))
TUNED = passes(REINFLOW, 10, 2e-4, clip=0.02, entropy=0.0)
# The settings of each method that ended best of four that were tried on Hopper (docs/data/finetune_trials.csv).
METHODS: dict[str, tuple[str, Any]] = {
    "reinflow-4": ("flow", TUNED),
    "reinflow-1": ("flow", replace(TUNED, steps=1)),
    "dppo-10": ("diffusion", passes(DPPO, 10, 2e-4, learned=10, ratio="sum", clip=0.1, clip_first=0.1)),
    "fpo": ("flow", passes(FPO, 4, 5e-5, pairs=16, weight="elbo", ratio="sum", clip=0.2)),
    "ppo": ("", REFERENCE),  # three times as long
}


@dataclass(frozen=True)
class Task:
    """`half`: environment steps of PPO before its policy is recorded; `steps`: those of every fine-tuning."""

    env: str
    steps: int
    half: int = 0
    """0 where the demonstrations come from elsewhere, as OUT/TASK/data.npz."""
    source: str = ""
    """Environment that the recorded policy is trained on, where it is another."""
    horizon: int = 4
    episodes: int = 40
    imitation: int = 10_000
    judged: int = 64

    def scaled(self, factor: float) -> "Task":
        """With all numbers of steps and episodes multiplied."""
        of = lambda n: max(1, round(n * factor))
        counts = {name: of(getattr(self, name)) for name in ("steps", "episodes", "imitation", "judged")}
        return replace(self, half=of(self.half) if self.half else 0, **counts)


TASKS = {
    "hopper": Task("envpool:Hopper-v5", steps=600_000, half=200_000),
    "drawer": Task("envpool:MetaWorld/DrawerOpen-v3", steps=300_000),
    "sparse": Task("envpool:CartpoleSwingupSparse-v1", steps=400_000, half=300_000, source="jax:cartpole-swingup"),
}


def finished(folder: Path) -> bool:
    return folder.exists() and progress(folder) >= read_config(folder).steps


def run(settings: Run, folder: Path) -> None:
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


def onpolicy(task: Task, agent: Any, seed: int, steps: int, env: str, pretrained: str | None = None) -> Run:
    """16 environments; 2 000 decisions between two updates, of chunks where the policy has them."""
    chunk = task.horizon if pretrained else 1
    return Run(
        agent, Rollouts(env, 16, 125, chunk, chunk), steps, pretrained, eval_every=max(1, task.steps // 20),
        eval_episodes=8, log_every=max(1, task.steps // 12), seed=seed, trackers=(),
    )  # fmt: skip


def data(task: Task, out: Path) -> None:
    """A policy trained half-way, and a dataset of what it does, its own noise included."""
    run(onpolicy(task, REFERENCE, 100, task.half, task.source or task.env), out / "half")
    file = out / "data.npz"
    if not file.exists():
        rows = record(load(out / "half"), task.episodes, task.env, behaviour=Behaviour(explore=True), seed=0)
        write_data(rows, str(file))
        print(f"{file}: {len(rows)} rows, mean return {rows.returns.mean():.1f}")


def imitate(task: Task, out: Path, seeds: tuple[int, ...]) -> None:
    """A flow and a diffusion on chunks."""
    source = Dataset(str(out / "data.npz"), task.env, horizon=task.horizon, execute=task.horizon)
    optim = replace(BC.optim, lr=1e-3, decay_steps=task.imitation)
    for seed in seeds:
        for name, flow in (("flow", FLOW), ("diffusion", DIFFUSION)):
            often = {"eval_every": task.imitation, "eval_episodes": 16, "trackers": ()}
            agent = replace(BC, flow=flow, optim=optim)
            run(Run(agent, source, task.imitation, seed=seed, **often), out / name / f"seed{seed}")


def tune(task: Task, out: Path, seeds: tuple[int, ...], methods: tuple[str, ...]) -> None:
    """Every method from the imitation of the same seed; PPO from scratch, and on the source's task too."""
    for seed in seeds:
        for name in methods or METHODS:
            start, agent = METHODS[name]
            pretrained = str(out / start / f"seed{seed}") if start else None
            steps = task.steps if start else 3 * task.steps
            run(onpolicy(task, agent, seed, steps, task.env, pretrained), out / name / f"seed{seed}")
    if task.source and not methods:
        run(onpolicy(task, REFERENCE, 0, 3 * task.steps, task.source), out / "expert" / "seed0")


def table(name: str, task: Task, out: Path, seeds: tuple[int, ...], to: Path) -> None:
    """Returns of all that is finished, on the same fresh episodes, and the ways."""
    found: dict[tuple[str, int], np.ndarray] = {}

    def judge(label: str, folder: Path, seed: int) -> None:
        if folder.exists():
            policy = load(folder)
            with environment(policy, task.env, 32, 888) as env:
                found[label, seed] = evaluate(policy.network, env, jr.key(seed), task.judged)

    for seed in seeds:
        for label in ("flow", "diffusion", *METHODS):
            if finished(out / label / f"seed{seed}"):
                judge(label, out / label / f"seed{seed}", seed)
        judge("best ppo", out / "ppo" / f"seed{seed}" / "best", seed)
    judge("demonstrator", out / "expert" / "seed0" / "best" if task.source else out / "half", 0)
    rows = [
        {"task": name, "policy": label, "seed": seed, "return_mean": round(float(x.mean()), 2)}
        | {"standard_error": round(float(x.std() / len(x) ** 0.5), 2)}
        for (label, seed), x in found.items()
    ]
    write(to / f"finetune_{name}.csv", rows)
    best = [np.mean([x.mean() for (label, _), x in found.items() if label == k]) for k in ("best ppo", "demonstrator")]
    reference = np.nanmax(best)
    print(f"{name}: reference {reference:.1f} (best of PPO {best[0]:.1f}, demonstrator {best[1]:.1f})")
    for label, (start, _) in METHODS.items():
        mine = [seed for seed in seeds if (label, seed) in found]
        after = np.array([found[label, seed].mean() for seed in mine])
        before = np.array([found[start, seed].mean() if start else 0.0 for seed in mine])
        way = (after - before) / (reference - before)
        if mine:
            each = ", ".join(f"{x:.0f}" for x in after)
            spread = f"way {way.mean():.2f} ({way.min():.2f} to {way.max():.2f})"
            print(f"{label:12s} {before.mean():7.1f} -> {after.mean():7.1f} ({each})  {spread}")


def main(
    what: Literal["data", "imitate", "tune", "table"],
    name: Literal["hopper", "drawer", "sparse"],
    /,
    out: Path,
    seeds: tuple[int, ...] = (0, 1, 2),
    methods: tuple[str, ...] = (),
    scale: float = 1.0,
) -> None:
    """One stage of one task."""
    task, folder = TASKS[name].scaled(scale), out / name
    folder.mkdir(parents=True, exist_ok=True)
    if what == "data":
        data(task, folder)
    elif what == "imitate":
        imitate(task, folder, seeds)
    elif what == "tune":
        tune(task, folder, seeds, methods)
    else:
        table(name, task, folder, seeds, DATA if scale == 1.0 else out)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
