"""Speed of on-policy training: PPO's loop against a peer in the same run, and where the time of each method goes.

    python benchmarks/onpolicy.py throughput [--peer module:function]
    python benchmarks/onpolicy.py phases [--env envpool:Hopper-v5]

`--peer` names a function `(env, num_envs, unroll, epochs, minibatches, width) -> callable` of a module on PYTHONPATH,
an implementation of PPO kept outside this repository; each call takes one rollout and learns from it. Medians of
paired rounds. `phases` needs no peer: acting, environment and learning apart, at the settings of finetune.py.
"""

import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.random as jr
import numpy as np
import tyro
from finetune import METHODS, TASKS
from timing import paired, report

from contraflow.agents import PPO
from contraflow.envs import make
from contraflow.envs.base import Env
from contraflow.envs.chunk import chunked
from contraflow.training.loop import Carry, epoch
from contraflow.training.onpolicy import OnPolicy, decide, first_learner, learn

COPIES, UNROLL = 16, 125
SAME: dict[str, Any] = {"epochs": 10, "minibatches": 16, "width": 64}


def looped(agent: Any, env: Env) -> Callable[[], None]:
    """One rollout and its passes per call."""
    key = jr.key(0)
    carry = [Carry(first_learner(agent, env.spec, key), *env.reset(key))]

    def call() -> None:
        carry[0], _, error = epoch(OnPolicy(UNROLL), agent, env, carry[0], key, 1)
        if error is not None:
            raise error

    return call


def throughput(peer: str | None, rounds: int) -> None:
    """Environment steps per second of PPO on Hopper: ours with Gymnasium and with EnvPool, the peer with Gymnasium."""
    agent = PPO(**SAME)
    cases: dict[str, Callable[[], object]] = {
        "ours, Gymnasium": looped(agent, make("gym:Hopper-v5", COPIES, 0)),
        "ours, EnvPool": looped(agent, make("envpool:Hopper-v5", COPIES, 0)),
    }
    if peer is not None:
        module, _, name = peer.partition(":")
        build = getattr(importlib.import_module(module), name)
        cases["peer, Gymnasium"] = build("Hopper-v5", COPIES, UNROLL, *SAME.values())
    for name, median, _ in report(paired(cases, rounds), list(cases)[-1], "s"):
        print(f"{name:20s} {COPIES * UNROLL / median:.0f} environment steps/s")


def phases(env: str, rounds: int) -> None:
    """Milliseconds per 1000 environment steps; chunks of 4 actions for all but PPO."""
    print(f"{env}, {COPIES} copies, {UNROLL} decisions per rollout; ms per 1000 environment steps")
    for name in ("ppo", "reinflow-1", "reinflow-4", "dppo-10", "fpo"):
        start, agent = METHODS[name]
        size = TASKS["hopper"].horizon if start else 1
        world = chunked(make(env, COPIES, 0), size, size)
        parts = np.median([_parts(agent, world, number) for number in range(rounds + 1)][1:], axis=0)
        world.close()  # pyright: ignore[reportAttributeAccessIssue]
        act, physics, update = parts / (COPIES * UNROLL * size) * 1e6
        total = act + physics + update
        print(
            f"{name:12s} act {act:7.1f}  environment {physics:7.1f}  learn {update:7.1f}   {1e6 / total:6.0f} steps/s"
        )


def _parts(agent: Any, env: Env, number: int) -> tuple[float, float, float]:
    """Seconds of acting, stepping and learning of one rollout."""
    key = jr.key(number)
    learner = first_learner(agent, env.spec, key)
    env_state, obs = env.reset(key)
    act, physics, rows = 0.0, 0.0, []
    for i in range(UNROLL):
        start = time.perf_counter()
        action, extras = jax.block_until_ready(decide(agent, learner.agent, obs, learner.iteration, i, key))
        middle = time.perf_counter()
        env_state, step = env.step(env_state, np.asarray(action))
        act, physics = act + middle - start, physics + time.perf_counter() - middle
        rows.append((obs, extras, replace(step, steps=step.steps * step.valid)))
        obs = step.obs
    start = time.perf_counter()
    obs_rows, extras, steps = jax.tree.map(lambda *x: np.stack(x), *jax.device_get(rows))
    jax.block_until_ready(learn(agent, learner, obs_rows, extras, steps, key)[0].steps)
    return act, physics, time.perf_counter() - start


def main(
    what: Literal["throughput", "phases"],
    /,
    peer: str | None = None,
    env: str = "envpool:Hopper-v5",
    rounds: int = 9,
) -> None:
    """Print one table."""
    print(f"jax {jax.__version__}, {jax.devices()[0].platform}, Python {sys.version.split()[0]}")
    if what == "throughput":
        throughput(peer, rounds)
    else:
        phases(env, rounds)


if __name__ == "__main__":
    tyro.cli(main)
