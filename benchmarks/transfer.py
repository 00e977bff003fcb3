"""Cloned policies that are guided, and on robots with changed sensors or motors. Three seeds, width 64.

    python benchmarks/transfer.py guidance    # docs/data/guidance.csv: goals and constraints against their weight
    python benchmarks/transfer.py sensors     # docs/data/transfer_sensors.csv: KL guided adaptation
    python benchmarks/transfer.py motors      # docs/data/transfer_motors.csv: action flow matching, and fine-tuning

The tasks and experts are those of monitor.py: a point that runs to one of four goals, and a pendulum. For guidance the
clone takes all four ways, in chunks of four; elsewhere it takes one, an action at a time.
"""

import sys
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from common import DATA, Row, machine, write
from monitor import CASES, demonstrations

from contraflow.core.optim import Optim
from contraflow.core.types import EnvSpec
from contraflow.envs.chunk import chunked
from contraflow.envs.ways import GOALS
from contraflow.experiments.bridge import with_networks
from contraflow.policy.best_of import chosen
from contraflow.policy.guided import guided
from contraflow.policy.value import Plain
from contraflow.presets import preset_run
from contraflow.runtime.action_flow import inverse_model, transformed
from contraflow.runtime.adapt import adapted
from contraflow.runtime.policy import load
from contraflow.training.run import Run, train
from contraflow.training.sources import Dataset

SEEDS, EPISODES = (0, 1, 2), 400
FOLDER = Path("runs/transfer")


@dataclass(frozen=True)
class Changed:
    """A task whose sensors show G o + b, and whose motors do K a of an action a, after a dead zone."""

    env: Any
    sensors: tuple[tuple[float, ...], ...] = ()
    offset: tuple[float, ...] = ()
    motors: tuple[tuple[float, ...], ...] = ()

    @property
    def spec(self) -> EnvSpec:
        return self.env.spec

    def see(self, obs):
        return obs @ jnp.asarray(self.sensors).T + jnp.asarray(self.offset)[None] if self.sensors else obs

    def reset(self, key):
        state, obs = self.env.reset(key)
        return state, self.see(obs)

    def step(self, state, action):
        action = jnp.clip(action, -1.0, 1.0)
        state, after = self.env.step(state, action @ jnp.asarray(self.motors).T if self.motors else action)
        return state, replace(after, obs=self.see(after.obs), next_obs=self.see(after.next_obs))


def turned(degrees: float, gain: float = 1.0) -> tuple[tuple[float, ...], ...]:
    c, s = (gain * float(f(np.radians(degrees))) for f in (np.cos, np.sin))
    return ((c, -s), (s, c))


SENSORS = {
    "multi-goal": (turned(20.0, 0.9), (0.2, -0.15)),
    "pendulum": ((*((*row, 0.0) for row in turned(20.0)), (0.0, 0.0, 0.6)), (0.0, 0.0, 0.5)),
}
MOTORS = {"multi-goal": turned(60.0, 0.7), "pendulum": ((-0.8,),)}


def multi_goal(num_envs: int, seed: int) -> Changed:
    return Changed(replace(CASES["multi-goal"].env, num_envs=num_envs), motors=MOTORS["multi-goal"])


def pendulum(num_envs: int, seed: int) -> Changed:
    return Changed(replace(CASES["pendulum"].env, num_envs=num_envs), motors=MOTORS["pendulum"])


@cache
def data(name: str, ways: int = 1) -> tuple[Path, dict[str, Any]]:
    """Demonstrations on the old robot: the file, and its arrays."""
    file = FOLDER / f"{name}{ways}.npz"
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        demonstrations(replace(CASES[name], choices=ways), file)
    return file, dict(np.load(file))


def clone(name: str, seed: int, ways: int = 1) -> Path:
    """A policy of the old robot."""
    folder = FOLDER / f"{name}{ways}-{seed}"
    if folder.exists():
        return folder
    run = preset_run("bc")
    agent = replace(with_networks(run.agent, {"width": 64, "depth": 2}), optim=Optim(1e-3), ema=0.995)
    chunks = (4, 2) if ways > 1 else (1, 1)
    source = Dataset(str(data(name, ways)[0]), "", 256, *chunks)
    train(Run(agent, source, 5000, None, 5000, log_every=5000, seed=seed, trackers=()), folder, quiet=True)
    return folder


