"""Offline methods on OGBench's tasks, and the time of their updates beside the official code.

    contraflow data make ogbench:scene-play --rows 200000 --out DIR/scene-play.npz     # for each data set of PLAN
    python benchmarks/offline.py train --data DIR --tasks scene --methods ifql         # docs/data/offline.csv
    python benchmarks/offline.py online --data DIR --seeds 0 1                         # docs/data/offline_online.csv
    python benchmarks/offline.py table                                                 # means over seeds
    python benchmarks/offline.py picture                                               # docs/img/offline.png
    python benchmarks/offline.py speed --peer module:function                          # docs/data/offline_speed.csv

One run is one process of one thread; networks have two layers of 256, batches 256 rows, rates are 3e-4. Each evaluation
plays 50 episodes. `--peer`: see benchmarks/speed.py.
"""

import os
import sys

if {"train", "online"} & set(sys.argv):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from common import DATA, machine, peer, read, write
from timing import paired, report

from contraflow.agents import presets
from contraflow.core.plotting import drawing, look
from contraflow.core.types import Batch, EnvSpec
from contraflow.experiments.bridge import with_networks
from contraflow.training.log import read_evaluations
from contraflow.training.run import Run, train
from contraflow.training.sources import Dataset, OfflineToOnline


@dataclass(frozen=True)
class Task:
    """A task of OGBench: its data, its environment, which rewards are learned from, actions per chunk."""

    data: str
    env: str
    reward: str
    horizon: int


TASKS = {
    "scene": Task("scene-play", "ogbench:scene-play-singletask-task1-v0", "sparse", 5),
    "cube": Task("cube-single-play", "ogbench:cube-single-play-singletask-task1-v0", "dense", 1),
    "cube-chunks": Task("cube-single-play", "ogbench:cube-single-play-singletask-task1-v0", "sparse", 5),
    "puzzle": Task("puzzle-3x3-play", "ogbench:puzzle-3x3-play-singletask-task1-v0", "sparse", 5),
}
UPDATES = {
    "bc": 20_000, "ifql": 40_000, "fql": 30_000, "qc": 15_000, "qam-e": 15_000, "rebrac": 40_000, "rql": 25_000
}  # fmt: skip
"""So that a run takes 5 to 14 minutes of one core."""
ONLINE = {"fql": 30_000, "qam-e": 20_000}
"""Gradient steps on the data before the first step of the environment."""
PLAN = {
    "scene": ("bc", "ifql", "fql", "qc", "qam-e"),
    "cube": ("bc", "ifql", "fql", "rebrac", "rql"),
    "cube-chunks": ("bc", "ifql", "qc"),
    "puzzle": ("bc", "ifql", "qc", "fql"),
}
SIZE, OBS, ACT, ROWS = {"width": 256, "depth": 2}, 28, 5, 256


def agent_of(name: str, width: int = 256, depth: int = 2) -> Any:
    """The preset with networks of this size; `qc` with 8 candidates, as the targets of 32 would take an hour."""
    agent = presets()[name].agent
    size: dict[str, Any] = {"width": width, "depth": depth}
    if hasattr(agent, "critic"):
        size["critic"] = replace(agent.critic, **size)
    agent = with_networks(agent, size)
    return replace(agent, particles=8) if name == "qc" else agent


@dataclass(frozen=True)
class Options:
    command: tyro.conf.Positional[str]
    data: Path = Path("runs/data")
    tasks: tuple[str, ...] = tuple(TASKS)
    methods: tuple[str, ...] = tuple(UPDATES)
    seeds: tuple[int, ...] = (0, 1, 2)
    shift: float = 0.0
    """Added to every reward."""
    runs: Path = Path("runs/offline")
    out: Path = DATA / "offline.csv"
    peer: str | None = None
    rounds: int = 15


