"""Memory and time of iterations of alignment on digits, and speed beside other code.

    python benchmarks/alignment_cost.py cost --runs runs/align               # docs/data/alignment_cost.csv
    python benchmarks/alignment_cost.py speed --peer module:function         # docs/data/alignment_speed.csv

`speed` needs no runs. Its peer has the same network, batch, steps and number of gradient steps (benchmarks/speed.py
says what a peer is). Give `--threads 1` and `2` in turn, on as many cores (`taskset -c 0 ...`); on a busy machine take
`--clock cpu` for one thread.
"""

import os
import sys

if "--threads" in sys.argv and sys.argv[sys.argv.index("--threads") + 1] == "1":
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.random as jr
import tyro
from alignment import methods, world_of
from common import DATA, machine, peer, read, write
from timing import paired, report

from contraflow.agents.align.flow_grpo import FlowGRPO
from contraflow.core.types import EnvSpec
from contraflow.envs.align import Generation
from contraflow.envs.align.digits import Digits, ink
from contraflow.flow.model import FlowSpec
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.artifact import load_policy
from contraflow.training.loop import Carry, Learner, World
from contraflow.training.sources.conditions import Align


def longer(agent: Any, steps: int) -> Any:
    """The agent with this many steps of its sampler."""
    if hasattr(agent, "plan"):
        return replace(agent, plan=replace(agent.plan, steps=steps))
    name = {"AdjointMatching": "steps", "RFMAlign": "draws"}.get(type(agent).__name__)
    if name:
        return replace(agent, **{name: steps})
    return replace(agent, flow=replace(agent.flow, solver=replace(agent.flow.solver, steps=steps)))


def cost(runs: Path) -> None:
    """Temporary memory and time of an iteration on digits as steps K and groups grow; one seed, two threads."""
    world, rows = world_of("digits"), []
    policy, spec, _ = load_policy(runs / "digits" / "policy")
    for method in ("flow-grpo", "flow-grpo-one", "nft", "adjoint-matching", "rfm-align"):
        for steps, group in ((5, 32), (10, 32), (20, 32), (40, 32), (10, 8), (10, 16), (10, 64)):
            agent: Any = longer(methods()[method].starting_from(policy), steps)
            stage = Align(10, group)
            state = jax.jit(lambda key, agent=agent: agent.adopt(agent.init(key, spec), policy))(jr.key(0))
            carry = Carry(Learner(state, None, jnp.zeros(1), jnp.zeros((), int), jnp.zeros((), int)), None, None)
            step = (
                jax.jit(lambda c, k, a=agent, s=stage: s.iterate(a, world, c, k)[0]).lower(carry, jr.key(1)).compile()
            )
            seconds = []
            for _ in range(4):
                began = time.perf_counter()
                jax.block_until_ready(step(carry, jr.key(1)))
                seconds.append(time.perf_counter() - began)
            memory: Any = step.memory_analysis()
            rows.append(
                {"method": method, "steps": steps, "group": group, "MB": memory.temp_size_in_bytes / 1e6,
                 "ms": 1000 * min(seconds)}
            )  # fmt: skip
            print(rows[-1], flush=True)
    write(DATA / "alignment_cost.csv", rows)


PROMPTS, GROUP, STEPS, WIDTH, DEPTH = 10, 32, 10, 256, 2


def ours() -> Any:
    """One iteration of Flow-GRPO: 320 samples in ten noisy steps, their rewards, two gradient steps."""
    agent, spec = FlowGRPO(flow=FlowSpec(network=ResidualMLP(WIDTH, DEPTH))), EnvSpec(10, 64, 1, 1, True)
    world, stage = World(spec, Generation(Digits(), (ink,))), Align(PROMPTS, GROUP)
    zero = jnp.zeros((), jnp.int32)
    state = jax.jit(lambda key: agent.init(key, spec))(jr.key(0))
    step = jax.jit(lambda c, k: stage.iterate(agent, world, c, k), donate_argnums=0)
    held = [Carry(Learner(state, None, jnp.zeros(1), zero, jnp.copy(zero)), None, None)]

    def call():
        held[0], metrics = step(held[0], jr.key(1))
        return metrics

    return call


def speed(other: str | None, threads: int, rounds: int, clock: str) -> None:
    """Iterations of Flow-GRPO in turn with the peer's."""
    sizes = {"dim": 64, "cond": 10, "prompts": PROMPTS, "group": GROUP, "steps": STEPS, "width": WIDTH, "depth": DEPTH}
    others, own = peer(other, "flow-grpo", threads=threads, **sizes), "contraflow flow-grpo"
    ticks = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
    found = report(paired({own: ours()} | others, rounds, clock=ticks), next(iter(others), own))
    rows = [
        {"threads": threads, "clock": clock, "method": m, "ms": ms, "per_second": 1e3 / ms, "ratio": ratio}
        for m, ms, ratio in found
    ]
    file = DATA / "alignment_speed.csv"
    write(file, [row for row in read(file) if row["threads"] != threads] + rows)


def main(
    what: Literal["cost", "speed"], /, runs: Path = Path("runs/align"), peer: str | None = None, threads: int = 2,
    rounds: int = 15, clock: Literal["wall", "cpu"] = "wall",
) -> None:  # fmt: skip
    print(machine())
    cost(runs) if what == "cost" else speed(peer, threads, rounds, clock)


if __name__ == "__main__":
    tyro.cli(main)