@partial(jax.jit, static_argnums=(0, 3))
def rolled(env: Any, policy: Any, key: Any, explore: bool) -> Any:
    """One episode of every copy: (whether it ran, reward, terminated, obs, action, next_obs), [T, N, ...]."""
    k_reset, k_act = jr.split(key)
    state, obs = env.reset(k_reset)
    n = env.spec.num_envs

    def step(carry, i):
        state, obs, running = carry
        keys = jr.split(jr.fold_in(k_act, i), n)
        action = jax.vmap(policy)(obs, keys)
        if explore:
            k_drawn, k_which = jr.split(jr.fold_in(k_act, i + 10_000))
            drawn = jr.uniform(k_drawn, action.shape, minval=-1.0)
            action = jnp.where(jr.bernoulli(k_which, 0.5, (n, 1)), drawn, action)
        state, after = env.step(state, action)
        row = running, after.reward, after.terminated, obs, action, after.next_obs
        return (state, after.obs, running & ~(after.terminated | after.truncated)), row

    return jax.lax.scan(step, (state, obs, jnp.ones(n, bool)), jnp.arange(env.spec.episode_length))[1]


def score(name: str, env: Any, policy: Any, seed: int) -> float:
    """Share of episodes that reach a goal, or the mean return of the pendulum."""
    running, reward, terminated, *_ = rolled(env, policy, jr.key(100 + seed), False)
    if name == "multi-goal":
        return float((running & terminated).any(0).mean())
    return float((running * reward).sum(0).mean())


def observed(env: Any, policy: Any, key: Any) -> Any:
    """Observations of its episodes."""
    running, _, _, obs, *_ = rolled(env, policy, key, False)
    return obs[running]


# values of (action, observation), large where actions are good: the point moves by a tenth of its action


def right_side(chunk, obs):
    """A constraint: to the right of x = .1 after each action."""
    x = obs[0] + 0.1 * jnp.cumsum(chunk[:, 0])
    return -50.0 * jnp.sum(jnp.maximum(0.1 - x, 0.0) ** 2)


def far_right(chunk, obs):
    """A goal: the last of the four."""
    return -10.0 * jnp.linalg.norm(obs + 0.1 * chunk.sum(0) - jnp.asarray(GOALS)[3])


def guidance() -> None:
    """What weights and numbers of candidates do to a clone that takes all four ways."""
    rows: list[Row] = []
    env = chunked(replace(CASES["multi-goal"].env, num_envs=EPISODES), 4, 2)
    for seed in SEEDS:
        own = load(clone("multi-goal", seed, 4)).network
        for value in (Plain(right_side, 4), Plain(far_right, 4)):
            cases = [("guide", w, guided(own, w, value)) for w in (0.0, 0.3, 1.0, 3.0, 10.0)]
            cases += [("best of", float(n), chosen(own, value, n)) for n in (2, 4, 16)]
            for how, size, policy in cases:
                running, _, terminated, _, _, after = rolled(env, policy, jr.key(100 + seed), False)
                ends = (running & terminated)[..., None]
                last = np.asarray(jnp.where(ends, after, 0).sum(0))
                reached = np.asarray((running & terminated).any(0))
                near = np.linalg.norm(last[:, None] - np.asarray(GOALS)[None], axis=-1).argmin(1)
                kept = ~np.asarray((running & (after[..., 0] < -0.1)).any(0))
                row = {
                    "value": value.function.__name__,
                    "seed": seed,
                    "how": how,
                    "size": size,
                    "reached": reached.mean(),
                }
                row |= {"right": float(kept.mean()), "last goal": float((reached & (near == 3)).mean())}
                rows.append(row | {"reached": float(reached.mean())})
                print(rows[-1], flush=True)
    write(DATA / "guidance.csv", rows)


def undone(policy: Any, back: Any, offset: Any, obs: Any, key: Any) -> Any:
    return policy(back @ (obs - offset), key)


def exact(policy: Any, inverse: Any, obs: Any, key: Any) -> Any:
    return jnp.clip(inverse @ policy(obs, key), -1.0, 1.0)


