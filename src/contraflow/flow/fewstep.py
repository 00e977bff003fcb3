"""Average velocities: u(x_t, t, r) = (x_r - x_t) / (r - t) along the flow, so that a step of any size is exact.

u(x, t, t) is the velocity itself, learned by flow matching; the targets here make larger steps consistent with smaller
ones. They take one sample, with t < r, and no gradient goes through them.
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
"""Of noisy actions and average velocities: N(0, 1) minus [-1, 1], or minus the atanh of an action, hardly ever exceeds
it, but a network that is its own teacher may, and then grows without end."""


def sample_average_velocity(u: Average, x0: Vector, steps: int) -> Vector:
    """x_1 from x_0 in `steps` equal steps x + (r - t) u(x, t, r)."""

    def step(x, k):
        return x + u(x, k / steps, (k + 1) / steps) / steps, None

    return jax.lax.scan(step, x0, jnp.arange(steps, dtype=x0.dtype))[0]


def split_target(u: Average, x_t: Vector, t: Scalar, r: Scalar, share: Scalar | float) -> Vector:
    """share u(x_t, t, q) + (1 - share) u(x_q, q, r), q = t + share (r - t): two steps in place of one.

    SplitMeanFlow (2507.16884); the shortcut target (2410.12557) for share = 1/2; the limit share -> 0 is MeanFlow's.
    x_q and the target are clipped to +-`BOUND`.
    """
    q = t + share * (r - t)
    first = u(x_t, t, q)
    second = u(jnp.clip(x_t + (q - t) * first, -BOUND, BOUND), q, r)
    return jax.lax.stop_gradient(jnp.clip(share * first + (1 - share) * second, -BOUND, BOUND))


def mean_flow_target(u: Average, v: Vector, x_t: Vector, t: Scalar, r: Scalar) -> Vector:
    """v + (r - t) d/dt u(x_t, t, r), the total derivative along v (2505.13447, eq. 6, in our direction of time).

    The velocity v may be that of one pair, x1 - x0: the target is linear in it where u is held fixed.
    """
    t, r = jnp.asarray(t, x_t.dtype), jnp.asarray(r, x_t.dtype)
    _, change = jax.jvp(u, (x_t, t, r), (v, jnp.ones_like(t), jnp.zeros_like(r)))
    return jax.lax.stop_gradient(v + (r - t) * change)


@dataclass(frozen=True)
class Matching:
    """Flow matching only: no step but the infinitesimal one is learned."""

    share: ClassVar[float] = 1.0
    averaged: ClassVar[bool] = False
    power: ClassVar[float] = 0.0


def _check_share(objective: "Shortcut | MeanFlow | SplitMeanFlow") -> None:
    if not 0 < objective.share < 1:
        raise ValueError(f"{type(objective).__name__}: share must lie between 0 and 1, got {objective.share}")


def _or_whole(key: PRNGKey, t: Scalar, r: Scalar) -> tuple[Scalar, Scalar]:
    """(t, r) or, half the time, (0, 1): the step of a policy of one evaluation, for which random times rarely ask."""
    whole = jr.bernoulli(key)
    return jnp.where(whole, 0.0, t), jnp.where(whole, 1.0, r)


@dataclass(frozen=True)
class Shortcut:
    """Steps of 1, 1/2, ... from their own grid, each equal to two of half its size, 2^-levels the smallest
    (2410.12557; in its released code all sizes are equally frequent, here half are the whole step)."""

    share: float = 0.5
    """Of the rows that are matched to the flow; the others make steps consistent."""
    levels: int = 5
    averaged: ClassVar[bool] = True
    power: ClassVar[float] = 0.0

    def __post_init__(self):
        _check_share(self)
        check_count(self, 1, "levels")

    def interval(self, key: PRNGKey) -> tuple[Scalar, Scalar]:
        """(t, r) of one step."""
        k_whole, k_level, k_place = jr.split(key, 3)
        size = 2.0 ** -jr.randint(k_level, (), 0, self.levels)
        t = jnp.floor(jr.uniform(k_place) / size) * size
        return _or_whole(k_whole, t, t + size)

    def target(self, u: Average, slow: Average, v: Vector, x_t: Vector, t: Scalar, r: Scalar, key: PRNGKey) -> Vector:
        """By the slow copy; the smallest half steps are velocities."""
        smallest = r - t <= 2.0**-self.levels * 2

        def half(x, t, r):
            return slow(x, t, jnp.where(smallest, t, r))

        return split_target(half, x_t, t, r, 0.5)


@dataclass(frozen=True)
class MeanFlow:
    """Any two times, by a derivative (2505.13447). Row losses l become l / (l + .01)^power, as there."""

    share: float = 0.75
    power: float = 0.0
    """1 in the paper; 0, the plain square, as in DM1 (2510.07865)."""
    averaged: ClassVar[bool] = True

    def __post_init__(self):
        _check_share(self)
        if not self.power >= 0:
            raise ValueError(f"MeanFlow: power must not be negative, got {self.power}")

    def interval(self, key: PRNGKey) -> tuple[Scalar, Scalar]:
        t, r = jnp.sort(jr.uniform(key, (2,)))
        return t, r

    def target(self, u: Average, slow: Average, v: Vector, x_t: Vector, t: Scalar, r: Scalar, key: PRNGKey) -> Vector:
        """By the network itself."""
        return mean_flow_target(u, v, x_t, t, r)


@dataclass(frozen=True)
class SplitMeanFlow:
    """Any two times, by a random one in between (2507.16884); for half of them 0 and 1."""

    share: float = 0.55
    """Below a half the trivial solutions of the identity win, of which u = 0 is one."""
    averaged: ClassVar[bool] = True
    power: ClassVar[float] = 0.0

    def __post_init__(self):
        _check_share(self)

    def interval(self, key: PRNGKey) -> tuple[Scalar, Scalar]:
        k_whole, k_times = jr.split(key)
        t, r = jnp.sort(jr.uniform(k_times, (2,)))
        return _or_whole(k_whole, t, r)

    def target(self, u: Average, slow: Average, v: Vector, x_t: Vector, t: Scalar, r: Scalar, key: PRNGKey) -> Vector:
        """By the slow copy."""
        return split_target(slow, x_t, t, r, jr.uniform(key))


Objective = Matching | Shortcut | MeanFlow | SplitMeanFlow


def dispersion(features: Float[Array, "B f"], tau: float = 0.5) -> Float[Array, ""]:
    """log mean_ij exp(-|z_i - z_j|^2 / (f tau)), to be minimised: features of a batch pushed apart (2506.09027).

    Of the textbook form. DM1's released one (2510.07865) has no gradient where distances exceed 10 tau.
    """
    square = jnp.sum((features[:, None] - features[None]) ** 2, -1)
    return jax.nn.logsumexp(-square / (features.shape[1] * tau)) - 2 * jnp.log(features.shape[0])
