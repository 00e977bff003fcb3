"""Chunks under delay: success or return when inference takes 0 to 6 control steps.

    python benchmarks/delay.py train        # runs/delay/TASK-METHOD/seedN: data of a scripted expert, cloned
    python benchmarks/delay.py evaluate     # docs/data/delay.csv
    python benchmarks/delay.py picture      # docs/img/delay.png

`gap`: the point of `jax:multi-goal` heads for the obstacle in the middle, and passes it on the left or on the right.
The expert turns two steps before it and takes either side at random. Success is to be at a goal within 40 steps.
`arm`: `jax:two-way-arm` with two joints, folded to the target with its elbow on either side; the earlier the better.
`pendulum`: `jax:pendulum`, swung up by its energy, to the left or to the right, and balanced.

Chunks have 16 actions, of which max(4, delay) are carried out. The executed actions have noise (`NOISE`) that the
policy does not know, so that observations matter. `bc` is cloned as it is, `bc-delay` with a given prefix of up to 6
actions.
"""

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from common import DATA, Row, machine, read, write

from contraflow.agents.offline.bc import BC
from contraflow.core.optim import Optim
from contraflow.core.plotting import COLOURS, drawing, look
from contraflow.data.datasets import write as datasets
from contraflow.data.datasets.dataset import build
from contraflow.envs.control import Pendulum
from contraflow.envs.ways import MultiGoal, TwoWayArm
from contraflow.flow.model import Ddim, FlowSpec
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.realtime import Guidance, realtime
from contraflow.runtime.delayed import Delayed, delay_steps, latency, simulate
from contraflow.runtime.policy import Policy, load
from contraflow.training.run import Run
from contraflow.training.run import train as learn
from contraflow.training.sources import Dataset

RUNS, IMAGE = Path("runs/delay"), DATA.parent / "img" / "delay.png"
HORIZON, EXECUTE, DELAYS, COPIES = 16, 4, tuple(range(7)), 100
METHODS = {"bc": 0, "bc-delay": DELAYS[-1]}
MODES = {
    "wait": "stop and wait",
    "switch": "switch at once",
    "ensemble": "temporal ensembling",
    "resume": "RTC, guided",
    "hard": "RTC, guided, hard mask",
    "trained": "RTC, trained",
}


def gap(obs: jax.Array, side: jax.Array) -> jax.Array:
    """The action [2] of the expert at a position [2] that passes on this side (-1 or 1)."""
    way = jnp.stack([side * 0.4, -0.1])
    goal = jnp.stack([side * 1.5 * jnp.sin(jnp.pi / 9), 1.5 * jnp.cos(jnp.pi / 9) - 1.0])
    target = jnp.where(obs[1] < -0.15, way, goal)
    step = jnp.where((obs[1] < -0.45) & (jnp.abs(obs[0]) < 0.2), jnp.array([-2.0 * obs[0], 1.0]), target - obs)
    return step / jnp.sqrt(jnp.sum(step**2) + 1e-12)


def fold(obs: jax.Array, side: jax.Array) -> jax.Array:
    """The turn [2] towards an arm whose links lean to this side and back by 60 degrees: its tip is at the target."""
    goal = side * jnp.array([1.0, -2.0]) * jnp.pi / 3
    return jnp.clip((goal - obs[:2]) / 0.3, -1.0, 1.0)


def swing(obs: jax.Array, side: jax.Array) -> jax.Array:
    """The torque [1] that raises the energy of the rod, starts to this side from rest, and balances it."""
    cos, sin, speed = obs
    energy = 0.5 * speed**2 + 15.0 * (cos - 1.0)  # 0 at rest upright; angle'' = 15 sin angle + 3 torque
    pump = jnp.where(jnp.abs(speed) < 0.3, side, jnp.sign(speed)) * jnp.sign(-energy) * jnp.minimum(jnp.abs(energy), 1)
    angle = jnp.arctan2(sin, cos)
    near = (jnp.abs(angle) < 0.5) & (jnp.abs(speed) < 2.5)
    return jnp.clip(jnp.where(near, -(10.0 * angle + 2.5 * speed) / 2.0, pump), -1.0, 1.0)[None]


@dataclass(frozen=True)
class Noisy:
    """A task whose executed actions have Gaussian noise."""

    task: Any
    std: float

    @property
    def spec(self) -> Any:
        return self.task.spec

    def reset(self, key: jax.Array) -> Any:
        return self.task.reset(key)

    def step(self, state: Any, action: jax.Array) -> Any:
        noise = self.std * jr.normal(jr.fold_in(state.key, 7), action.shape)
        return self.task.step(state, jnp.clip(action, -1.0, 1.0) + noise)


NOISE = {"gap": 0.2, "arm": 0.2, "pendulum": 0.1}
TASKS: dict[str, Any] = {
    "gap": (MultiGoal, gap, 1000),
    "arm": (partial(TwoWayArm, joints=2), fold, 500),
    "pendulum": (Pendulum, swing, 200),
}


