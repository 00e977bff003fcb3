"""Heads of a critic: the last layer represents a value, or the distribution of the return.

A head turns the outputs [k] of one network into a mean and mixes those of several networks into one distribution. It
applies the Bellman update r + discount (Z' + shift) to that distribution, and it measures the error of a network's
outputs from the result.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm
from jaxtyping import Array, Float

Outputs = Float[Array, " k"]
Scalar = Float[Array, ""]
Several = Float[Array, "m k"]
Weights = Float[Array, " m"]


@dataclass(frozen=True)
class Point:
    """One number, learned by its squared error."""

    bounds: ClassVar[None] = None

    @property
    def outputs(self) -> int:
        return 1

    def mean(self, out: Outputs) -> Scalar:
        """Returns E[Z] [] for one network's outputs [k]."""
        return out[0]

    def mix(self, outs: Several, weights: Weights) -> Outputs:
        """Returns the distribution [k] of several networks' outputs [m, k] with weights [m] that sum to 1."""
        return weights @ outs

    def bellman(self, law: Outputs, reward: Scalar, discount: Scalar, shift: Scalar) -> Outputs:
        """Returns the target [k]: the distribution of reward + discount (Z + shift)."""
        return reward + discount * (law + shift)

    def loss(self, out: Outputs, target: Outputs) -> Scalar:
        """Returns (Q - y)^2 []."""
        return (out[0] - target[0]) ** 2


@dataclass(frozen=True)
class Expectile(Point):
    """One number, the expectile of what it learns: the mean at level .5, above it at higher ones (IQL, 2110.06169).

    Raises ValueError for a level outside (0, 1).
    """

    level: float = 0.7

    def __post_init__(self):
        if not 0 < self.level < 1:
            raise ValueError(f"level must lie in (0, 1), .5 is the mean, got {self.level}")

    def loss(self, out: Outputs, target: Outputs) -> Scalar:
        """2 |level - 1{y < Q}| (Q - y)^2."""
        gap = target[0] - out[0]
        return 2.0 * jnp.abs(self.level - (gap < 0)) * gap**2


@dataclass(frozen=True)
class Quantile:
    """`outputs` quantiles of the return at (i + 1/2) / outputs, learned by quantile Huber regression (1710.10044).

    Several networks are mixed quantile by quantile. Raises ValueError for fewer than one quantile or huber <= 0.
    """

    bounds: ClassVar[None] = None

    outputs: int = 25
    huber: float = 1.0

    def __post_init__(self):
        if self.outputs < 1 or self.huber <= 0:
            raise ValueError(f"{self}: needs at least one quantile and a positive Huber threshold")

    def mean(self, out: Outputs) -> Scalar:
        """Returns E[Z] [] for one network's outputs [k]."""
        return out.mean()

    def mix(self, outs: Several, weights: Weights) -> Outputs:
        """Returns the distribution [k] of several networks' outputs [m, k] with weights [m] that sum to 1."""
        return weights @ outs

    def bellman(self, law: Outputs, reward: Scalar, discount: Scalar, shift: Scalar) -> Outputs:
        """Returns the target [k]: the distribution of reward + discount (Z + shift)."""
        return reward + discount * (law + shift)

    def loss(self, out: Outputs, target: Outputs) -> Scalar:
        """Returns sum_i mean_j |tau_i - 1{u_ij < 0}| huber(u_ij) / kappa [], u_ij = y_j - theta_i."""
        level = (jnp.arange(self.outputs) + 0.5) / self.outputs
        gap = target[None, :] - out[:, None]
        size = jnp.abs(gap)
        huber = jnp.where(size <= self.huber, 0.5 * gap**2, self.huber * (size - 0.5 * self.huber))
        return jnp.sum(jnp.mean(jnp.abs(level[:, None] - (gap < 0)) * huber / self.huber, axis=1))


@dataclass(frozen=True)
class Categorical:
    """Probabilities of `outputs` returns, evenly spaced over [low, high], learned by cross-entropy.

    `target` names the target distribution. `c51` projects the distribution of r + discount Z' (1707.06887). `two-hot`
    and `hl-gauss` use its mean only: `two-hot` splits it between two neighbours, and `hl-gauss` takes a normal
    distribution with a standard deviation of `smoothing` spacings (2403.03950). Its returns extend three deviations
    beyond both ends, because cutting it off there would change its mean. Returns beyond the range are clipped to it.
    Several networks are mixed by averaging their probabilities. Raises ValueError for fewer than two returns within
    the range, an empty range or smoothing <= 0.
    """

    outputs: int = 101
    low: float = -10.0
    high: float = 110.0
    target: Literal["c51", "two-hot", "hl-gauss"] = "c51"
    smoothing: float = 0.75

    def __post_init__(self):
        if self._within < 1 or not self.low < self.high or self.smoothing <= 0:
            raise ValueError(f"{self}: needs at least two returns, low < high and a positive smoothing")

    @property
    def bounds(self) -> tuple[float, float]:
        """The range of returns that can be represented; other heads have no bounds."""
        return self.low, self.high

    @property
    def _beyond(self) -> float:
        """Spacings beyond each end."""
        return 3 * self.smoothing if self.target == "hl-gauss" else 0.0

    @property
    def _within(self) -> float:
        """Spacings between the ends."""
        return self.outputs - 1 - 2 * self._beyond

    @property
    def _spacing(self) -> float:
        return (self.high - self.low) / self._within

    @property
    def _returns(self) -> Outputs:
        beyond = self._beyond * self._spacing
        return jnp.linspace(self.low - beyond, self.high + beyond, self.outputs)

    def mean(self, out: Outputs) -> Scalar:
        """Returns E[Z] [] for one network's outputs [k]."""
        return jax.nn.softmax(out) @ self._returns

    def mix(self, outs: Several, weights: Weights) -> Outputs:
        """Returns the distribution [k] of several networks' outputs [m, k] with weights [m] that sum to 1."""
        return weights @ jax.nn.softmax(outs, axis=-1)

    def bellman(self, law: Outputs, reward: Scalar, discount: Scalar, shift: Scalar) -> Outputs:
        """Returns the target [k]: the distribution of reward + discount (Z + shift), or its smoothed mean."""
        moved = jnp.clip(reward + discount * (self._returns + shift), self.low, self.high)
        if self.target == "c51":
            return law @ jax.vmap(self._two_hot)(moved)
        y = jnp.clip(reward + discount * (law @ self._returns + shift), self.low, self.high)
        if self.target == "two-hot":
            return self._two_hot(y)
        returns = self._returns
        edges = jnp.append(returns - 0.5 * self._spacing, returns[-1] + 0.5 * self._spacing)
        below = norm.cdf((edges - y) / (self.smoothing * self._spacing))
        return jnp.diff(below) / (below[-1] - below[0])

    def _two_hot(self, y: Scalar) -> Outputs:
        return jnp.maximum(0.0, 1.0 - jnp.abs(y - self._returns) / self._spacing)

    def loss(self, out: Outputs, target: Outputs) -> Scalar:
        """Returns - sum_i p_i log q_i []."""
        return -target @ jax.nn.log_softmax(out)


Head = Point | Expectile | Quantile | Categorical
