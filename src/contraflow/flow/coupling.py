"""Which noise x0 goes with which sample x1 of a batch: straighter paths need fewer steps.

A coupling takes x0 and x1 [B, d] and the conditions [B, c] and returns x0 in its new order with a weight per pair.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

Batch = Float[Array, "B d"]
Conditions = Float[Array, "B c"]


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
class Assigned:
    """The permutation of x0 of least sum |x0 - x1|^2 among rows of equal condition (minibatch OT, 2302.00482).

    Across conditions the noise would tell of the condition, and a policy that starts from N(0, I) be off its data.
    Where every row has a condition of its own, as in most demonstrations, this is `Independent`. Cubic in the batch.
    """

    def __call__(self, x0: Batch, x1: Batch, cond: Conditions) -> tuple[Batch, Float[Array, " B"]]:
        cost = jnp.sum((x1[:, None] - x0[None]) ** 2, -1)
        same = jnp.all(cond[:, None] == cond[None], -1)
        # Far above any sum of costs: staying within one's group is always cheaper.
        cost = jax.lax.stop_gradient(jnp.where(same, cost, (cost.max() + 1.0) * x0.shape[0]))
        rows, columns = optax.assignment.hungarian_algorithm(cost)
        return x0[jnp.zeros_like(columns).at[rows].set(columns)], jnp.ones(x0.shape[0])


Coupling = Independent | Weighted | Assigned
