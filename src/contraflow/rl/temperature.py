"""The temperature lambda: constant, a function of the update count, or tuned to the entropy of the policy."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax.scipy.special import digamma
from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class Constant:
    """lambda = value > 0."""

    value: float = 0.02

    def __post_init__(self):
        if self.value <= 0:
            raise ValueError(f"a temperature must be positive, got {self.value}")

    def __call__(self, step: Int[Array, ""]) -> Float[Array, ""]:
        return jnp.asarray(self.value)


@dataclass(frozen=True)
class Anneal:
    """Log-linear from `start` to `end` over `steps` updates, constant afterwards."""

    start: float = 0.1
    end: float = 0.02
    steps: int = 50_000

    def __post_init__(self):
        if min(self.start, self.end) <= 0 or self.steps < 1:
            raise ValueError(f"{self}: temperatures must be positive and steps at least 1")

    def __call__(self, step: Int[Array, ""]) -> Float[Array, ""]:
        progress = jnp.clip(step / self.steps, 0.0, 1.0)
        return jnp.exp((1 - progress) * jnp.log(self.start) + progress * jnp.log(self.end))


@dataclass(frozen=True)
class Tuned:
    """lambda such that actions have `entropy` nats per dimension: log lambda += rate (entropy - that of the policy).

    As SAC tunes its own (1812.05905, eq. 18), here by particles. For actions in [-1, 1] uniform is log 2 = .69, and a
    Gaussian of standard deviation .1 has -.88, whatever the scale of rewards; lambda itself depends on that.
    """

    entropy: float = -0.5
    start: float = 0.1
    rate: float = 1e-3
    low: float = 1e-4
    high: float = 10.0

    def __post_init__(self):
        if not (0 < self.low <= self.start <= self.high and self.rate > 0):
            raise ValueError(f"{self}: needs 0 < low <= start <= high and a positive rate")

    def first(self) -> Float[Array, ""]:
        """log lambda before the first update."""
        return jnp.log(jnp.asarray(self.start, jnp.float32))

    def move(self, log_lam: Float[Array, ""], entropy: Float[Array, ""]) -> Float[Array, ""]:
        """log lambda after one at which the policy had this entropy per dimension."""
        new = log_lam + self.rate * (self.entropy - entropy)
        return jnp.clip(new, jnp.log(self.low), jnp.log(self.high))


def gaussian_entropy(actions: Float[Array, "n a"]) -> Float[Array, ""]:
    """mean_j log(std_j sqrt(2 pi e)) of n >= 2 draws, unbiased where they are Gaussian; above the entropy elsewhere.

    The logarithm of a sample variance is too low by log k - digamma(k), k = (n - 1) / 2.
    """
    k = (actions.shape[0] - 1) / 2
    log_var = jnp.log(actions.var(0, ddof=1) + 1e-12) + jnp.log(k) - digamma(k)
    return jnp.mean(0.5 * (log_var + jnp.log(2 * jnp.pi * jnp.e)))


Schedule = Constant | Anneal


def current(
    temperature: Constant | Anneal | Tuned, step: Int[Array, ""], log_lam: Float[Array, ""] | None
) -> Float[Array, ""]:
    """lambda [] at an update: of a schedule by the count of updates, of a tuned one by what has been learned."""
    if isinstance(temperature, Tuned):
        assert log_lam is not None
        return jnp.exp(log_lam)
    return temperature(step)
