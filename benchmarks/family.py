"""What an update and an action of every off-policy preset cost at one common setting: evaluations, operations, time.

    python benchmarks/family.py [--agents rfm sac] [--peer module:function]    # benchmarks/results/family.csv

Networks of width 64 and depth 2, batch 128, 17 observations, 6 actions, each preset otherwise its own. Evaluations of
actor and critics are counted in the compiled program's source, forward only, for one row of the batch: the products of
their last layers; a derivative along a direction counts once more. Times are of the processor, one thread
(XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"). `--peer` names a function of a module
on PYTHONPATH, (obs_dim, act_dim, width, depth, rows) -> {"NAME": {"update": callable, "act": callable}}: an
implementation kept outside this repository, timed in the same rounds.
"""

import importlib
import math
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.random as jr
import tyro
from flops import products
from speed import ACT, SPEC, actor, batch, updater
from tables import write
from timing import paired

from contraflow.agents import SAC
from contraflow.experiments.bridge import with_networks
from contraflow.presets import PRESETS
from contraflow.training.run import Run

WIDTH, DEPTH, ROWS = 64, 2, 128


def common(agent: Any, critics: int = WIDTH) -> Any:
    """The agent with networks of the common size; heads, members and everything else stay its own."""
    critic = replace(agent.critic, width=critics, depth=DEPTH)
    return with_networks(agent, {"critic": critic, "width": WIDTH, "depth": DEPTH})


def evaluations(jaxpr: Any, inputs: int, outputs: int) -> int:
    """How often a layer of so many inputs and outputs is applied, loops as often as they run."""
    found = 0
    for equation in jaxpr.eqns:
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for p in equation.params.values():
            for inner in p if isinstance(p, tuple | list) else [p]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found += times * evaluations(inner, inputs, outputs)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            if math.prod(shape[i] for i in contracted) == inputs and out[-1:] == (outputs,):
                found += math.prod(out) // outputs
    return found


def counted(agent: Any) -> tuple[float, float, float]:
    """(actor evaluations, evaluations of one critic network, megaflop) for one row of an update."""

    def program(agent):
        state = jax.eval_shape(partial(agent.init, spec=SPEC), jr.key(0))
        return jax.make_jaxpr(agent.update)(state, batch(jr.key(1), ROWS), jr.key(2)).jaxpr

    # Critics of another width: the gradient in an action is no evaluation of the actor.
    told_apart = program(common(agent, critics=WIDTH - 1))
    ends = 2 * ACT if isinstance(agent, SAC) else ACT
    actors = evaluations(told_apart, WIDTH, ends) / ROWS
    critics = evaluations(told_apart, WIDTH - 1, agent.critic.head.outputs) / ROWS
    return actors, critics, products(program(agent)) / ROWS / 1e6


def main(agents: tuple[str, ...] = (), rounds: int = 7, peer: str | None = None) -> None:
    """Print and write the table."""
    runs = {name: run for name, run in PRESETS.items() if isinstance(run, Run) and name != "rfm-cartpole"}
    chosen = {name: common(runs[name].agent) for name in agents or runs}
    updates = {name: updater(agent, ROWS) for name, agent in chosen.items()}
    acts = {name: actor(agent, False) for name, agent in chosen.items()}
    if peer is not None:
        module, _, name = peer.partition(":")
        others = getattr(importlib.import_module(module), name)(SPEC.obs_dim, ACT, WIDTH, DEPTH, ROWS)
        updates |= {f"peer {name}": calls["update"] for name, calls in others.items()}
        acts |= {f"peer {name}": calls["act"] for name, calls in others.items()}
    # The process's own time: on a shared machine the wall's measures the neighbours too.
    update_times = paired(updates, rounds, inner=3, clock=time.process_time)
    act_times = paired(acts, rounds, inner=50, clock=time.process_time)
    rows = []
    for name in updates:
        counts = ("", "", "") if name.startswith("peer") else [round(x, 3) for x in counted(chosen[name])]
        rows.append(
            {
                "agent": name,
                **dict(zip(("actor_evaluations", "critic_evaluations", "megaflop_per_row"), counts, strict=True)),
                "ms_per_update": round(1e3 * median(update_times[name]), 2),
                "us_per_action": round(1e6 * median(act_times[name]), 1),
            }
        )
        print(*(f"{value}" for value in rows[-1].values()), sep="\t", flush=True)
    if not agents:
        write(Path(__file__).parent / "results" / "family.csv", rows)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {sys.version.split()[0]}")


if __name__ == "__main__":
    tyro.cli(main)
