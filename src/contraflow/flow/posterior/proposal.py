"""Proposals: distributions of candidates for x1 given x_t, which can be sampled and have a density in closed form.

All densities are over the latent endpoint u = x1, which for a squashed policy is the action before tanh.

A proposal has `sample(key, path, x_t, t, n, support) -> [n, d]` and `log_prob(x1, path, x_t, t, support) -> []`. Only
`Particles` uses `support` [P, d]. `boundary` is True when the density drops abruptly to zero. A Stein control variate
would then have a boundary term, so the estimators refuse it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import jax.random as jr
from jax.scipy.stats import norm
from jaxtyping import Array, Float, Int

from contraflow.core.types import PRNGKey
from contraflow.flow.path import AbstractPath, Scalar, Vector
from contraflow.flow.support import Tanh
from contraflow.flow.targets import log_normal

Samples = Float[Array, "n d"]
Support = Float[Array, "p d"] | None
Numbers = Float[Array, "*s"]


def systematic(key: PRNGKey, shares: Float[Array, " j"], n: int) -> Int[Array, " n"]:
    """Returns n sorted indices [n] by systematic resampling (Kitagawa 1996), with one random offset for all.

    Index j comes n shares[j] times on average, and never more than one off. `shares` [j] must sum to 1.
    """
    place = (jnp.arange(n) + jr.uniform(key)) / n
    return jnp.searchsorted(jnp.cumsum(shares)[:-1], place, side="right")


@dataclass(frozen=True)
class Noise:
    """q(u) = N(x_t / alpha, (beta / alpha)^2 I), which inverts x0 ~ N(0, I) along the path (RFM, 2601.08136)."""

    boundary: ClassVar[bool] = False

    def sample(self, key: PRNGKey, path: AbstractPath, x_t: Vector, t: Scalar, n: int, support: Support) -> Samples:
        return jax.vmap(path.x1_from_x0, (0, None, None))(jr.normal(key, (n, *x_t.shape)), x_t, t)

    def log_prob(self, x1: Vector, path: AbstractPath, x_t: Vector, t: Scalar, support: Support) -> Scalar:
        return log_normal(x1, x_t / path.alpha(t), path.beta(t) / path.alpha(t))


@dataclass(frozen=True)
class TruncatedNoise:
    """`Noise` truncated to u in [-bound, bound]^d, for latents in a box (QNE / MaxEntDP, 2502.11612).

    Raises ValueError unless the bound is positive and finite.
    """

    bound: float = 1.0
    boundary: ClassVar[bool] = True

    def __post_init__(self):
        if not 0 < self.bound < math.inf:
            raise ValueError(f"the bound of a truncated proposal must be positive, got {self.bound}")

    def sample(self, key: PRNGKey, path: AbstractPath, x_t: Vector, t: Scalar, n: int, support: Support) -> Samples:
        """Returns n draws [n, d], which lie in the box for any x_t."""
        mean, std = x_t / path.alpha(t), path.beta(t) / path.alpha(t)
        return jax.vmap(lambda place: truncated_quantile(place, mean, std, self.bound))(
            jr.uniform(key, (n, *x_t.shape))
        )

    def log_prob(self, x1: Vector, path: AbstractPath, x_t: Vector, t: Scalar, support: Support) -> Scalar:
        return truncated_log_prob(x1, x_t / path.alpha(t), path.beta(t) / path.alpha(t), self.bound)


def _within(mean: Numbers, std: Scalar, bound: float) -> tuple[Numbers, Numbers, Numbers]:
    """Returns sign, lower, upper with sign (u - mean) / std in [lower, upper] where |u| <= bound.

    The sign moves the interval to the negative side as far as possible. Cumulative probabilities are small there, so
    their logarithms and differences stay accurate however far out the box lies.
    """
    low, high = (-bound - mean) / std, (bound - mean) / std
    sign = jnp.where(low + high > 0, -1.0, 1.0)
    return sign, jnp.minimum(sign * low, sign * high), jnp.maximum(sign * low, sign * high)


def truncated_quantile(place: Numbers, mean: Numbers, std: Scalar, bound: float) -> Numbers:
    """Maps `place` in [0, 1] to N(mean, std^2) on [-bound, bound], elementwise, by the inverse distribution function.

    `place` counts from the end of the box that is farther from the mean.
    """
    sign, lower, upper = _within(mean, std, bound)
    # Inverts the log cumulative probability, because jr.truncated_normal breaks down beyond 5 std.
    log_p = jnp.logaddexp(jnp.log(place) + norm.logcdf(upper), jnp.log1p(-place) + norm.logcdf(lower))
    u = mean + std * sign * jnp.clip(_log_quantile(log_p), lower, upper)
    return jnp.clip(u, -bound, bound)  # rounding may cross the edge, where the density drops to 0


def truncated_rank(u: Numbers, mean: Numbers, std: Scalar, bound: float) -> Numbers:
    """Returns the `place` in [0, 1] that `truncated_quantile` maps to u in [-bound, bound]."""
    sign, lower, upper = _within(mean, std, bound)
    log_upper = norm.logcdf(upper)
    z = jnp.clip(sign * (u - mean) / std, lower, upper)
    # expm1 keeps small differences where the box is narrow and probabilities that underflow where it is far away.
    above, whole = jnp.expm1(norm.logcdf(z) - log_upper), jnp.expm1(norm.logcdf(lower) - log_upper)
    return jnp.clip(1.0 - above / whole, 0.0, 1.0)


def truncated_log_prob(x1: Numbers, mean: Numbers, std: Scalar, bound: float) -> Scalar:
    """Returns the log-density [] of N(mean, std^2 I) restricted to [-bound, bound]^d; -inf outside."""
    _, lower, upper = _within(mean, std, bound)
    log_upper, log_lower = norm.logcdf(upper), norm.logcdf(lower)
    log_mass = log_upper + jnp.log(-jnp.expm1(log_lower - log_upper))
    return jnp.where(jnp.all(jnp.abs(x1) <= bound), log_normal(x1, mean, std) - log_mass.sum(), -jnp.inf)


def _log_quantile(log_p: Numbers) -> Numbers:
    """Returns z with log Phi(z) = log_p, even where exp(log_p) underflows."""
    # In the tail, Newton's method starts at -sqrt(-2 log_p), left of the root of a concave function: no overshoot.
    z = -jnp.sqrt(-2.0 * log_p)
    for _ in range(5):
        z = z - (norm.logcdf(z) - log_p) * jnp.exp(norm.logcdf(z) - norm.logpdf(z))
    return jnp.where(log_p < -2.0, z, norm.ppf(jnp.exp(log_p)))


@dataclass(frozen=True)
class UniformAction:
    """Uniform actions a ~ U(-1, 1)^d, u = atanh a: q(u) = prod_j sech^2(u_j) / 2, which cancels the tanh Jacobian.

    Independent of x_t.
    """

    boundary: ClassVar[bool] = False

    def sample(self, key: PRNGKey, path: AbstractPath, x_t: Vector, t: Scalar, n: int, support: Support) -> Samples:
        return Tanh().uniform(key, n, *x_t.shape)

    def log_prob(self, x1: Vector, path: AbstractPath, x_t: Vector, t: Scalar, support: Support) -> Scalar:
        return Tanh().log_det(x1) - x1.shape[0] * jnp.log(2.0)


@dataclass(frozen=True)
class Particles:
    """Kernel density on the points `support` [P, d], such as policy samples, conditioned on x_t in closed form.

    Prior (1/P) sum_i N(u_i, h^2 I) and likelihood N(x_t; alpha u, beta^2 I) give the mixture sum_i pi_i N(m_i, V I),
    V = 1 / (1/h^2 + alpha^2/beta^2), m_i = V (u_i/h^2 + alpha x_t/beta^2),
    pi_i ~ N(x_t; alpha u_i, beta^2 + alpha^2 h^2). With `bound` each N(m_i, V I) is truncated to [-bound, bound]^d.
    Raises ValueError for a width h or a bound that is not positive, or a call without `support`.
    """

    width: float = 0.3
    bound: float | None = None

    @property
    def boundary(self) -> bool:
        return self.bound is not None

    def __post_init__(self):
        if self.width <= 0 or (self.bound is not None and self.bound <= 0):
            raise ValueError(f"{self}: the kernel width and the bound must be positive")

    def _mixture(self, path: AbstractPath, x_t: Vector, t: Scalar, support: Support):
        if support is None:
            raise ValueError("the proposal Particles needs support points: pass support=[P, d]")
        a, b, h = path.alpha(t), path.beta(t), self.width
        # Written without dividing by beta, which is tiny at t near 1.
        var = (b * h) ** 2 / (b**2 + (a * h) ** 2)
        means = jax.vmap(lambda u: (b**2 * u + h**2 * a * x_t) / (b**2 + (a * h) ** 2))(support)
        log_pi = jax.vmap(lambda u: log_normal(x_t, a * u, jnp.sqrt(b**2 + (a * h) ** 2)))(support)
        return jax.nn.log_softmax(log_pi), means, jnp.sqrt(var)

    def sample(self, key: PRNGKey, path: AbstractPath, x_t: Vector, t: Scalar, n: int, support: Support) -> Samples:
        log_pi, means, std = self._mixture(path, x_t, t, support)
        k_component, k_noise = jr.split(key)
        component = jr.categorical(k_component, log_pi, shape=(n,))
        if self.bound is None:
            return means[component] + std * jr.normal(k_noise, (n, *x_t.shape))
        place, bound = jr.uniform(k_noise, (n, *x_t.shape)), self.bound
        return jax.vmap(lambda p, m: truncated_quantile(p, m, std, bound))(place, means[component])

    def log_prob(self, x1: Vector, path: AbstractPath, x_t: Vector, t: Scalar, support: Support) -> Scalar:
        log_pi, means, std = self._mixture(path, x_t, t, support)
        bound = self.bound
        kernel = lambda m: log_normal(x1, m, std) if bound is None else truncated_log_prob(x1, m, std, bound)
        return jax.nn.logsumexp(log_pi + jax.vmap(kernel)(means))


@dataclass(frozen=True)
class Ramp:
    """Shares [2] of a two-part mixture: the first is `low` up to t = start, then rises linearly to 1 at t = end.

    Raises ValueError unless 0 <= low <= 1 and 0 <= start < end.
    """

    low: float = 0.1
    start: float = 0.3
    end: float = 0.9

    def __post_init__(self):
        if not (0 <= self.low <= 1 and 0 <= self.start < self.end):
            raise ValueError(f"{self}: needs 0 <= low <= 1 and 0 <= start < end")

    def __call__(self, t: Scalar) -> Float[Array, "2"]:
        first = jnp.clip(self.low + (1 - self.low) * (t - self.start) / (self.end - self.start), self.low, 1.0)
        return jnp.stack([first, 1.0 - first])


@dataclass(frozen=True)
class Mixture:
    """A mixture of proposals, q(u) = sum_j r_j q_j(u) (balance heuristic, Veach & Guibas 1995).

    Allocation is systematic: component j receives r_j n candidates on average, so dividing by q stays exactly unbiased
    for any shares. `shares` is a tuple, or a function of t that returns [J]. Raises ValueError for shares that are
    negative, do not sum to 1 or do not match the components.
    """

    components: tuple["Noise | UniformAction | Particles", ...] = (Noise(), UniformAction())
    shares: tuple[float, ...] | Ramp | Callable[[Scalar], Float[Array, " j"]] = Ramp()

    @property
    def boundary(self) -> bool:
        return any(c.boundary for c in self.components)

    def __post_init__(self):
        if isinstance(self.shares, tuple):
            if len(self.shares) != len(self.components):
                raise ValueError(f"Mixture has {len(self.components)} components but {len(self.shares)} shares")
            if min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-6:
                raise ValueError(f"Mixture shares {self.shares} must be non-negative and sum to 1")
        elif isinstance(self.shares, Ramp) and len(self.components) != 2:
            raise ValueError("Ramp gives shares for exactly two components: use a tuple or a function of t instead")

    def _shares(self, t: Scalar) -> Float[Array, " j"]:
        return jnp.asarray(self.shares) if isinstance(self.shares, tuple) else self.shares(t)

    def sample(self, key: PRNGKey, path: AbstractPath, x_t: Vector, t: Scalar, n: int, support: Support) -> Samples:
        k_offset, *keys = jr.split(key, len(self.components) + 1)
        # Every component draws n and one of them is kept, because the shares are traced; the critic sees the n kept.
        drawn = jnp.stack([c.sample(k, path, x_t, t, n, support) for c, k in zip(self.components, keys, strict=True)])
        return drawn[systematic(k_offset, self._shares(t), n), jnp.arange(n)]

    def log_prob(self, x1: Vector, path: AbstractPath, x_t: Vector, t: Scalar, support: Support) -> Scalar:
        logs = jnp.stack([c.log_prob(x1, path, x_t, t, support) for c in self.components])
        return jax.nn.logsumexp(logs, b=self._shares(t))


Proposal = Noise | TruncatedNoise | UniformAction | Particles | Mixture
