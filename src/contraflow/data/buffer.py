"""Replay: a ring of transitions as a pytree, with pure `add` and `sample` that run inside a donated `jit`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Int

from contraflow.types import EnvSpec, PRNGKey, Transition


class Buffer(eqx.Module):
    """`data` has leading axis C (capacity); rows [0, size) are filled, the next write goes to `index`."""

    data: Transition
    index: Int[Array, ""]
    size: Int[Array, ""]

    @classmethod
    def empty(cls, capacity: int, spec: EnvSpec) -> "Buffer":
        def zeros(*shape, dtype=jnp.float32):
            return jnp.zeros((capacity, *shape), dtype)

        data = Transition(
            obs=zeros(spec.obs_dim), action=zeros(spec.action_dim), reward=zeros(), next_obs=zeros(spec.obs_dim),
            terminated=zeros(dtype=bool), truncated=zeros(dtype=bool),
        )  # fmt: skip
        return cls(data, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def add(self, rows: Transition, valid: Bool[Array, " N"]) -> "Buffer":
        """Append the rows [N] that are valid (not the dummy steps of an autoreset); the oldest rows are overwritten."""
        capacity = self.data.reward.shape[0]
        place = (self.index + jnp.cumsum(valid) - 1) % capacity
        place = jnp.where(valid, place, capacity)  # out of range, so dropped
        count = jnp.sum(valid, dtype=jnp.int32)
        data = jax.tree.map(lambda d, r: d.at[place].set(r, mode="drop"), self.data, rows)
        return Buffer(data, (self.index + count) % capacity, jnp.minimum(self.size + count, capacity))

    def sample(self, key: PRNGKey, n: int) -> Transition:
        """n rows [n], uniform with replacement. The caller makes sure that the buffer is not empty."""
        rows = jr.randint(key, (n,), 0, self.size)
        return jax.tree.map(lambda d: d[rows], self.data)
