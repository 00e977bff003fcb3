"""Advantages of samples that were drawn for the same condition."""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from contraflow.core.optim import check_positive


@dataclass(frozen=True)
class GroupAdvantage:
    """A = (r - mean of the group) / deviation, clipped; one group for each condition.

    Several rewards are summed with their weights. `separate` divides each by its own deviation in the group first, so
    that none is drowned by another of larger scale (GDPO). Raises ValueError for a clip that is not positive.
    """

    std: Literal["all", "group", "none"] = "all"
    """Deviation over all samples of a batch, as in the released Flow-GRPO, over the group, or none: then an anchor
    with weight lambda leads to the reference times exp(r / lambda)."""
    separate: bool = False
    clip: float = 5.0

    def __post_init__(self):
        check_positive(self, "clip")

    def __call__(self, reward: Float[Array, "B G m"], weights: tuple[float, ...]) -> Float[Array, "B G"]:
        """Returns advantages of samples with m rewards."""
        centred = reward - jnp.mean(reward, 1, keepdims=True)
        if self.separate:
            centred = centred / (jnp.std(centred, 1, keepdims=True) + 1e-4)
        total = centred @ jnp.asarray(weights)
        if self.std == "none":
            return total
        spread = jnp.std(total) if self.std == "all" else jnp.std(total, 1, keepdims=True)
        return jnp.clip(total / (spread + 1e-4), -self.clip, self.clip)
