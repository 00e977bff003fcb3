"""The density of a flow in the plane on a grid, and distances between densities there: exact up to the cells."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from contraflow.flow.likelihood import log_likelihood
from contraflow.flow.solver import Drift, Midpoint, ODESolver

Mass = Float[Array, " n"]


class Grid(NamedTuple):
    """Centres of the cells [n, 2] of the square [-side, side]^2, and the area of a cell."""

    points: Float[Array, "n 2"]
    area: float


def grid(side: float = 1.1, cells: int = 88) -> Grid:
    """Returns `cells` x `cells` cells."""
    line = (jnp.arange(cells) + 0.5) * (2 * side / cells) - side
    return Grid(jnp.stack(jnp.meshgrid(line, line), -1).reshape(-1, 2), (2 * side / cells) ** 2)


def density(field: Drift, on: Grid, solver: ODESolver = Midpoint(24, power=1.5)) -> Mass:
    """Returns the mass of each cell under the ends of a field, normalised over the grid."""
    log_p = jax.lax.map(lambda x: log_likelihood(field, x, 0.0, 1.0, solver)[0], on.points, batch_size=1024)
    return jax.nn.softmax(log_p)


def tilted(mass: Mass, reward: Float[Array, " n"], temperature: float) -> Mass:
    """Returns p exp(r / temperature) / Z."""
    return jax.nn.softmax(jnp.log(mass) + reward / temperature)


def total_variation(p: Mass, q: Mass) -> Float[Array, ""]:
    """Returns sum |p - q| / 2, in [0, 1]."""
    return 0.5 * jnp.sum(jnp.abs(p - q))


def relative_entropy(p: Mass, q: Mass) -> Float[Array, ""]:
    """Returns KL(p | q) in nats; cells where p is below 1e-12 count 0."""
    return jnp.sum(jnp.where(p > 1e-12, p * (jnp.log(jnp.maximum(p, 1e-30)) - jnp.log(jnp.maximum(q, 1e-30))), 0.0))
