"""The tuned temperature of `rfm` over the exact one, on functions whose exact temperature is known by quadrature.

    python benchmarks/temperature.py        # docs/data/modes_temperature.csv

lambda is tuned to an entropy of -.5 per dimension on functions of one coordinate, or their sum over six.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from common import DATA, machine, write
from modes import BATCH, NETWORK, batch_of, prepared

from contraflow.agents import presets
from contraflow.core.types import EnvSpec
from contraflow.nets.critic import QEnsemble
from contraflow.rl.temperature import Tuned

FUNCTIONS: dict[str, Any] = {
    "a": lambda a: a,
    "|a|": jnp.abs,
    "-a^2": lambda a: -(a**2),
    "-(|a| - .5)^2": lambda a: -((jnp.abs(a) - 0.5) ** 2),
    "cos 6a": lambda a: jnp.cos(6 * a),
    "two narrow modes": lambda a: jnp.logaddexp(-0.5 * ((a - 0.5) / 0.08) ** 2, -0.5 * ((a + 0.5) / 0.08) ** 2),
}


class Sum(QEnsemble):
    """Q(a) = sum_j f(a_j)."""

    name: str = eqx.field(static=True)

    def __init__(self, name: str, dim: int):
        super().__init__(2, 1, dim, 1, 1, key=jr.key(0))
        self.name = name

    def outputs(self, obs, action):
        return jnp.sum(FUNCTIONS[self.name](action)) * jnp.ones((self.num, 1))


def exact_temperature(name: str, entropy: float) -> float:
    """lambda at which exp(f / lambda) on [-1, 1] has this entropy, by quadrature and bisection."""
    a = np.linspace(-1, 1, 20_001)
    q = np.asarray(FUNCTIONS[name](a), float)

    def has(lam):
        p = np.exp((q - q.max()) / lam)
        p /= p.sum()
        return -np.sum(p * np.log(np.maximum(p, 1e-300))) + math.log(a[1] - a[0])

    low, high = 1e-4, 1e2
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if has(middle) > entropy else (middle, high)
    return math.sqrt(low * high)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def tuned(agent: Any, name: str, dim: int, updates: int, key: jax.Array) -> jax.Array:
    """Temperatures [updates]."""
    k_init, k_learn = jr.split(key)
    q = Sum(name, dim)
    state = replace(agent.init(k_init, EnvSpec(1, dim, 1, 1, True)), critic=q, target=q)

    def step(state, key):
        k_batch, k_update = jr.split(key)
        state, _ = agent.update(state, batch_of(BATCH, k_batch, dim), k_update)
        return state, state.temperature

    return jax.lax.scan(step, state, jr.split(k_learn, updates))[1]


def main(updates: int = 14_000) -> None:
    """The tuned temperature over the exact one by thousands of updates, from .1 on at the default rate; in six
    dimensions with a network of 2 x 256, as one of 64 cannot hold 64 modes even where it is matched to samples."""
    rows = []
    for dim, width in ((1, 64), (6, 256)):
        for name in FUNCTIONS:
            exact = exact_temperature(name, -0.5)
            agent = replace(prepared(presets()["rfm"].agent), temperature=Tuned(-0.5))
            agent = replace(agent, flow=replace(agent.flow, network=replace(NETWORK, width=width)))
            ratios = np.asarray(tuned(agent, name, dim, updates, jr.key(0))).reshape(-1, 1000).mean(1) / exact
            rows.append({"q": name, "d": dim, "exact": exact} | {f"after {i + 1}000": r for i, r in enumerate(ratios)})
            print(dim, name, f"exact {exact:.4f}", " ".join(f"{r:.2f}" for r in ratios), flush=True)
            write(
                DATA / "modes_temperature.csv", [{k: float(v) if k != "q" else v for k, v in r.items()} for r in rows]
            )


if __name__ == "__main__":
    print(machine())
    tyro.cli(main)
