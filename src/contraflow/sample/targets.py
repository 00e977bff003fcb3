"""Densities in the plane to draw from, each with exact samples to compare with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.config import import_path, suggest
from contraflow.flow.density import GaussianMixture, LogDensity, eight_gaussians, two_moons
from contraflow.flow.path import AbstractPath, Scalar, Vector
from contraflow.types import PRNGKey, UserError

# 16 Gaussians on each moon rather than 64: four times cheaper, with a ripple of .6 % along the arcs.
TARGETS: dict[str, Callable[[], GaussianMixture]] = {
    "two-moons": lambda: two_moons(points=16),
    "eight-gaussians": eight_gaussians,
}
GRID = 512


@dataclass(frozen=True, eq=False)
class Target:
    """`log_density` x [2] -> [] is all that training sees; `sample(key, n)` -> [n, 2] is exact and for evaluation only.

    `posterior_mean(path, x_t, t)` is None where it is not known in closed form.
    """

    name: str
    log_density: LogDensity
    sample: Callable[[PRNGKey, int], Float[Array, "n 2"]]
    posterior_mean: Callable[[AbstractPath, Vector, Scalar], Vector] | None = None


def find_target(name: str, box: float, trust: bool = False) -> Target:
    """A named target, or the user's function `module:function` (x [2] -> log density []), which needs `trust`.

    Raises UserError for an unknown name and for a function that is no log density on the box [-box, box]^2.
    """
    if ":" in name:
        log_density = import_path(name, trust)
        if not callable(log_density):
            raise UserError(f"{name} is not a function x [2] -> log density")
        return from_function(name, cast(LogDensity, log_density), box)
    if name not in TARGETS:
        raise UserError(f"unknown target {name!r}; {suggest(name, TARGETS)} Your own: module:function with --trust")
    mixture = TARGETS[name]()
    sample = jax.jit(lambda key, n: mixture.sample(key, n), static_argnums=1)
    return Target(name, mixture_log_density(mixture), sample, mixture.posterior_mean)


def mixture_log_density(mixture: GaussianMixture) -> LogDensity:
    """The same as `mixture`, up to a constant, through inner products: ten times faster, gradient included.

    log pi = log sum_i w_i / s_i^d exp((m_i.x - |x|^2 / 2 - |m_i|^2 / 2) / s_i^2).
    """
    means, variance = mixture.means, mixture.std**2
    log_scale = mixture.log_weights - 0.5 * means.shape[1] * jnp.log(variance)
    half_norms = 0.5 * jnp.sum(means**2, 1)
    return lambda x: jax.nn.logsumexp(log_scale + (means @ x - 0.5 * x @ x - half_norms) / variance)


def from_function(name: str, log_density: LogDensity, box: float, grid: int = GRID) -> Target:
    """A target whose exact samples come from a `grid` x `grid` table of the density: a cell, then a point in it."""
    centre = (jnp.arange(grid) + 0.5) * (2 * box / grid) - box
    points = jnp.stack(jnp.meshgrid(centre, centre), -1).reshape(-1, 2)
    try:
        log_p = jax.jit(jax.vmap(log_density))(points)
    except Exception as error:  # anything may go wrong in a user's function
        first = str(error).partition("\n")[0]
        raise UserError(f"{name} failed on a JAX array of shape [2]: {type(error).__name__}: {first}") from None
    if getattr(log_p, "shape", None) != (grid * grid,):
        raise UserError(f"{name} must return one number, the log density of a point [2]")
    if bool(jnp.any(jnp.isnan(log_p) | (log_p == jnp.inf))) or not bool(jnp.any(jnp.isfinite(log_p))):
        raise UserError(f"{name} is NaN or infinite somewhere in the box of half side {box}, or nowhere finite in it")
    edge = jnp.max(jnp.abs(points), 1) > 0.98 * box
    mass = float(jnp.sum(jnp.where(edge, jax.nn.softmax(log_p), 0.0)))
    if mass > 0.002:
        raise UserError(f"{name} has {mass:.1%} of its mass at the edge of the box; pass a larger --box than {box}")

    def sample(key: PRNGKey, n: int) -> Float[Array, "n 2"]:
        k_cell, k_place = jr.split(key)
        place = jr.uniform(k_cell, (n,), maxval=cumulative[-1])
        cell = jnp.clip(jnp.searchsorted(cumulative, place, side="right"), 0, grid * grid - 1)
        return points[cell] + jr.uniform(k_place, (n, 2), minval=-box / grid, maxval=box / grid)

    cumulative = jnp.cumsum(jax.nn.softmax(log_p))
    return Target(name, log_density, jax.jit(sample, static_argnums=1))
