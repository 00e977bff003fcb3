"""Steps per second of one task in three simulators, and what restarting ended copies costs, on one core.

    taskset -c 0 python benchmarks/environments.py [--copies 1 32 256] [--seeds 8] [--steps 500] [--rounds 5]

dm_control's cartpole swingup: `playground:CartpoleSwingup` and `jax:cartpole-swingup` as one compiled scan of `steps`
steps, `envpool:CartpoleSwingup-v1` (one thread) as a Python loop; random actions drawn before. Then the ways in which
Playground's ended copies could start anew, for one seed and for several under vmap. Compile times come first; the cases
are timed in turn; medians and paired ratios, of wall time and of the process's own CPU time.
"""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from timing import paired, report

from contraflow.envs import make, playground
from contraflow.envs.base import Env
from contraflow.envs.envpool import EnvPool

TASKS = {
    "playground": "playground:CartpoleSwingup",
    "jax": "jax:cartpole-swingup",
    "envpool": "envpool:CartpoleSwingup-v1",
}


def never(env: Any, sim: Any, key: Any, done: Any) -> Any:
    """What the physics alone costs."""
    return sim, key


def always(env: Any, sim: Any, key: Any, done: Any) -> Any:
    """A reset in every step, used where it is needed."""
    k_now, k_later = jr.split(key)
    fresh = playground._start(env, k_now)
    return jax.tree.map(lambda new, old: jnp.where(done, new, old), fresh, sim), k_later


WAYS = {"no reset": never, "reset in every step": always, "reset in a loop (ours)": playground._renew}


def rolling(name: str, env: Env, actions: jax.Array, seeds: int = 0) -> Callable[[], Any]:
    """A call that takes the steps `actions` [T, N, a], of as many seeds at once, if any; prints what compiling took."""
    keys = jr.split(jr.key(0), seeds) if seeds else jr.key(0)
    over = jax.vmap if seeds else lambda f: f
    state, _ = jax.block_until_ready(jax.jit(over(env.reset))(keys))
    wall, cpu = time.perf_counter(), time.process_time()
    run = jax.jit(over(lambda s: jax.lax.scan(lambda s, a: _keep_reward(env.step(s, a)), s, actions)))
    compiled = run.lower(state).compile()
    print(
        f"{name}: compiled in {time.perf_counter() - wall:.1f} s, {time.process_time() - cpu:.1f} s of CPU", flush=True
    )
    return lambda: compiled(state)[1]


def _keep_reward(stepped: Any) -> Any:
    state, step = stepped
    return state, step.reward.sum() + step.obs.sum()


def looping(env: Env, actions: np.ndarray) -> Callable[[], Any]:
    """The same for a simulator on the host."""
    state, _ = env.reset(jr.key(0))

    def run() -> None:
        for action in actions:
            env.step(state, action)

    return run


def compare(cases: Mapping[str, Callable[[], Any]], transitions: int, against: str, rounds: int) -> None:
    """Print steps per second and ratios of time."""
    for kind, clock in {"wall": time.perf_counter, "CPU": time.process_time}.items():
        print(f"{kind} time")
        for name, milliseconds, _ in report(paired(cases, rounds, clock=clock), against, "ms"):
            print(f"    {name}: {transitions / milliseconds * 1e3:,.0f} steps/s", flush=True)


def main(copies: tuple[int, ...] = (1, 32, 256), seeds: int = 8, steps: int = 500, rounds: int = 5) -> None:
    """Print steps per second, copies counted, of `steps` steps of all copies."""
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform} ({device.device_kind}), {sys.version.split()[0]}")
    for n in copies:
        print(f"--- {n} copies, {steps} steps")
        actions = jr.uniform(jr.key(1), (steps, n, 1), minval=-1.0, maxval=1.0)
        cases = {name: rolling(name, make(TASKS[name], n), actions) for name in ("playground", "jax")}
        pool = EnvPool(TASKS["envpool"].partition(":")[2], n, num_threads=1)
        cases["envpool"] = looping(pool, np.asarray(actions))
        compare(cases, n * steps, "envpool", rounds)
        pool.close()
    for s in (0, seeds):
        print(f"--- ways to start anew, one copy, {s or 1} seed(s)")
        actions = jr.uniform(jr.key(1), (steps, 1, 1), minval=-1.0, maxval=1.0)
        cases = {}
        for name, way in WAYS.items():
            playground._renew = way
            jax.clear_caches()  # the environment is the same, the function behind its step is not
            cases[name] = rolling(name, make(TASKS["playground"]), actions, s)
        compare(cases, steps * max(s, 1), "no reset", rounds)


if __name__ == "__main__":
    tyro.cli(main)
