"""False alarms and detected faults of a monitor (runtime/monitor.py), on two cloned policies in JAX.

    python benchmarks/monitor.py          # docs/data/monitor.csv, docs/img/monitor.png; about four minutes

Policies are cloned from scripted experts with noise: a point that runs to one of four goals (chunks of 4, 2 carried
out), and a pendulum that is swung up. An episode is good if the goal is reached, or if the rod is upright at the end.
A monitor learns from 200 episodes, with delta = .1, and is tested on 500 new good ones and on 200 with each fault. It
begins a third into the episode: a shift of the sensors, a motor with less gain, a push. Detection is counted among
episodes that the fault spoils, and the lead is the number of decisions from the first alarm to the end.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from common import DATA, Row, machine, write

from contraflow.core.plotting import COLOURS, drawing
from contraflow.core.types import EnvSpec
from contraflow.data.datasets.dataset import build
from contraflow.data.datasets.write import write as write_data
from contraflow.envs.chunk import chunked
from contraflow.envs.control import Pendulum
from contraflow.envs.ways import DIRECTIONS, GOALS, MultiGoal
from contraflow.experiments.bridge import with_networks
from contraflow.presets import preset_run
from contraflow.runtime.monitor import Traces, alarms, calibrate, measured, trace, window_sums
from contraflow.runtime.policy import load
from contraflow.training.run import train

DELTA, SEEDS, EPISODES, GOOD, SPOILED, LEARN = 0.1, (0, 1, 2), 600, 500, 200, 200


def runner(obs, choice):
    """An expert that goes past the obstacle on the side of its goal, chosen at the start."""
    goal = jnp.asarray(GOALS)[choice]
    side = jnp.sign(jnp.sin(jnp.asarray(DIRECTIONS)[choice]))
    through = jnp.where(obs[1] < -0.1, jnp.stack([0.5 * side, 0.0]), goal)
    gap = through - obs
    return jnp.clip(gap / jnp.maximum(jnp.linalg.norm(gap), 0.1), -1, 1)


def swinger(obs, choice):
    """Energy pumping, and a linear controller near the top."""
    angle, speed = jnp.arctan2(obs[1], obs[0]), obs[2]
    energy = 0.5 * speed**2 + 15.0 * obs[0]
    pump = jnp.clip((15.0 - energy) * jnp.sign(speed + 1e-3), -1, 1)
    return jnp.where(jnp.abs(angle) < 0.4, jnp.clip(-(8.0 * angle + 1.6 * speed), -1, 1), pump)[None]


@dataclass(frozen=True)
class Case:
    env: Any
    expert: Any
    horizon: int
    execute: int
    shift: tuple[float, ...]
    gain: float
    push: tuple[float, ...]
    choices: int


CASES = {
    "multi-goal": Case(MultiGoal(), runner, 4, 2, (0.25, -0.15), 0.15, (-0.6, 0.5), 4),
    "pendulum": Case(Pendulum(), swinger, 2, 1, (0.5, 0.5, 0.0), 0.15, (1.5, 4.0), 1),
}


@dataclass(frozen=True)
class Faulty:
    """A task whose sensors, motor or body are disturbed from a step on."""

    env: Any
    fault: str
    size: Any
    since: int

    @property
    def spec(self) -> EnvSpec:
        return self.env.spec

    def reset(self, key):
        return self.env.reset(key)

    def step(self, state, action):
        late, now = state.age >= self.since, state.age == self.since
        if self.fault == "gain":
            action = jnp.where(late[:, None], self.size * action, action)
        if self.fault == "push":
            state = replace(state, body=jnp.where(now[:, None], state.body + jnp.asarray(self.size), state.body))
        state, after = self.env.step(state, action)
        if self.fault == "shift":
            off = jnp.where((state.age >= self.since)[:, None], jnp.asarray(self.size), 0.0)
            after = replace(after, obs=after.obs + off, next_obs=after.next_obs + off)
        return state, after


def demonstrations(case: Case, file: Path) -> None:
    """Writes 300 episodes of the expert, with noise on its actions."""
    env = replace(case.env, num_envs=300)
    state, obs = env.reset(jr.key(7))
    choice = jr.randint(jr.key(8), (300,), 0, case.choices)
    rows, running = [], np.ones(300, bool)
    step = jax.jit(env.step)
    for i in range(env.spec.episode_length):
        action = jax.vmap(case.expert)(obs, choice)
        action = jnp.clip(action + 0.15 * jr.normal(jr.fold_in(jr.key(9), i), action.shape), -1, 1)
        state, after = step(state, action)
        end = np.asarray(after.terminated | after.truncated)
        rows.append((obs, action, after.next_obs, after.terminated, end, running.copy()))
        running &= ~end
        obs = after.obs
    stacked = [np.moveaxis(np.stack(column), 0, 1) for column in zip(*rows, strict=True)]
    alive = stacked[-1]
    names = ("obs", "action", "next_obs", "terminated", "end")
    columns = {name: column[alive] for name, column in zip(names, stacked, strict=False)}
    columns["reward"] = np.zeros(len(columns["end"]))
    write_data(build(columns, name="expert", low=-1.0, high=1.0), file)


def clone(case: Case, folder: Path) -> Any:
    """Trains the policy."""
    demonstrations(case, folder / "demos.npz")
    run = preset_run("bc")
    source = replace(run.source, data=str(folder / "demos.npz"), horizon=case.horizon, execute=case.execute)
    agent = with_networks(run.agent, {"width": 128, "depth": 2})
    train(replace(run, agent=agent, source=source, steps=6000, eval_every=6000, trackers=()), folder / "bc", quiet=True)
    return load(folder / "bc")


def well(name: str, found: Traces) -> np.ndarray:
    """Whether each episode is good."""
    if name == "multi-goal":
        return found.running.sum(0) < len(found.running)  # ended before the limit
    return found.obs[-20:, :, 0].mean(0) > 0.9


def measure(name: str, case: Case, policy: Any, seed: int) -> tuple[list[Row], Any]:
    """A row for the false alarms of good episodes, and one for each fault."""

    def play(n: int, key: jax.Array, fault: str = "") -> Traces:
        env = replace(case.env, num_envs=n)
        if fault:
            env = Faulty(
                env, fault, getattr(case, fault), case.env.spec.episode_length // (3 if name == "pendulum" else 6)
            )
        return trace(policy.network, policy.spec, chunked(env, case.horizon, case.execute), key)

    keys = jr.split(jr.key(seed), 6)
    learned = play(EPISODES // 2, keys[0])
    kept = learned.select(np.flatnonzero(well(name, learned))[:LEARN])
    watches = {rule: calibrate(kept, policy.spec.observation, keys[1], DELTA, rule=rule) for rule in ("both", "either")}
    found = play(EPISODES + 200, keys[2])
    curves = {"good": found.select(np.flatnonzero(well(name, found))[:GOOD])}
    for fault, key in zip(("shift", "gain", "push"), keys[3:], strict=True):
        found = play(SPOILED, key, fault)
        # A shifted sensor reports a wrong state, so whether the episode is good is seen from its length or return.
        spoiled = ~well(name, found) if fault != "shift" else np.ones(SPOILED, bool)
        bad = found.select(spoiled)
        curves[fault] = bad
    rows = []
    for rule, watch in watches.items():
        for case_name, found in curves.items():
            if not found.obs.shape[1]:
                print(f"{name}: no episode is spoiled by {case_name}")
                continue
            raised, first = alarms(watch, found)
            lead = (found.running.sum(0) - first)[raised]
            rows.append(
                {"task": name, "seed": seed, "rule": rule, "case": case_name, "episodes": len(raised),
                 "alarms": float(raised.mean()), "lead": float(np.median(lead)) if raised.any() else float("nan")}
            )  # fmt: skip
            print(rows[-1], flush=True)
    return rows, (watches["either"], curves)


def picture(kept: dict[str, Any]) -> None:
    """Both scores of each episode at the step where the larger one is largest: an alarm is beyond one of the lines."""
    with drawing(DATA.parent / "img" / "monitor.png", 8.0, 3.6) as figure:
        axes = figure.subplots(1, len(kept))
        for ax, (name, (watch, curves)) in zip(axes, kept.items(), strict=True):
            for (case, found), colour in zip(curves.items(), COLOURS, strict=False):
                sums = [window_sums(s, watch.window) for s in measured(watch.novelty, watch.cell, found)]
                ratio = [
                    np.where(found.running, s / t, 0.0) for s, t in zip(sums, np.asarray(watch.thresholds), strict=True)
                ]
                at = np.maximum(*ratio).argmax(0)
                points = [np.maximum(r[at, np.arange(r.shape[1])], 1e-2)[:150] for r in ratio]
                ax.plot(*points, ".", ms=4, color=colour, label=case, alpha=0.7)
            ax.axvline(1, color="0.4", lw=0.8)
            ax.axhline(1, color="0.4", lw=0.8)
            ax.set(xscale="log", title=name, xlabel="novelty over its threshold")
        axes[0].set_ylabel("entropy over its threshold")
        axes[-1].legend()


def main() -> None:
    print(machine())
    rows, kept = [], {}
    for name, case in CASES.items():
        with TemporaryDirectory() as folder:
            policy = clone(case, Path(folder))
            for seed in SEEDS:
                more, shown = measure(name, case, policy, seed)
                rows += more
                kept.setdefault(name, shown)
    write(DATA / "monitor.csv", rows, ("task", "seed", "rule", "case", "episodes", "alarms", "lead"))
    picture(kept)


if __name__ == "__main__":
    main()
