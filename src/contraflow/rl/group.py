"""Advantages of samples that were drawn for the same condition."""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from contraflow.core.optim import check_positive


def exponential(z: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Returns -exp(-z), the utility in DDRL (2512.04332): against a forward anchor E_data[-log p] it has its optimum at
    the data's density times exp(z), where z itself has it at a density with heavier tails."""
    return -jnp.exp(-z)


@dataclass(frozen=True)
class GroupAdvantage:
    """A = (r - mean of the group) / deviation, clipped; one group for each condition.

    Several rewards are summed with their weights. `separate` divides each by its own deviation in the group first, so
    that none is drowned by another of larger scale (GDPO). Raises ValueError for a clip that is not positive.
    """

    std: Literal["all", "group", "none"] = "all"
    """Deviation over all samples of a batch, as in the released Flow-GRPO, over the group, or none. With none, A is the
    reward less the mean of the others, not clipped; its policy gradient has no bias."""
    separate: bool = False
    clip: float = 5.0
    utility: Literal["linear", "exponential"] = "linear"
    """Exponential returns -exp(-A) less its mean in the group, with A clipped also for std="none"."""

    def __post_init__(self):
        check_positive(self, "clip")

    def __call__(self, reward: Float[Array, "B G m"], weights: tuple[float, ...]) -> Float[Array, "B G"]:
        """Returns advantages of samples with m rewards."""
        samples = reward.shape[1]
        centred = lambda x: x - jnp.mean(x, 1, keepdims=True)
        others = samples / max(samples - 1, 1)  # a sample is no part of its own baseline
        rewards = centred(reward)
        if self.separate:
            rewards = rewards / (jnp.std(rewards, 1, keepdims=True) + 1e-4)
        total = rewards @ jnp.asarray(weights)
        if self.std == "none":
            if self.utility == "linear":
                return others * total
        else:
            spread = jnp.std(total) if self.std == "all" else jnp.std(total, 1, keepdims=True)
            total = total / (spread + 1e-4)
        total = jnp.clip(total, -self.clip, self.clip)
        return total if self.utility == "linear" else others * centred(exponential(total))