def learn(options: Options) -> None:
    """Every run of the plan; a row for each evaluation."""
    for seed in options.seeds:
        for name in options.tasks:
            for method in (m for m in PLAN[name] if m in options.methods):
                task, updates = TASKS[name], UPDATES[method]
                rewards = {"reward": task.reward, "reward_shift": options.shift} if method != "bc" else {}
                source = Dataset(file_of(task, options), task.env, ROWS, task.horizon, task.horizon, **rewards)
                perform(options, options.out, source, updates, -(-updates // 3), name, method, seed)


def online(options: Options) -> None:
    """On `scene`, 50 000 steps of the environment after the data, two updates for each chunk of five."""
    for seed in options.seeds:
        for method in (m for m in ONLINE if m in options.methods):
            task, before = TASKS["scene"], ONLINE[method]
            source = OfflineToOnline(
                file_of(task, options),
                task.env,
                before,
                updates=2,
                batch_size=ROWS,
                horizon=task.horizon,
                reward=task.reward,
            )
            perform(options, DATA / "offline_online.csv", source, before + 50_000, 10_000, "scene", method, seed)


def file_of(task: Task, options: Options) -> str:
    return str(options.data / f"{task.data}.npz")


def perform(options: Options, out: Path, source: Any, steps: int, every: int, name: str, method: str, seed: int):
    """One run, unless its rows are there."""
    if (name, method, seed, options.shift) in {(r["task"], r["method"], r["seed"], r["shift"]) for r in read(out)}:
        return
    run = Run(agent_of(method), source, steps, None, every, 50, steps // 30, seed=seed, trackers=())
    folder = options.runs / out.stem / f"{name}-{method}-{options.shift:g}" / f"seed{seed}"
    began = time.process_time()
    train(run, folder, quiet=True)
    seconds = time.process_time() - began
    key = {"task": name, "method": method, "seed": seed, "shift": options.shift}
    rows = [
        key | {"updates": row["step"], "success": row["success"], "return": row["return_mean"], "cpu s": seconds}
        for row in read_evaluations(folder)
    ]
    write(out, rows, mode="a")
    print(name, method, seed, [f"{row['success']:.2f}" for row in rows], f"{seconds:.0f} s", flush=True)


def table(options: Options) -> None:
    """Success of the last policies: mean over seeds, lowest and highest."""
    rows = read(options.out)
    for name in TASKS:
        for method in PLAN[name]:
            mine = [r for r in rows if (r["task"], r["method"], r["shift"]) == (name, method, options.shift)]
            last = list({row["seed"]: row for row in sorted(mine, key=lambda row: row["updates"])}.values())
            if found := [100 * row["success"] for row in last]:
                low, high, cpu = min(found), max(found), np.mean([row["cpu s"] for row in last])
                spread = f"{np.mean(found):5.1f} %  ({low:.0f} to {high:.0f}, {len(found)} seeds)"
                print(f"{name:7} {method:7} {last[0]['updates']:6.0f} updates  {spread}  {cpu:.0f} s")


def picture(options: Options) -> None:
    """Success over updates, a panel for each task: the mean over seeds, and a thin line for each."""
    rows = [row for row in read(options.out) if row["shift"] == options.shift]
    with drawing(DATA.parent / "img" / "offline.png", 9.0, 3.2) as figure:
        shown = [name for name in TASKS if any(row["task"] == name for row in rows)]
        axes = figure.subplots(1, len(shown), sharey=True)
        for ax, name in zip(axes, shown, strict=True):
            for i, method in enumerate(UPDATES):
                mine = [row for row in rows if (row["task"], row["method"]) == (name, method)]
                if not mine:
                    continue
                line = look(i)
                curves = []
                for seed in sorted({row["seed"] for row in mine}):
                    points = sorted((row["updates"], 100 * row["success"]) for row in mine if row["seed"] == seed)
                    curves.append({round(step / 1000): value for step, value in points})  # the last two fall together
                for curve in curves if len(curves) > 1 else []:
                    ax.plot(list(curve), list(curve.values()), linewidth=0.6, alpha=0.5, **(line | {"marker": ""}))
                mean = np.mean([list(curve.values()) for curve in curves], axis=0)
                ax.plot(list(curves[0]), mean, label=method, ms=3, clip_on=False, **line)
            ax.set(
                title=f"{TASKS[name].data}, chunks of {TASKS[name].horizon}", xlabel="thousand updates", xlim=(0, 42)
            )
            ax.set_ylim(0, 100)
            ax.legend()
        axes[0].set_ylabel("success, %")


def with_flow(part: Any, depth: int) -> Any:
    """The agent whose flow has `depth` blocks, hence depth + 1 hidden layers, in place of its own number."""
    if hasattr(part, "flow"):
        return replace(part, flow=replace(part.flow, network=replace(part.flow.network, depth=depth)))
    return replace(part, actor=with_flow(part.actor, depth))


def updater(agent: Any, horizon: int) -> Callable[[], object]:
    """One jitted, donated update for each call."""
    spec, k = EnvSpec(OBS, ACT * horizon, 1, None, False, horizon=horizon, execute=horizon), jr.split(jr.key(0), 5)
    state = [jax.jit(lambda key: agent.init(key, spec))(k[0])]
    action = jr.uniform(k[1], (ROWS, ACT * horizon), minval=-1.0)
    obs, following = jr.normal(k[2], (ROWS, OBS)), jr.normal(k[3], (ROWS, OBS))
    rows = Batch(obs, action, jr.uniform(k[4], (ROWS,)), jnp.full(ROWS, 0.99), following, jnp.ones_like(action))
    step = jax.jit(agent.update, donate_argnums=0)

    def call():
        state[0], metrics = step(state[0], rows, jr.key(2))
        return metrics

    return call


def speed(options: Options) -> None:
    """An update of FQL, IFQL and QAM in turn with the official code: same sizes, two critics."""
    rows = []
    for width, depth in ((256, 2), (512, 4)):
        for name, horizon in (("fql", 1), ("ifql", 1), ("fql", 5), ("qam", 5)):
            agent = agent_of(name, width, depth)
            agent = with_flow(replace(agent, critic=replace(agent.critic, members=2)), depth - 1)
            sizes = {"obs": OBS, "act": ACT, "rows": ROWS, "width": width, "depth": depth, "horizon": horizon}
            others = peer(options.peer, name, **sizes)
            print(f"{name}, {depth} x {width}, chunks of {horizon}", flush=True)
            ours = f"contraflow {name}"
            found = report(paired({ours: updater(agent, horizon)} | others, options.rounds), next(iter(others), ours))
            rows += [
                {"method": case, "width": width, "depth": depth, "horizon": horizon, "ms": ms, "ratio": ratio}
                for case, ms, ratio in found
            ]
    write(DATA / "offline_speed.csv", rows)


if __name__ == "__main__":
    options = tyro.cli(Options)
    print(machine())
    {"train": learn, "online": online, "table": table, "picture": picture, "speed": speed}[options.command](options)
