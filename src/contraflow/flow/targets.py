"""Unnormalised log-densities of the endpoint x1, and test targets with known posterior means.

Every target is a function x [d] -> log pi(x) [] with two more methods:

    posterior_mean(path, x_t [d], t []) -> E[x1 | x_t] [d],  x1 ~ pi,  x_t = alpha x1 + beta x0,  x0 ~ N(0, I)
    sample(key, n) -> [n, d]                                 independent draws of x1

Both are exact up to rounding, except that `Separable` uses a fine one-dimensional quadrature per coordinate.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.scipy.stats import norm
from jaxtyping import Array, Float

from contraflow.core.types import PRNGKey
from contraflow.flow.path import AbstractPath, Scalar, Vector

LogDensity = Callable[[Vector], Scalar]
Draws = Float[Array, "n d"]


def _number(x: float | Scalar) -> Scalar:
    return jnp.asarray(x, float)  # float64 where enabled; never weakly typed, which would trigger a second trace


def log_sech2(u: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Returns log sech^2 u = log d tanh(u)/du = -2 (logaddexp(u, -u) - log 2), elementwise and without overflow."""
    return -2.0 * (jnp.logaddexp(u, -u) - jnp.log(2.0))


def log_normal(x: Vector, mean: Vector, std: Scalar | Vector) -> Scalar:
    """Returns log N(x; mean, std^2 I) [], summed over coordinates."""
    return norm.logpdf(x, mean, std).sum()


class Gaussian(eqx.Module):
    """N(mean [d], std^2 I), normalised; E[x1 | x_t] = (beta^2 mean + alpha std^2 x_t) / (beta^2 + alpha^2 std^2)."""

    mean: Vector
    std: Scalar = eqx.field(converter=_number)

    def __call__(self, x: Vector) -> Scalar:
        return log_normal(x, self.mean, self.std)

    def posterior_mean(self, path: AbstractPath, x_t: Vector, t: Scalar) -> Vector:
        a, b = path.alpha(t), path.beta(t)
        return (b**2 * self.mean + a * self.std**2 * x_t) / (b**2 + (a * self.std) ** 2)

    def sample(self, key: PRNGKey, n: int) -> Draws:
        return jax.vmap(lambda e: self.mean + self.std * e)(jr.normal(key, (n, *self.mean.shape)))


class GaussianMixture(eqx.Module):
    """sum_i weights_i N(means_i, std_i^2 I), normalised; means [m, d], std [m] or a number, weights [m] or None.

    Given x_t the posterior is again a mixture, with responsibilities
    r_i ~ weights_i N(x_t; alpha means_i, beta^2 + alpha^2 std_i^2) and
    E[x1 | x_t] = sum_i r_i (beta^2 means_i + alpha std_i^2 x_t) / (beta^2 + alpha^2 std_i^2).
    The weights are divided by their sum. Raises ValueError if `std` or `weights` lack one entry per component.
    """

    means: Float[Array, "m d"]
    std: Float[Array, " m"]
    log_weights: Float[Array, " m"]

    def __init__(self, means, std, weights=None):
        self.means = jnp.asarray(means, float)
        m = self.means.shape[0]
        weights = jnp.ones(m) if weights is None else jnp.asarray(weights, self.means.dtype)
        std = jnp.asarray(std, self.means.dtype)
        if weights.shape != (m,) or std.shape not in ((), (m,)):
            raise ValueError(f"{m} components need std and weights [{m}], got shapes {std.shape} and {weights.shape}")
        self.std = jnp.broadcast_to(std, (m,))
        self.log_weights = jnp.log(weights) - jnp.log(weights.sum())

    def __call__(self, x: Vector) -> Scalar:
        parts = jax.vmap(lambda m, s: log_normal(x, m, s))(self.means, self.std)
        return jax.nn.logsumexp(self.log_weights + parts)

    def posterior_mean(self, path: AbstractPath, x_t: Vector, t: Scalar) -> Vector:
        a, b = path.alpha(t), path.beta(t)

        def component(mean, std):
            var = b**2 + (a * std) ** 2
            return log_normal(x_t, a * mean, jnp.sqrt(var)), (b**2 * mean + a * std**2 * x_t) / var

        log_r, means = jax.vmap(component)(self.means, self.std)
        return jax.nn.softmax(self.log_weights + log_r) @ means

    def sample(self, key: PRNGKey, n: int) -> Draws:
        k_component, k_noise = jr.split(key)
        i = jr.categorical(k_component, self.log_weights, shape=(n,))
        return self.means[i] + self.std[i][:, None] * jr.normal(k_noise, (n, self.means.shape[1]))


def eight_gaussians(radius: float = 2.0, std: float = 0.2) -> GaussianMixture:
    """Returns eight equal modes on a circle in the plane."""
    angle = jnp.arange(8) * (jnp.pi / 4)
    return GaussianMixture(radius * jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1), std)


def two_moons(scale: float = 2.0, std: float = 0.2, points: int = 64) -> GaussianMixture:
    """Returns two interleaved half circles of radius `scale` in the plane, centred at 0 and blurred by N(0, std^2 I).

    `points` equally spaced angles represent the uniform distribution on each arc, so every answer has a closed form.
    The ripple along an arc has relative size exp(-2 pi^2 std^2 / spacing^2): 1e-34 for the defaults.
    """
    # Cell centres, not end points: the trapezoid rule would need half weights at the tips.
    angle = (jnp.arange(points) + 0.5) * (jnp.pi / points)
    upper = jnp.stack([jnp.cos(angle) - 0.5, jnp.sin(angle) - 0.25], -1)
    return GaussianMixture(scale * jnp.concatenate([upper, -upper]), std)


