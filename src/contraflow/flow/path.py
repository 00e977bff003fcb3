"""Paths x_t = alpha_t x1 + beta_t x0 from noise (t = 0, x0 ~ N(0, I)) to data (t = 1), with all their conversions.

Velocity, score, E[x0 | x_t] and E[x1 | x_t] are the same posterior mean in four forms. With
D_t = alpha'_t beta_t - alpha_t beta'_t > 0 the conversions are linear and exact:

    velocity v = alpha' E[x1] + beta' E[x0],   x1 = (beta v - beta' x_t) / D,   x0 = (alpha' x_t - alpha v) / D,
    score = -E[x0] / beta.

To add a path, write a frozen dataclass with `alpha` and `beta`. `jax.jvp` supplies the derivatives.
Sources: Lipman et al. 2210.02747; Albergo et al. 2303.08797.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Scalar = Float[Array, ""]
Vector = Float[Array, " d"]
Times = Float[Array, "*h"]
"""One time for all numbers of x, or one for each of the h actions of a chunk."""


def _derivative(f: Callable[[Scalar], Scalar], t: Scalar) -> Scalar:
    return jax.jvp(f, (t,), (jnp.ones_like(t),))[1]


@dataclass(frozen=True)
class AbstractPath:
    """Interface: `alpha(t)`, `beta(t)`; everything else follows. One sample in; `vmap` over batches."""

    def alpha(self, t: Scalar) -> Scalar:
        raise NotImplementedError("a path defines alpha(t)")

    def beta(self, t: Scalar) -> Scalar:
        raise NotImplementedError("a path defines beta(t)")

    def d_alpha(self, t: Scalar) -> Scalar:
        """alpha'_t."""
        return _derivative(self.alpha, t)

    def d_beta(self, t: Scalar) -> Scalar:
        """beta'_t."""
        return _derivative(self.beta, t)

    @property
    def source_scale(self) -> float:
        """Standard deviation of x_t at t = 0 when alpha_0 x1 is negligible: where a solver starts, beta_0 N(0, I)."""
        return 1.0

    def perturb(self, x0: Vector, x1: Vector, t: Scalar) -> Vector:
        """x_t = alpha_t x1 + beta_t x0."""
        return self.alpha(t) * x1 + self.beta(t) * x0

    def x0_from_x1(self, x1: Vector, x_t: Vector, t: Scalar) -> Vector:
        """x0 = (x_t - alpha x1) / beta; undefined where beta = 0."""
        return (x_t - self.alpha(t) * x1) / self.beta(t)

    def x1_from_x0(self, x0: Vector, x_t: Vector, t: Scalar) -> Vector:
        """x1 = (x_t - beta x0) / alpha; undefined where alpha = 0."""
        return (x_t - self.beta(t) * x0) / self.alpha(t)

    def velocity(self, x1: Vector, x_t: Vector, t: Scalar) -> Vector:
        """v = (beta'/beta) x_t + (D/beta) x1; linear path: (x1 - x_t) / (1 - t). Undefined where beta = 0."""
        return (self.d_beta(t) * x_t + self.wronskian(t) * x1) / self.beta(t)

    def velocity_from_x0(self, x0: Vector, x_t: Vector, t: Scalar) -> Vector:
        """v = (alpha'/alpha) x_t - (D/alpha) x0. Undefined where alpha = 0."""
        return (self.d_alpha(t) * x_t - self.wronskian(t) * x0) / self.alpha(t)

    def velocity_from_score(self, score: Vector, x_t: Vector, t: Scalar) -> Vector:
        """v = (alpha'/alpha) x_t + (beta D/alpha) score. Undefined where alpha = 0."""
        return self.velocity_from_x0(-self.beta(t) * score, x_t, t)

    def x1_from_velocity(self, v: Vector, x_t: Vector, t: Scalar) -> Vector:
        """E[x1 | x_t] = (beta v - beta' x_t) / D; safe for all t."""
        return (self.beta(t) * v - self.d_beta(t) * x_t) / self.wronskian(t)

    def x0_from_velocity(self, v: Vector, x_t: Vector, t: Scalar) -> Vector:
        """E[x0 | x_t] = (alpha' x_t - alpha v) / D; safe for all t."""
        return (self.d_alpha(t) * x_t - self.alpha(t) * v) / self.wronskian(t)

    def score_from_velocity(self, v: Vector, x_t: Vector, t: Scalar) -> Vector:
        """grad log p_t(x_t) = -E[x0 | x_t] / beta. Undefined where beta = 0."""
        return -self.x0_from_velocity(v, x_t, t) / self.beta(t)

    def log_snr(self, t: Scalar) -> Scalar:
        """log (alpha^2 / beta^2), increasing in t."""
        return 2.0 * (jnp.log(self.alpha(t)) - jnp.log(self.beta(t)))

    def inverse_log_snr(self, log_snr: Scalar) -> Scalar:
        """The t in [0, 1] with the given log signal-to-noise ratio, by bisection (some paths have a closed form)."""

        def halve(_, bounds):
            low, high = bounds
            mid = 0.5 * (low + high)
            below = self.log_snr(mid) < log_snr
            return jnp.where(below, mid, low), jnp.where(below, high, mid)

        zero = jnp.zeros_like(log_snr)
        low, high = jax.lax.fori_loop(0, 60, halve, (zero, zero + 1.0))
        return 0.5 * (low + high)

    def wronskian(self, t: Scalar) -> Scalar:
        """D_t."""
        return self.d_alpha(t) * self.beta(t) - self.alpha(t) * self.d_beta(t)


