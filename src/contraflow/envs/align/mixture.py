"""Eight Gaussians on a circle, with an exact answer: the reference times exp(r / lambda) on a grid."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from contraflow.envs.align.generation import Reward
from contraflow.flow.path import Vector
from contraflow.flow.targets import GaussianMixture, eight_gaussians

Condition = Float[Array, " c"]
RADIUS, STD = 0.7, 0.08
FLOOR = -6.0  # of the log density that the judge accepts: 1 - exp(-6) = 99.75 % of the reference lies above it


@cache
def mixture() -> GaussianMixture:
    """The density of the data."""
    with jax.ensure_compile_time_eval():
        return eight_gaussians(RADIUS, STD)


def right(x: Vector, cond: Condition) -> jax.Array:
    """r = 2 x_1: grows without end to the right, where there are no data."""
    return 2.0 * x[0]


def pair(x: Vector, cond: Condition) -> jax.Array:
    """r = 1 near the modes at 0 and 135 degrees, with width .2, else 0."""
    squares = jnp.stack([jnp.sum((x - mixture().means[i]) ** 2) for i in (0, 3)])
    return jnp.max(jnp.exp(-squares / (2 * 0.2**2)))


def centre(x: Vector, cond: Condition) -> jax.Array:
    """r = -4 |x - c|^2 with c = (.35, .35), which lies between modes."""
    return -4.0 * jnp.sum((x - 0.35) ** 2)


@dataclass(frozen=True)
class Mixture2d:
    """Samples in the plane; the condition is always 0. The judge accepts what the data's density allows."""

    sizes = (2, 1)

    @property
    def rewards(self) -> Mapping[str, Reward]:
        return {"right": right, "pair": pair, "centre": centre}

    def condition(self, key):
        return jnp.zeros(1)

    def approved(self, x, cond):
        return mixture()(x) > FLOOR + jnp.max(mixture().log_weights) - jnp.log(2 * jnp.pi * STD**2)

    def data(self) -> tuple[np.ndarray, np.ndarray]:
        """20 000 draws."""
        x = mixture().sample(jr.key(0), 20_000)
        return np.zeros((len(x), 1), np.float32), np.clip(np.asarray(x, np.float32), -1.0, 1.0)
