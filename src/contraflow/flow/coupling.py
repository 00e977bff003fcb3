"""Which noise x0 goes with which sample x1 of a batch: straighter paths need fewer steps.

A coupling takes x0 and x1 [B, d] and the conditions [B, ...], and returns x0 in its new order with a weight per pair.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree, Shaped

from contraflow.core.errors import UserError

Batch = Float[Array, "B d"]
Conditions = PyTree[Shaped[Array, "B ..."]]


@dataclass(frozen=True)
class Independent:
    """Pairs as they were drawn."""

    def __call__(self, x0: Batch, x1: Batch, cond: Conditions) -> tuple[Batch, Float[Array, " B"]]:
        return x0, jnp.ones(x0.shape[0])


@dataclass(frozen=True)
class Weighted:
    """Pairs as drawn, with weights exp(-|x0 - x1| / (eps sqrt d)) of mean 1 (W-CFM, 2507.22270).

    Safe with conditions, which no pair crosses; but the model learns samples of x1 reweighted by their mean weight: a
    pull towards the middle that fades as eps grows.
    """

    eps: float = 5.0

    def __post_init__(self):
        if not self.eps > 0:
            raise ValueError(f"eps must be positive, got {self.eps}")

    def __call__(self, x0: Batch, x1: Batch, cond: Conditions) -> tuple[Batch, Float[Array, " B"]]:
        weight = jnp.exp(-jnp.linalg.norm(x0 - x1, axis=1) / (self.eps * x0.shape[1] ** 0.5))
        return x0, weight / weight.mean()


@dataclass(frozen=True)
class ConditionalOT:
    """The permutation of least sum |x0_i - x1_j|^2 + weight |c_i - c_j|^2, where x0_i was drawn beside c_i.

    The relaxed cost of conditional optimal transport (2403.18705, 2404.04240; for images C2OT, 2503.10636). With weight
    0 it is minibatch optimal transport (2302.00482), as the weight grows `Independent` among rows that differ in their
    condition. Its bias: noise that has crossed from another condition is not N(0, I) given its new one, but tells of
    it, where a policy starts from N(0, I) whatever it sees. The bias falls as the weight grows, and so does the gain;
    a larger batch has nearer partners, and in many dimensions of the condition there are none. Of 256 rows, mean
    |x0 - x1| and the share of x0's variance that the condition tells: one dimension, 1.39 as drawn, .62 and .39 at
    weight 0, .72 and .20 at 1, .86 and .05 at 10; eight dimensions, 2.09, 1.04 and .36, 1.88 and .02, 2.09 and .00.
    Cubic in the batch. ValueError for a weight below 0 or infinite.
    """

    weight: float = 1.0

    def __post_init__(self):
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"weight must be finite and not negative, got {self.weight}")

    def __call__(self, x0: Batch, x1: Batch, cond: Conditions) -> tuple[Batch, Float[Array, " B"]]:
        if not isinstance(cond, jax.Array) or cond.ndim != 2:
            raise UserError(
                "ConditionalOT measures distances between vectors: use the coupling Independent() for images"
            )
        square = lambda a, b: jnp.sum((a[:, None] - b[None]) ** 2, -1)
        cost = jax.lax.stop_gradient(square(x1, x0) + self.weight * square(cond, cond))
        rows, columns = optax.assignment.hungarian_algorithm(cost)
        return x0[jnp.zeros_like(columns).at[rows].set(columns)], jnp.ones(x0.shape[0])


Coupling = Independent | Weighted | ConditionalOT