def sensors() -> None:
    """Before adaptation, after it, and with the sensors' change undone."""
    rows: list[Row] = []
    for name, case in CASES.items():
        old = replace(case.env, num_envs=EPISODES)
        gain, offset = SENSORS[name]
        env = Changed(old, gain, offset)
        back = jnp.linalg.inv(jnp.asarray(gain))
        for seed in SEEDS:
            own = load(clone(name, seed)).network
            keys = jr.split(jr.key(seed), 12)
            source = jnp.asarray(data(name)[1]["obs"], jnp.float32)
            ours = env.see(observed(old, own, keys[0]))  # what the old behaviour looks like to the new sensors
            found = {"old robot": score(name, old, own, seed), "before": score(name, env, own, seed)}
            found["undone"] = score(name, env, jax.tree_util.Partial(undone, own, back, jnp.asarray(offset)), seed)
            for n in (200, 2000):
                few = ours[jr.permutation(keys[1], len(ours))[:n]]
                found[f"adapted {n}"] = score(name, env, adapted(own, source, few, keys[2]), seed)
            few = ours[jr.permutation(keys[1], len(ours))[:2000]]
            found["released"] = score(name, env, adapted(own, source, few, keys[2], leave_one_out=False), seed)
            policy = own
            for i in range(3):  # from what it sees itself
                seen = observed(replace(env, env=replace(old, num_envs=50)), policy, keys[3 + i])
                policy = adapted(policy, source, seen, keys[6 + i])
                found[f"own {i + 1}"] = score(name, env, policy, seed)
            rows += [{"task": name, "seed": seed, "case": case_name, "score": s} for case_name, s in found.items()]
            print(name, seed, found, flush=True)
    write(DATA / "transfer_sensors.csv", rows)


def motors() -> None:
    """The old policy, action flow matching by its number of transitions, and PPO (reinflow) from the old policy."""
    rows: list[Row] = []
    sys.modules.setdefault("transfer", sys.modules[__name__])
    for name, case in CASES.items():
        old = replace(case.env, num_envs=EPISODES)
        env = Changed(old, motors=MOTORS[name])
        inverse_map = jnp.linalg.inv(jnp.asarray(MOTORS[name]))
        for seed in SEEDS:
            own = load(clone(name, seed)).network
            keys = jr.split(jr.key(seed), 6)
            found: dict[tuple[str, int], float] = {
                ("old robot", 0): score(name, old, own, seed),
                ("before", 0): score(name, env, own, seed),
                ("exact", 0): score(name, env, jax.tree_util.Partial(exact, own, inverse_map), seed),
            }
            obs, action, next_obs = transitions(replace(old, num_envs=50), own, keys[0], 5000)
            inverse = inverse_model(obs, action, next_obs, keys[1])
            obs, action, next_obs = transitions(replace(env, env=replace(old, num_envs=50)), own, keys[2], 1000)
            for n in (100, 1000):
                for case_name, given_plan in (("flow", True), ("flow without plan", False)):
                    policy = transformed(own, inverse, obs[:n], action[:n], next_obs[:n], keys[3], given_plan)
                    found[case_name, n] = score(name, env, policy, seed)
            for steps in (20_000, 100_000):
                found["reinflow", steps] = score(name, env, tuned(name, seed, steps), seed)
            for (case_name, n), value in found.items():
                rows.append({"task": name, "seed": seed, "case": case_name, "transitions": n, "score": value})
            print(name, seed, found, flush=True)
            write(DATA / "transfer_motors.csv", rows)


def transitions(env: Any, policy: Any, key: Any, most: int) -> tuple[Any, ...]:
    """(obs, action, next_obs) of the policy with every second action uniform."""
    running, _, _, *rows = rolled(env, policy, key, True)
    order = jr.permutation(jr.fold_in(key, 1), int(running.sum()))[:most]
    return tuple(x[running][order] for x in rows)


def tuned(name: str, seed: int, steps: int) -> Any:
    """The old policy after `steps` of PPO on the changed robot."""
    folder = FOLDER / f"tuned-{name}{seed}-{steps}"
    if (folder / "best").exists():
        return load(folder, trust="transfer").network
    run = preset_run("reinflow")
    source = replace(run.source, env=f"transfer:{name.replace('-', '_')}", num_envs=16, unroll=64)
    run = replace(run, source=source, steps=steps, pretrained=str(clone(name, seed)), seed=seed, trackers=())
    run = replace(run, eval_every=steps, log_every=steps)
    train(run, folder, trust="transfer", quiet=True)
    return load(folder, trust="transfer").network


if __name__ == "__main__":
    print(machine())
    tyro.extras.subcommand_cli_from_dict({"guidance": guidance, "sensors": sensors, "motors": motors})