@dataclass(frozen=True)
class Linear(AbstractPath):
    """alpha = t, beta = 1 - t (conditional optimal transport; the default)."""

    def alpha(self, t):
        return t

    def beta(self, t):
        return 1.0 - t

    def inverse_log_snr(self, log_snr):
        return jax.nn.sigmoid(0.5 * log_snr)


@dataclass(frozen=True)
class Polynomial(AbstractPath):
    """alpha = t^n, beta = 1 - t^n."""

    power: float = 2.0

    def alpha(self, t):
        return t**self.power

    def beta(self, t):
        return 1.0 - t**self.power


@dataclass(frozen=True)
class Cosine(AbstractPath):
    """alpha = sin(pi t / 2), beta = cos(pi t / 2); variance preserving, alpha^2 + beta^2 = 1."""

    def alpha(self, t):
        return jnp.sin(0.5 * jnp.pi * t)

    def beta(self, t):
        return jnp.cos(0.5 * jnp.pi * t)

    def inverse_log_snr(self, log_snr):
        return 2.0 / jnp.pi * jnp.arctan(jnp.exp(0.5 * log_snr))


@dataclass(frozen=True)
class VP(AbstractPath):
    """alpha = exp(-T/2), beta = sqrt(1 - exp(-T)), T = (1-t)^2 (b_max - b_min)/2 + (1-t) b_min (DDPM, Song 2011.13456).

    alpha_0 = .0066 rather than 0, so a little of x1 is left at the source; beta' diverges at t = 1. ValueError unless
    0 < b_min <= b_max.
    """

    b_min: float = 0.1
    b_max: float = 20.0

    def __post_init__(self):
        if not 0 < self.b_min <= self.b_max < math.inf:
            raise ValueError(f"VP needs 0 < b_min <= b_max, got {self.b_min} and {self.b_max}")

    def _log_decay(self, t):
        left = jnp.maximum(1.0 - t, 0.0)  # a time computed as (k + 1) / n may come out just above 1
        return 0.5 * left**2 * (self.b_max - self.b_min) + left * self.b_min

    def alpha(self, t):
        return jnp.exp(-0.5 * self._log_decay(t))

    def beta(self, t):
        return jnp.sqrt(-jnp.expm1(-self._log_decay(t)))


@dataclass(frozen=True)
class VE(AbstractPath):
    """alpha = 1, beta = s_max (s_min / s_max)^t; the source has standard deviation s_max, not 1 (Song 2011.13456).

    ValueError unless 0 < s_min < s_max.
    """

    s_min: float = 0.01
    s_max: float = 10.0

    def __post_init__(self):
        if not 0 < self.s_min < self.s_max < math.inf:
            raise ValueError(f"VE needs 0 < s_min < s_max, got {self.s_min} and {self.s_max}")

    @property
    def source_scale(self):
        return self.s_max

    def alpha(self, t):
        return jnp.ones_like(t)

    def beta(self, t):
        return self.s_max * (self.s_min / self.s_max) ** t


Path = Linear | Polynomial | Cosine | VP | VE
