"""Random shifts of images, the augmentation of DrQ (2004.13649)."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Int, Shaped

from contraflow.core.types import Batch, Obs, PRNGKey


@dataclass(frozen=True)
class Shifted:
    """The rows of a sampler, with every image of `obs` and `next_obs` shifted by U{-most..most} pixels on each axis.

    Each row and each camera has a shift of its own, and `next_obs` others than `obs`, as in DrQ-v2 (2107.09645). The
    channels of an image, and with them the frames of a stack, move together. Vectors stay as they are, and bytes bytes.
    """

    sampler: Any
    most: int

    def __call__(self, rows: Any, key: PRNGKey, n: int) -> Batch:
        """Returns n rows."""
        k_rows, k_obs, k_next = jr.split(key, 3)
        batch = self.sampler(rows, k_rows, n)
        return replace(batch, obs=self.moved(batch.obs, k_obs), next_obs=self.moved(batch.next_obs, k_next))

    def moved(self, obs: Obs, key: PRNGKey) -> Obs:
        """Returns the observations [n, ...] with shifted images."""
        leaves, tree = jax.tree.flatten(obs)

        def one(x, key):
            by = jr.randint(key, (2, x.shape[0]), -self.most, self.most + 1)
            return jax.vmap(shift)(x, *by)

        keys = jr.split(key, len(leaves))
        return tree.unflatten([one(x, k) if x.ndim == 4 else x for x, k in zip(leaves, keys, strict=True)])


def shift(image: Shaped[Array, "H W C"], down: Int[Array, ""], right: Int[Array, ""]) -> Shaped[Array, "H W C"]:
    """Returns the image moved by whole pixels; where nothing moves in, the pixels at its border are repeated.

    It is the crop at (p - down, p - right) of the image that was padded with p pixels of its border on each side.
    """
    height, width, _ = image.shape
    rows = jnp.clip(jnp.arange(height) - down, 0, height - 1)
    columns = jnp.clip(jnp.arange(width) - right, 0, width - 1)
    return jnp.take(jnp.take(image, rows, axis=0), columns, axis=1)


def augmented(sampler: Any, random_shift: int) -> Any:
    """Returns the sampler, with random shifts if there are any."""
    return Shifted(sampler, random_shift) if random_shift else sampler
