"""The temperature lambda: constant, scheduled by the number of updates, or tuned to an entropy.

`first()` is lambda before the first update. `following(lam, step, entropy)` is lambda after an update that used `lam`
and measured `entropy`, with `step` updates made so far.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax.numpy as jnp
from jax.scipy.special import digamma
from jaxtyping import Array, Float, Int

Scalar = Float[Array, ""]


@dataclass(frozen=True)
class Constant:
    """lambda = value. Raises ValueError unless value > 0."""

    of: ClassVar[None] = None

    value: float = 0.02

    def __post_init__(self):
        if self.value <= 0:
            raise ValueError(f"a temperature must be positive, got {self.value}")

    def first(self) -> Scalar:
        return jnp.asarray(self.value, jnp.float32)

    def following(self, lam: Scalar, step: Int[Array, ""], entropy: Scalar) -> Scalar:
        return lam


@dataclass(frozen=True)
class Anneal:
    """Log-linear from `start` to `end` over `steps` updates, then constant.

    Raises ValueError unless both temperatures are positive and steps >= 1.
    """

    of: ClassVar[None] = None

    start: float = 0.1
    end: float = 0.02
    steps: int = 50_000

    def __post_init__(self):
        if min(self.start, self.end) <= 0 or self.steps < 1:
            raise ValueError(f"{self}: temperatures must be positive and steps at least 1")

    def first(self) -> Scalar:
        return jnp.asarray(self.start, jnp.float32)

    def following(self, lam: Scalar, step: Int[Array, ""], entropy: Scalar) -> Scalar:
        progress = jnp.clip(step / self.steps, 0.0, 1.0)
        return jnp.exp((1 - progress) * jnp.log(self.start) + progress * jnp.log(self.end))


@dataclass(frozen=True)
class Tuned:
    """Tunes lambda until a measured entropy is `entropy` nats: log lambda += rate (entropy - measured entropy).

    - of="actions": the entropy of the policy's actions per dimension, as in SAC (1812.05905), but estimated from
      particles (`nearest_entropy`). On [-1, 1] a uniform distribution has log 2 = .69 and exp(4.5 a) has -.5, whatever
      the scale of rewards.
    - of="weights": the entropy of the weights of n candidates, log n if all are equal. For the estimators of RFM it is
      the logarithm of the effective sample size 1 / sum w^2 (the entropy of order two), averaged over queries. These
      weights also depend on x_t, so log n may be out of reach at any temperature.

    Raises ValueError for a target entropy of weights <= 0, a rate <= 0, or unless 0 < low <= start <= high.
    """

    entropy: float = -0.5
    of: Literal["actions", "weights"] = "actions"
    start: float = 0.1
    rate: float = 1e-3
    low: float = 1e-4
    high: float = 10.0

    def __post_init__(self):
        if self.of == "weights" and self.entropy <= 0:
            raise ValueError(f"{self}: the entropy of weights is positive, log 8 = 2.08 for an effective size of eight")
        if not (0 < self.low <= self.start <= self.high and self.rate > 0):
            raise ValueError(f"{self}: needs 0 < low <= start <= high and a positive rate")

    def first(self) -> Scalar:
        return jnp.asarray(self.start, jnp.float32)

    def following(self, lam: Scalar, step: Int[Array, ""], entropy: Scalar) -> Scalar:
        return jnp.clip(lam * jnp.exp(self.rate * (self.entropy - entropy)), self.low, self.high)


def nearest_entropy(actions: Float[Array, "n a"]) -> Float[Array, ""]:
    """Returns mean over coordinates j and draws i of log(2 |x_ij - its nearest|) + digamma(n) - digamma(1), in nats.

    This estimates the mean entropy of the coordinates from n >= 2 draws (Kozachenko & Leonenko 1987, in one dimension).
    Four draws suffice for a distribution with one mode: the error is .02 for exp(c a) on [-1, 1], .05 for a Gaussian
    and .1 for a uniform distribution. With two or three modes every draw needs a neighbour in its mode: four draws
    overestimate by .17 to .6, sixteen are within .04.
    """
    ends = jnp.full_like(actions[:1], jnp.inf)
    gaps = jnp.diff(jnp.sort(actions, axis=0), axis=0)
    nearest = jnp.minimum(jnp.concatenate([ends, gaps]), jnp.concatenate([gaps, ends]))
    return jnp.mean(jnp.log(2 * (nearest + 1e-6))) + digamma(float(actions.shape[0])) - digamma(1.0)


def gaussian_entropy(actions: Float[Array, "n a"]) -> Float[Array, ""]:
    """Returns mean_j log(std_j sqrt(2 pi e)) of n >= 2 draws: unbiased for Gaussian draws, otherwise too high.

    It corrects the logarithm of a sample variance, which is too low by log k - digamma(k), k = (n - 1) / 2.
    """
    k = (actions.shape[0] - 1) / 2
    log_var = jnp.log(actions.var(0, ddof=1) + 1e-12) + jnp.log(k) - digamma(k)
    return jnp.mean(0.5 * (log_var + jnp.log(2 * jnp.pi * jnp.e)))


Schedule = Constant | Anneal
Temperature = Constant | Anneal | Tuned
