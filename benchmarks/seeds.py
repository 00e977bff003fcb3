"""Wall time of many seeds in one compiled program, against one seed and against as many single runs in turn.

    python benchmarks/seeds.py [--seeds 8] [--env jax:pendulum] [--agent sac] [--iterations 500] [--rounds 5]

First the compile times, which are paid once; then the loop alone (acting, physics, replay, updates), compiled before:
what a long run takes per step. The cases are timed in turn; medians and paired ratios, of wall time and, because on a
shared machine that measures the neighbours too, of the process's own CPU time.
"""

import sys
import time

import jax
import jax.random as jr
import tyro
from flops import with_width
from timing import paired, report

from contraflow import AGENTS
from contraflow.envs import make
from contraflow.training.loop import Carry, epoch, epoch_seeds
from contraflow.training.offpolicy import OffPolicy, first_learner


def main(
    seeds: int = 8,
    env: str = "jax:pendulum",
    agent: str = "sac",
    width: int = 32,
    num_envs: int = 1,
    updates: int = 1,
    batch_size: int = 64,
    buffer_size: int = 10_000,
    iterations: int = 500,
    rounds: int = 5,
) -> None:
    """Print seconds for `iterations` iterations of the loop."""
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform} ({device.device_kind}), {sys.version.split()[0]}")
    print(f"{agent}, width {width}, {env} x {num_envs}, {updates} update(s) of {batch_size}, {iterations} iterations")
    world, small = make(env, num_envs), with_width(AGENTS[agent](), width)
    warm_up, learning = OffPolicy(True, 0, batch_size), OffPolicy(False, updates, batch_size)
    keys = jr.split(jr.key(0), seeds)

    def start(key: jax.Array) -> Carry:
        k_init, k_env = jr.split(key)
        return Carry(first_learner(small, world.spec, buffer_size, k_init), *world.reset(k_env))

    # One seed, and all of them: the carries go in and come back, as in training.
    one = [epoch(warm_up, small, world, jax.jit(start)(key), key, batch_size)[0] for key in keys]
    many = [epoch_seeds(warm_up, small, world, jax.jit(jax.vmap(start))(keys), keys, batch_size)[0]]

    def single(i: int) -> None:
        one[i], _, _ = epoch(learning, small, world, one[i], keys[i], iterations)

    def together() -> None:
        many[0], _ = epoch_seeds(learning, small, world, many[0], keys, iterations)

    for name, call in {"one seed": lambda: single(0), f"{seeds} seeds at once": together}.items():
        begin = time.perf_counter()
        call()
        print(f"{name}: {time.perf_counter() - begin:.1f} s for the first call, compiling included", flush=True)
    cases = {
        "one seed": lambda: single(0),
        f"{seeds} seeds at once": together,
        f"{seeds} single runs in turn": lambda: [single(i) for i in range(seeds)],
    }
    for kind, clock in {"wall": time.perf_counter, "CPU": time.process_time}.items():
        print(f"{kind} time")
        times = paired(cases, rounds, clock=clock)
        report(times, "one seed", "s")
        report({name: times[name] for name in list(cases)[1:]}, f"{seeds} single runs in turn", "s")


if __name__ == "__main__":
    tyro.cli(main)
