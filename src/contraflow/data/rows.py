"""Experience on the device, whether it comes from replay or from a dataset: what samplers draw from."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from contraflow.core.types import PRNGKey
from contraflow.data.datasets.dataset import Dataset


class Rows(eqx.Module):
    """Room for C steps, of which the first `size` are filled. `next_obs` is the true successor of `obs`."""

    obs: PyTree[Array]  # leaves [C, ...]
    action: Float[Array, "C a"]
    reward: Float[Array, " C"]
    next_obs: PyTree[Array]  # leaves [C, ...]
    terminated: Bool[Array, " C"]
    next: Int[Array, " C"]  # place of the row one step later in the same trajectory, -1 if there is none (yet)
    size: Int[Array, ""]
    last: Int[Array, " C"] | None = None  # of a dataset, in time order: place of the last row of the same trajectory
    steps: Int[Array, " C"] | None = None  # of the environment in a row that is a chunk of actions; None is one each
    human: Bool[Array, " C"] | None = None  # whether a person took the action; None is nowhere

    @classmethod
    def of(cls, data: Dataset, successor: bool = True) -> "Rows":
        """All rows of a dataset; with `successor`, which whoever reads `next_obs` needs, without those whose successor
        is unknown. Raises UserError when none is left."""
        data = data.with_successor() if successor else data
        n, ends = len(data), np.flatnonzero(data.end)
        following = np.where(data.end, -1, np.arange(1, n + 1)).astype(np.int32)
        last = np.repeat(ends, data.lengths).astype(np.int32)
        arrays = data.obs, data.action, data.reward, data.next_obs, data.terminated, following, np.int32(n), last
        human = None if data.human is None else jnp.asarray(data.human)
        return cls(*jax.tree.map(jnp.asarray, arrays), human=human)

    def draw(self, key: PRNGKey, n: int) -> Int[Array, " n"]:
        """Places of n rows, uniform with replacement. The caller makes sure that there are rows."""
        return jr.randint(key, (n,), 0, self.size)
