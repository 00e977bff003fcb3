"""Distributions near the posterior of one coordinate of u = x1 given x_t, whose quantiles are cheap.

The posterior is exp(Q / lambda) times what is known without the critic: N(x_t,j; alpha u_j, beta^2) for each coordinate
j, times sech^2(u_j) for a squashed policy, or restricted to a box. The distributions here follow that part, `Strata`
nearly and `BoxStrata` exactly, so that the weights of their candidates are nearly, or exactly, exp(Q / lambda). With
quantiles they can be stratified: of n one lies in each n-th of the probability.

`fit(path, x_t, t)`, then `quantile(rank) -> (u, r)` and its inverse `rank(u) -> (rank, r)`, one coordinate at a time,
where r = log N(x_t; alpha u, beta^2) - log q(u) up to a constant.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import logit
from jax.scipy.stats import logistic, norm
from jaxtyping import Array, Float, Int

from contraflow.flow.path import AbstractPath, Scalar
from contraflow.flow.posterior.proposal import truncated_quantile, truncated_rank
from contraflow.flow.targets import log_sech2

CELLS = 32
FLOOR = 0.05  # share of the logistic distribution by itself, so that the density is nowhere far below its
TAIL = 1e-6  # of the probability; beyond it single precision has no quantiles


class Strata(eqx.Module):
    """q(u) = l(u) CELLS m_c(u): a logistic density l, times what gives its c-th of CELLS equal shares the mass m_c.

    The logistic distribution has the mean and nearly the deviation that sech^2 and the likelihood would have together
    if both were Gaussian, and the factors make q follow their product. Every u has a density, whatever x_t and t.
    """

    centre: Scalar
    scale: Scalar
    mass: Float[Array, " cells"]
    below: Float[Array, " cells"]
    """Probability of a cell and of those before it."""
    x_t: Scalar
    alpha: Scalar
    beta: Scalar

    @classmethod
    def fit(cls, path: AbstractPath, x_t: Scalar, t: Scalar) -> "Strata":
        """x_t: the coordinate, t with beta_t > 0."""
        a, b = path.alpha(t), path.beta(t)
        precision = 12.0 / jnp.pi**2 + (a / b) ** 2  # of sech^2 / 2, which is logistic of scale 1/2, and the likelihood
        centre, scale = a / b**2 * x_t / precision, 0.6 / jnp.sqrt(precision)
        u = centre + scale * logit((jnp.arange(CELLS) + 0.5) / CELLS)
        log_ratio = log_sech2(u) + norm.logpdf(x_t, a * u, b) - logistic.logpdf(u, centre, scale)
        mass = (1.0 - FLOOR) * jax.nn.softmax(log_ratio) + FLOOR / CELLS
        return cls(centre, scale, mass, jnp.cumsum(mass) - mass, x_t, a, b)

    def quantile(self, rank: Scalar) -> tuple[Scalar, Scalar]:
        """u with the probability `rank` in [0, 1] below it, and r."""
        cell = jnp.sum(rank >= self.below[1:])
        place = (cell + (rank - self.below[cell]) / self.mass[cell]) / CELLS
        u = self.centre + self.scale * logit(jnp.clip(place, TAIL, 1.0 - TAIL))
        return u, self._log_ratio(u, cell)

    def rank(self, u: Scalar) -> tuple[Scalar, Scalar]:
        """The probability in [0, 1] below u, and r."""
        place = logistic.cdf(u, self.centre, self.scale) * CELLS
        cell = jnp.clip(place.astype(int), 0, CELLS - 1)
        return jnp.clip(self.below[cell] + self.mass[cell] * (place - cell), 0.0, 1.0), self._log_ratio(u, cell)

    def _log_ratio(self, u: Scalar, cell: Int[Array, ""]) -> Scalar:
        log_q = jnp.log(self.mass[cell] * CELLS) + logistic.logpdf(u, self.centre, self.scale)
        return norm.logpdf(self.x_t, self.alpha * u, self.beta) - log_q


class BoxStrata(eqx.Module):
    """q(u) = N(x_t / alpha, (beta / alpha)^2) on [-bound, bound], to which the likelihood is proportional: r = 0."""

    mean: Scalar
    std: Scalar
    bound: float = eqx.field(static=True)

    @classmethod
    def fit(cls, path: AbstractPath, x_t: Scalar, t: Scalar, bound: float) -> "BoxStrata":
        """x_t: the coordinate, t with alpha_t > 0 and beta_t > 0."""
        return cls(x_t / path.alpha(t), path.beta(t) / path.alpha(t), bound)

    def quantile(self, rank: Scalar) -> tuple[Scalar, Scalar]:
        """u with the probability `rank` in [0, 1] on its side of the end farther from the mean, and r."""
        rank = jnp.clip(rank, TAIL, 1.0 - TAIL)
        return truncated_quantile(rank, self.mean, self.std, self.bound), jnp.zeros_like(rank)

    def rank(self, u: Scalar) -> tuple[Scalar, Scalar]:
        """The rank of u, and r."""
        return truncated_rank(u, self.mean, self.std, self.bound), jnp.zeros_like(u)