def demonstrations(name: str, path: Path) -> None:
    """One episode of each copy, with the expert's actions, before their noise."""
    kind, expert, episodes = TASKS[name]
    env = Noisy(kind(episodes), NOISE[name])
    sides = jnp.where(jr.bernoulli(jr.key(1), 0.5, (episodes,)), 1.0, -1.0)

    @jax.jit
    def play(key):
        state, obs = env.reset(key)

        def step(carry, _):
            state, obs, going = carry
            action = jax.vmap(expert)(obs, sides)
            state, out = env.step(state, action)
            row = (obs, action, out.reward, out.next_obs, out.terminated, out.terminated | out.truncated, going)
            return (state, out.obs, going & ~(out.terminated | out.truncated)), row

        return jax.lax.scan(step, (state, obs, jnp.ones(episodes, bool)), None, env.spec.episode_length)[1]

    rows = jax.tree.map(lambda x: np.asarray(x).swapaxes(0, 1), play(jr.key(0)))
    flat = [x[rows[-1]] for x in rows[:-1]]
    names = ("obs", "action", "reward", "next_obs", "terminated", "end")
    data = build(dict(zip(names, flat, strict=True)), name=name, low=-1.0, high=1.0)
    print(f"{name}: {len(data)} steps, expert's return {data.returns.mean():.1f}, success {data.terminated.sum()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.write(data, path)


@dataclass(frozen=True)
class Options:
    command: tyro.conf.Positional[str]
    tasks: tuple[str, ...] = tuple(TASKS)
    methods: tuple[str, ...] = tuple(METHODS)
    modes: tuple[str, ...] = tuple(MODES)
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 4000
    """Updates of `bc`; `bc-delay`, which learns seven cases, takes eight times as many."""
    runs: Path = RUNS
    out: Path = DATA / "delay.csv"


def train(options: Options) -> None:
    """Every task and method that has no folder yet: networks of two layers of 64."""
    for name in options.tasks:
        path = options.runs / f"{name}.npz"
        if not path.exists():
            demonstrations(name, path)
        for method in options.methods:
            folder = options.runs / f"{name}-{method}"
            if not folder.exists():
                flow = FlowSpec(solver=Ddim(10), network=ResidualMLP(64, 2, 32))
                agent = BC(flow, delay_max=METHODS[method], optim=Optim(1e-3, max_grad_norm=10.0))
                source = Dataset(str(path), "", 256, HORIZON, EXECUTE)
                steps = options.steps * (8 if METHODS[method] else 1)
                run = Run(agent, source, steps, None, steps, log_every=steps, trackers=())
                began = time.monotonic()
                for seed in options.seeds:
                    learn(replace(run, seed=seed), folder / f"seed{seed}", quiet=True)
                print(folder, f"{time.monotonic() - began:.0f} s", flush=True)


def evaluate(options: Options) -> None:
    """A row for each task, mode, seed and delay; the same episodes for all."""
    rows: list[Row] = []
    for name in options.tasks:
        for mode in options.modes:
            for seed in options.seeds:
                method = "bc-delay" if mode == "trained" else "bc"
                policy = load(options.runs / f"{name}-{method}" / f"seed{seed}", seed)
                for delay in DELAYS:
                    network = realtime(policy.network, Guidance(soft="none")) if mode == "hard" else policy.network
                    fresh = Policy(network, policy.spec, policy.env, seed)
                    loop = "resume" if mode in ("hard", "trained") else mode
                    act = Delayed(fresh, COPIES, delay, loop, EXECUTE)
                    env = Noisy(TASKS[name][0](COPIES), NOISE[name])
                    found = simulate(act, env, 100 + seed)
                    means = {
                        "success": float(found.terminated.mean()),
                        "return": float(found.returns.mean()),
                        "steps": float(found.steps.mean()),
                        "stalled": float(found.stalled.mean()),
                        "jump": float(found.jump.mean()),
                    }
                    rows.append({"task": name, "mode": mode, "seed": seed, "delay": delay} | means)
            for key in ("success", "return", "stalled", "jump"):
                mine = [r for r in rows if (r["task"], r["mode"]) == (name, mode)]
                means = [np.mean([r[key] for r in mine if r["delay"] == d]) for d in DELAYS]
                print(f"{name:9} {mode:9} {key:8}", " ".join(f"{x:8.2f}" for x in means), flush=True)
        policy = load(options.runs / f"{name}-bc" / f"seed{options.seeds[0]}")
        obs = np.zeros(policy.spec.obs_dim, np.float32)
        seconds = np.percentile(latency(policy, obs), (50, 95, 100))
        print(name, "latency p50, p95, worst", seconds, "s:", delay_steps(seconds[0], 50), "steps at 50 Hz")
    write(options.out, rows)


def picture(options: Options) -> None:
    """Success or return over the delay: the mean over seeds, and their range."""
    rows = read(options.out)
    with drawing(IMAGE, 9.0, 3.8) as figure:
        axes = figure.subplots(1, 3)
        panels = (("gap", "success", 100), ("arm", "return", 1), ("pendulum", "return", 1))
        for ax, (name, key, scale) in zip(axes, panels, strict=True):
            for i, (mode, label) in enumerate(MODES.items()):
                mine = [r for r in rows if (r["task"], r["mode"]) == (name, mode)]
                values = np.array([[scale * float(r[key]) for r in mine if r["delay"] == d] for d in DELAYS])
                ax.fill_between(DELAYS, values.min(1), values.max(1), color=COLOURS[i], alpha=0.15, lw=0)
                ax.plot(DELAYS, values.mean(1), label=label, ms=4, lw=1.6, **look(i))
            ax.set(title=name, xlabel="delay, control steps", ylabel="success, %" if key == "success" else key)
            ax.grid(alpha=0.3)
        axes[0].set_ylim(bottom=0)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    print(IMAGE.name)


def main(options: Options) -> None:
    {"train": train, "evaluate": evaluate, "picture": picture}[options.command](options)


if __name__ == "__main__":
    print(machine())
    main(tyro.cli(Options))
