"""Densities to sample from, with exact samples for comparison."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from contraflow.core.settings import import_path, suggest
from contraflow.core.trust import Trust
from contraflow.core.types import PRNGKey, UserError
from contraflow.flow.path import AbstractPath, Scalar, Vector
from contraflow.flow.targets import GaussianMixture, LogDensity, eight_gaussians, forty_gaussians, two_moons

GRID = 512


@dataclass(frozen=True, eq=False)
class Target:
    """`log_density` x [d] -> [] is all that training sees; `sample(key, n)` -> [n, d] is exact and only for evaluation.

    The other fields are None if unknown: `posterior_mean(path, x_t, t)` in closed form, `log_z`, the log of the
    integral of exp(log_density), and `modes`, a mixture with one component per mode. Pictures show the two coordinates
    `shown` on `plane` [2] -> [], their log density.
    """

    name: str
    log_density: LogDensity
    sample: Callable[[PRNGKey, int], Float[Array, "n d"]]
    plane: LogDensity
    dim: int = 2
    posterior_mean: Callable[[AbstractPath, Vector, Scalar], Vector] | None = None
    log_z: float | None = None
    modes: GaussianMixture | None = None
    shown: tuple[int, int] = (0, 1)


def from_mixture(name: str, mixture: GaussianMixture, modes: bool = True) -> Target:
    """Returns the target of a mixture in the plane; `modes` says whether each component is a mode."""
    log_density = mixture_log_density(mixture)
    sample = jax.jit(lambda key, n: mixture.sample(key, n), static_argnums=1)
    known = mixture if modes else None
    return Target(name, log_density, sample, log_density, 2, mixture.posterior_mean, 0.0, known)


def many_well(wells: int = 16) -> Target:
    """Independent pairs (x_1, x_2): log p = sum over pairs of -x_1^4 + 6 x_1^2 + x_1 / 2 - x_2^2 / 2, d = 2 `wells`.

    Each pair has two modes, near x_1 = 1.76 (with .844 of the mass) and -1.70, which makes 65,536 in 32 dimensions (Noe
    et al. 2019; FAB, 2208.01893). The cumulative sum of 8001 points gives exact samples and log Z.
    """
    grid = np.linspace(-4.0, 4.0, 8001)
    mass = np.exp(-(grid**4) + 6 * grid**2 + 0.5 * grid)
    cumulative, places = jnp.asarray(np.cumsum(mass) / mass.sum(), float), jnp.asarray(grid + 0.0005, float)
    log_z = wells * (np.log(mass.sum() * 0.001) + 0.5 * np.log(2 * np.pi))

    def well(x: Array) -> Array:
        return -(x**4) + 6 * x**2 + 0.5 * x

    def log_density(x: Vector) -> Scalar:
        return jnp.sum(well(x[::2])) - 0.5 * jnp.sum(x[1::2] ** 2)

    def sample(key: PRNGKey, n: int) -> Float[Array, "n d"]:
        k_well, k_normal = jr.split(key)
        first = jnp.interp(jr.uniform(k_well, (n, wells)), cumulative, places)
        return jnp.stack([first, jr.normal(k_normal, (n, wells))], -1).reshape(n, 2 * wells)

    # Shows the two-well coordinates of two pairs: four modes.
    return Target(
        f"many-well-{2 * wells}",
        log_density,
        jax.jit(sample, static_argnums=1),
        lambda x: jnp.sum(well(x)),
        2 * wells,
        log_z=float(log_z),
        shown=(0, 2),
    )


TARGETS: dict[str, Callable[[], Target]] = {
    # 16 Gaussians on each moon, not 64: four times cheaper, with a ripple of .6 % along the arcs.
    "two-moons": lambda: from_mixture("two-moons", two_moons(points=16), modes=False),
    "eight-gaussians": lambda: from_mixture("eight-gaussians", eight_gaussians()),
    "forty": lambda: from_mixture("forty", forty_gaussians()),
    "many-well-32": many_well,
}


def find_target(name: str, box: float, trust: Trust = "") -> Target:
    """Returns a named target, or a user-defined `module:function` (x [2] -> log density []) that `trust` allows.

    Raises UserError for an unknown name and for a function that is not a log density on the box [-box, box]^2.
    """
    if ":" in name:
        log_density = import_path(name, trust)
        if not callable(log_density):
            raise UserError(f"{name} is not a function x [2] -> log density")
        return from_function(name, cast(LogDensity, log_density), box)
    if name not in TARGETS:
        raise UserError(
            f"unknown target {name!r}; {suggest(name, TARGETS)} Your own: module:function with --trust module"
        )
    return TARGETS[name]()


def mixture_log_density(mixture: GaussianMixture) -> LogDensity:
    """Returns the log density of `mixture` by inner products, ten times faster, gradient included.

    log pi = log sum_i w_i (2 pi s_i^2)^(-d/2) exp((m_i.x - |x|^2 / 2 - |m_i|^2 / 2) / s_i^2).
    """
    means, variance = mixture.means, mixture.std**2
    log_scale = mixture.log_weights - 0.5 * means.shape[1] * jnp.log(2 * jnp.pi * variance)
    half_norms = 0.5 * jnp.sum(means**2, 1)
    return lambda x: jax.nn.logsumexp(log_scale + (means @ x - 0.5 * x @ x - half_norms) / variance)


def from_function(name: str, log_density: LogDensity, box: float, grid: int = GRID) -> Target:
    """Returns a target with exact samples from a `grid` x `grid` table of the density: a cell, then a point in it.

    Raises UserError for a function that fails, is not finite where it should be, or has mass at the edge of the box.
    """
    centre = (jnp.arange(grid) + 0.5) * (2 * box / grid) - box
    points = jnp.stack(jnp.meshgrid(centre, centre), -1).reshape(-1, 2)
    try:
        log_p = jax.jit(jax.vmap(log_density))(points)
    except Exception as error:  # a user-defined function may raise anything
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
    log_z = float(jax.nn.logsumexp(log_p) + 2.0 * jnp.log(2.0 * box / grid))
    return Target(name, log_density, jax.jit(sample, static_argnums=1), log_density, log_z=log_z)
