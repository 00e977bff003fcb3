"""Floating-point operations of the matrix products of one update, counted in its program, not timed.

    python benchmarks/flops.py [--width W] [--batch B]

A product [m, k] x [k, n] counts 2 m k n; a loop as often as it runs. Everything else (activations, random numbers,
optimisers) is left out: it is below a tenth at these sizes. Sizes of observations and actions as in `speed.py`.
"""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.random as jr
import tyro
from speed import SPEC, batch

from contraflow.presets import PRESETS
from contraflow.training.run import Run


def products(jaxpr: Any) -> int:
    """2 m k n over all matrix products of a program, those of loops times their length."""
    total = 0
    for equation in jaxpr.eqns:
        inner = [x for p in equation.params.values() for x in (p if isinstance(p, tuple | list) else [p])]
        inside = sum(products(getattr(x, "jaxpr", x)) for x in inner if hasattr(getattr(x, "jaxpr", x), "eqns"))
        if equation.primitive.name == "while" and inside:
            raise ValueError("matrix products in a loop of unknown length cannot be counted")
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
        total += inside * (equation.params["length"] if equation.primitive.name == "scan" else 1)
    return total


def update_products(agent: Any, rows: int = 256) -> int:
    """`products` of one update on `rows` transitions."""
    state = jax.eval_shape(lambda key: agent.init(key, SPEC), jr.key(0))
    return products(jax.make_jaxpr(agent.update)(state, batch(jr.key(1), rows), jr.key(2)).jaxpr)


def with_width(agent: Any, width: int) -> Any:
    """The agent with all networks of that width."""
    own = {"width": width} if hasattr(agent, "width") else {}
    critic = {"critic": replace(agent.critic, width=width)} if hasattr(agent, "critic") else {}
    return replace(agent, **own, **critic)


def main(width: int | None = None, rows: int = 256) -> None:
    """Gigaflops per update of every off-policy preset's agent, and the share of the official RFM's."""
    official = update_products(PRESETS["rfm-paper"].agent, rows)
    for name, run in PRESETS.items():
        if not isinstance(run, Run):
            continue  # learns from rollouts or demonstrations
        agent: Any = run.agent
        agent = agent if width is None else with_width(agent, width)
        counted = update_products(agent, rows)
        print(f"{name:16s} {counted / 1e9:8.3f} GFLOP   1/{official / counted:.1f} of rfm-paper")


if __name__ == "__main__":
    tyro.cli(main)