def forty_gaussians(unit: float = 20.0) -> GaussianMixture:
    """Returns forty equal modes in the plane: means uniform in [-40, 40]^2, std softplus(1) = 1.313, both divided by
    `unit`. With unit = 20 the means lie in [-2, 2]^2 and the std is .066.

    This is the benchmark of FAB (2208.01893) and iDEM (2402.06121), but its means come from another generator and
    differ from theirs.
    """
    means = np.random.RandomState(0).uniform(-40.0, 40.0, (40, 2))  # NumPy froze this stream; JAX may change its own
    return GaussianMixture(means / unit, float(np.log1p(np.e)) / unit)


class Separable(eqx.Module):
    """A squashed target of any dimension: log pi(u) = sum_j f_j(tanh u_j) + log sech^2 u_j, like exp(Q / lambda).

    f_j(a) = (slope_j a + sum_i heights_ij exp(-(a - centres_ij)^2 / (2 width^2))) / temperature,  slope [d],
    heights, centres [m, d]. The coordinates stay independent given x_t, so E[u_j | x_t] is a one-dimensional integral.
    """

    slope: Vector
    heights: Float[Array, "m d"]
    centres: Float[Array, "m d"]
    width: Scalar = eqx.field(converter=_number, default=0.2)
    temperature: Scalar = eqx.field(converter=_number, default=1.0)

    @classmethod
    def two_modes(cls, dim: int, temperature: float = 0.2, width: float = 0.2) -> "Separable":
        """Modes of height 1 and .8 near a = .6 and -.5; odd coordinates are mirrored, so that no average hides one."""
        sign = (-jnp.ones(dim)) ** jnp.arange(dim)
        centres = jnp.stack([0.6 * sign, -0.5 * sign])
        heights = jnp.stack([jnp.ones(dim), jnp.full(dim, 0.8)])
        return cls(jnp.zeros(dim), heights, centres, width, temperature)

    @classmethod
    def linear(cls, slope: Vector, temperature: float = 1.0) -> "Separable":
        """f(a) = slope . a / temperature; slope 0 makes the actions uniform."""
        return cls(slope, jnp.zeros((0, *slope.shape)), jnp.zeros((0, *slope.shape)), 1.0, temperature)

    def __call__(self, u: Vector) -> Scalar:
        return self._log_factors(u).sum()

    def moments(self) -> tuple[Vector, Vector]:
        """Returns the mean and the standard deviation of u, each [d]."""
        u, w = self._table()
        mean = jnp.sum(w * u, 0)
        return mean, jnp.sqrt(jnp.sum(w * jax.vmap(lambda v: (v - mean) ** 2)(u), 0))

    def posterior_mean(self, path: AbstractPath, x_t: Vector, t: Scalar) -> Vector:
        """Returns E[x1 | x_t] [d] by quadrature in each dimension; needs alpha_t > 0 and beta_t > 0."""
        a, b = path.alpha(t), path.beta(t)
        centre, std = x_t / a, b / a
        # The posterior lies where both factors do. One bound is `reach` from the centre of the likelihood: the slope 2
        # of log sech^2 moves it by 2 std^2, and f by no more than its range. The other is +-LIMIT, or a centre beyond.
        swing = (2.0 * jnp.abs(self.slope) + jnp.abs(self.heights).sum(0)) / self.temperature
        reach = 2.0 * std**2 + std * jnp.sqrt(2.0 * (40.0 + swing))
        beyond = 8.0 * jnp.minimum(std, 1.0)
        low = jnp.maximum(centre - reach, jnp.minimum(-_LIMIT, centre - beyond))
        high = jnp.minimum(centre + reach, jnp.maximum(_LIMIT, centre + beyond))
        u = jnp.linspace(low, high, _POINTS)
        w = jax.nn.softmax(jax.vmap(lambda v: self._log_factors(v) + norm.logpdf(x_t, a * v, b))(u), axis=0)
        return jnp.sum(w * u, 0)

    def sample(self, key: PRNGKey, n: int) -> Draws:
        u, w = self._table()
        mid = 0.5 * (u[1:] + u[:-1])
        cdf = jnp.cumsum(w, 0)[:-1]
        place = jr.uniform(key, (n, self.slope.shape[0]))
        return jax.vmap(jnp.interp, (1, 1, 1), 1)(place, cdf, mid)

    def _log_factors(self, u: Vector) -> Vector:
        action = jnp.tanh(u)
        bumps = jax.vmap(lambda h, c: h * jnp.exp(-0.5 * ((action - c) / self.width) ** 2))(self.heights, self.centres)
        return (self.slope * action + bumps.sum(0)) / self.temperature + log_sech2(u)

    def _table(self) -> tuple[Float[Array, "g d"], Float[Array, "g d"]]:
        """Returns the grid points and their probabilities for every coordinate, each [g, d]."""
        u = jax.vmap(lambda v: jnp.full_like(self.slope, v))(jnp.linspace(-_LIMIT, _LIMIT, _POINTS))
        return u, jax.nn.softmax(jax.vmap(self._log_factors)(u), axis=0)


# The grid is uniform in u, where the trapezoid rule converges faster than any power. A grid in the action is too coarse
# for |u| > 3 at t near 1. The tails hold less than 4 exp(-2 LIMIT) = 2e-10 of the mass.
_LIMIT = 12.0
_POINTS = 4001

Target = Gaussian | GaussianMixture | Separable
