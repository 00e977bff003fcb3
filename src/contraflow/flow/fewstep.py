"""Average velocities u(x_t, t, r) = (x_r - x_t) / (r - t) along the flow, with which a step of any size is exact.

u(x, t, t) is the velocity itself, learned by flow matching. The targets here make larger steps consistent with smaller
ones. They take one sample with t < r and stop the gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.core.checks import check_count
from contraflow.core.types import PRNGKey
from contraflow.flow.path import Scalar, Vector

Average = Callable[[Vector, Scalar, Scalar], Vector]
"""u(x, t, r)."""
BOUND = 10.0
"""Bound on noisy actions and average velocities. N(0, 1) minus [-1, 1], or minus the atanh of an action, hardly ever
exceeds it. Without it, a network that provides its own targets can diverge."""


def sample_average_velocity(u: Average, x0: Vector, steps: int) -> Vector:
    """Returns x_1 [d] from x_0 [d] in `steps` equal steps x + (r - t) u(x, t, r)."""

    def step(x, k):
        return x + u(x, k / steps, (k + 1) / steps) / steps, None

    return jax.lax.scan(step, x0, jnp.arange(steps, dtype=x0.dtype))[0]


def split_target(u: Average, x_t: Vector, t: Scalar, r: Scalar, share: Scalar | float) -> Vector:
    """Returns share u(x_t, t, q) + (1 - share) u(x_q, q, r) [d], q = t + share (r - t): two steps in place of one.

    This is SplitMeanFlow (2507.16884). share = 1/2 is the shortcut target (2410.12557), and share -> 0 the target of
    MeanFlow. x_q and the target are clipped to +-`BOUND`.
    """
    q = t + share * (r - t)
    first = u(x_t, t, q)
    second = u(jnp.clip(x_t + (q - t) * first, -BOUND, BOUND), q, r)
    return jax.lax.stop_gradient(jnp.clip(share * first + (1 - share) * second, -BOUND, BOUND))


def mean_flow_target(u: Average, v: Vector, x_t: Vector, t: Scalar, r: Scalar) -> Vector:
    """Returns v + (r - t) d/dt u(x_t, t, r) [d], with the total derivative taken along v (2505.13447, eq. 6, with noise
    at t = 0).

    v may be the velocity x1 - x0 of one pair, because the target is linear in v while u is held fixed.
    """
    t, r = jnp.asarray(t, x_t.dtype), jnp.asarray(r, x_t.dtype)
    _, change = jax.jvp(u, (x_t, t, r), (v, jnp.ones_like(t), jnp.zeros_like(r)))
    return jax.lax.stop_gradient(v + (r - t) * change)


@dataclass(frozen=True)
class Matching:
    """Plain flow matching: only the instantaneous velocity is learned."""

    share: ClassVar[float] = 1.0
    averaged: ClassVar[bool] = False
    power: ClassVar[float] = 0.0


def _check_share(objective: "Shortcut | MeanFlow | SplitMeanFlow") -> None:
    if not 0 < objective.share < 1:
        raise ValueError(f"{type(objective).__name__}: share must lie between 0 and 1, got {objective.share}")


def _or_whole(key: PRNGKey, t: Scalar, r: Scalar) -> tuple[Scalar, Scalar]:
    """Returns (t, r) or, half the time, (0, 1): random times rarely cover the whole step of a one-step policy."""
    whole = jr.bernoulli(key)
    return jnp.where(whole, 0.0, t), jnp.where(whole, 1.0, r)


@dataclass(frozen=True)
class Shortcut:
    """Steps of size 1, 1/2, ..., 2^-levels on their own grids, each matched to two of half its size (2410.12557).

    The released code draws all sizes equally often; here half of the steps are the whole step. Raises ValueError for a
    share outside (0, 1) or levels < 1.
    """

    share: float = 0.5
    """Fraction of rows trained by flow matching; the others make steps consistent."""
    levels: int = 5
    averaged: ClassVar[bool] = True
    power: ClassVar[float] = 0.0

    def __post_init__(self):
        _check_share(self)
        check_count(self, 1, "levels")

    def interval(self, key: PRNGKey) -> tuple[Scalar, Scalar]:
        """Returns the times (t, r) of one step."""
        k_whole, k_level, k_place = jr.split(key, 3)
        size = 2.0 ** -jr.randint(k_level, (), 0, self.levels)
        t = jnp.floor(jr.uniform(k_place) / size) * size
        return _or_whole(k_whole, t, t + size)

    def target(self, u: Average, slow: Average, v: Vector, x_t: Vector, t: Scalar, r: Scalar, key: PRNGKey) -> Vector:
        """Returns the target of the slow copy; half steps of the smallest size are velocities."""
        smallest = r - t <= 2.0**-self.levels * 2

        def half(x, t, r):
            return slow(x, t, jnp.where(smallest, t, r))

        return split_target(half, x_t, t, r, 0.5)


@dataclass(frozen=True)
class MeanFlow:
    """Steps between any two times, matched by a derivative (2505.13447). Row losses l become l / (l + .01)^power.

    Raises ValueError for a share outside (0, 1) or a negative power.
    """

    share: float = 0.75
    power: float = 0.0
    """The paper uses 1. The default 0 is the plain square, as in DM1 (2510.07865)."""
    averaged: ClassVar[bool] = True

    def __post_init__(self):
        _check_share(self)
        if not self.power >= 0:
            raise ValueError(f"MeanFlow: power must not be negative, got {self.power}")

    def interval(self, key: PRNGKey) -> tuple[Scalar, Scalar]:
        """Returns the times (t, r) of one step."""
        t, r = jnp.sort(jr.uniform(key, (2,)))
        return t, r

    def target(self, u: Average, slow: Average, v: Vector, x_t: Vector, t: Scalar, r: Scalar, key: PRNGKey) -> Vector:
        """Returns the target of the network itself."""
        return mean_flow_target(u, v, x_t, t, r)


@dataclass(frozen=True)
class SplitMeanFlow:
    """Steps between any two times, split at a random time in between (2507.16884); half of them run from 0 to 1.

    Raises ValueError for a share outside (0, 1).
    """

    share: float = 0.55
    """Fraction of rows trained by flow matching. Below one half, training finds trivial solutions such as u = 0."""
    averaged: ClassVar[bool] = True
    power: ClassVar[float] = 0.0

    def __post_init__(self):
        _check_share(self)

    def interval(self, key: PRNGKey) -> tuple[Scalar, Scalar]:
        """Returns the times (t, r) of one step."""
        k_whole, k_times = jr.split(key)
        t, r = jnp.sort(jr.uniform(k_times, (2,)))
        return _or_whole(k_whole, t, r)

    def target(self, u: Average, slow: Average, v: Vector, x_t: Vector, t: Scalar, r: Scalar, key: PRNGKey) -> Vector:
        """Returns the target of the slow copy."""
        return split_target(slow, x_t, t, r, jr.uniform(key))


Objective = Matching | Shortcut | MeanFlow | SplitMeanFlow


def dispersion(features: Float[Array, "B f"], tau: float = 0.5) -> Float[Array, ""]:
    """Returns log mean_ij exp(-|z_i - z_j|^2 / (f tau)) [] (2506.09027); minimising it spreads the features of a batch.

    This is the textbook form. The released code of DM1 (2510.07865) has no gradient where distances exceed 10 tau.
    """
    square = jnp.sum((features[:, None] - features[None]) ** 2, -1)
    return jax.nn.logsumexp(-square / (features.shape[1] * tau)) - 2 * jnp.log(features.shape[0])
