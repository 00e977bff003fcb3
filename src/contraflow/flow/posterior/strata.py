"""Distributions near the posterior of one coordinate of u = x1 given x_t, with quantiles that are cheap to compute.

The posterior is exp(Q / lambda) times a part known without the critic: N(x_t,j; alpha u_j, beta^2) for each coordinate
j, times sech^2(u_j) for a squashed policy, or restricted to a box. `Strata` follows that part closely and `BoxStrata`
exactly, so the weights of their candidates are close, or equal, to exp(Q / lambda). The quantiles allow stratified
sampling: of n candidates, one lies in each n-th of the probability.

Call `fit(path, x_t, t)`, then `quantile(rank) -> (u, r)` and its inverse `rank(u) -> (rank, r)`, one coordinate at a
time, with r = log N(x_t; alpha u, beta^2) - log q(u) up to a constant.
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
FLOOR = 0.05  # weight of the plain logistic distribution in the mixture, which bounds the density from below
TAIL = 1e-6  # probability; single precision has no quantiles beyond it


class Strata(eqx.Module):
    """q(u) = l(u) CELLS m_c(u): a logistic density l, cut into CELLS cells of equal probability with new masses m_c.

    If sech^2 and the likelihood were Gaussian, their product would have the mean and nearly the standard deviation of
    l. The masses make q follow the actual product. The density is positive at every u, for any x_t and t.
    """

    centre: Scalar
    scale: Scalar
    mass: Float[Array, " cells"]
    below: Float[Array, " cells"]
    """Probabilities of each cell (`mass`) and of all cells before it (`below`)."""
    x_t: Scalar
    alpha: Scalar
    beta: Scalar

    @classmethod
    def fit(cls, path: AbstractPath, x_t: Scalar, t: Scalar) -> "Strata":
        """Fits the distribution for one coordinate x_t [] at t [] with beta_t > 0."""
        a, b = path.alpha(t), path.beta(t)
        precision = 12.0 / jnp.pi**2 + (a / b) ** 2  # of sech^2 / 2 (logistic with scale 1/2) plus the likelihood
        centre, scale = a / b**2 * x_t / precision, 0.6 / jnp.sqrt(precision)
        u = centre + scale * logit((jnp.arange(CELLS) + 0.5) / CELLS)
        log_ratio = log_sech2(u) + norm.logpdf(x_t, a * u, b) - logistic.logpdf(u, centre, scale)
        mass = (1.0 - FLOOR) * jax.nn.softmax(log_ratio) + FLOOR / CELLS
        return cls(centre, scale, mass, jnp.cumsum(mass) - mass, x_t, a, b)

    def quantile(self, rank: Scalar) -> tuple[Scalar, Scalar]:
        """Returns u with probability `rank` in [0, 1] below it, and r."""
        cell = jnp.sum(rank >= self.below[1:])
        place = (cell + (rank - self.below[cell]) / self.mass[cell]) / CELLS
        u = self.centre + self.scale * logit(jnp.clip(place, TAIL, 1.0 - TAIL))
        return u, self._log_ratio(u, cell)

    def rank(self, u: Scalar) -> tuple[Scalar, Scalar]:
        """Returns the probability in [0, 1] below u, and r."""
        place = logistic.cdf(u, self.centre, self.scale) * CELLS
        cell = jnp.clip(place.astype(int), 0, CELLS - 1)
        return jnp.clip(self.below[cell] + self.mass[cell] * (place - cell), 0.0, 1.0), self._log_ratio(u, cell)

    def _log_ratio(self, u: Scalar, cell: Int[Array, ""]) -> Scalar:
        log_q = jnp.log(self.mass[cell] * CELLS) + logistic.logpdf(u, self.centre, self.scale)
        return norm.logpdf(self.x_t, self.alpha * u, self.beta) - log_q


class BoxStrata(eqx.Module):
    """q(u) = N(x_t / alpha, (beta / alpha)^2) on [-bound, bound], proportional to the likelihood: r = 0."""

    mean: Scalar
    std: Scalar
    bound: float = eqx.field(static=True)

    @classmethod
    def fit(cls, path: AbstractPath, x_t: Scalar, t: Scalar, bound: float) -> "BoxStrata":
        """Fits the distribution for one coordinate x_t [] at t [] with alpha_t > 0 and beta_t > 0."""
        return cls(x_t / path.alpha(t), path.beta(t) / path.alpha(t), bound)

    def quantile(self, rank: Scalar) -> tuple[Scalar, Scalar]:
        """Returns u with probability `rank` in [0, 1] between it and the end farther from the mean, and r."""
        rank = jnp.clip(rank, TAIL, 1.0 - TAIL)
        return truncated_quantile(rank, self.mean, self.std, self.bound), jnp.zeros_like(rank)

    def rank(self, u: Scalar) -> tuple[Scalar, Scalar]:
        """Returns the rank of u in [0, 1], and r."""
        return truncated_rank(u, self.mean, self.std, self.bound), jnp.zeros_like(u)
