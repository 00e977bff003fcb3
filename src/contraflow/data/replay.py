"""Replay: a ring of transitions as a pytree, with pure `add` and `sample` that run inside a donated `jit`.

Rows of N environments are interleaved and some environments skip rows: links between rows hold episodes together.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Int

from contraflow.core.types import EnvSpec, PRNGKey, Transition


class Buffer(eqx.Module):
    """`data` has leading axis C (capacity); rows [0, size) are filled, the next write goes to `index`."""

    data: Transition
    next: Int[Array, " C"]  # place of the row one step later in the same episode, -1 if there is none (yet)
    last: Int[Array, " N"]  # place of each environment's newest row, -1 before the first of an episode
    index: Int[Array, ""]
    size: Int[Array, ""]

    @classmethod
    def empty(cls, capacity: int, spec: EnvSpec) -> "Buffer":
        """Room for `capacity` transitions of spec.num_envs environments; none is in it yet."""

        def zeros(*shape, dtype=jnp.float32):
            return jnp.zeros((capacity, *shape), dtype)

        data = Transition(
            obs=zeros(spec.obs_dim), action=zeros(spec.action_dim), reward=zeros(), next_obs=zeros(spec.obs_dim),
            terminated=zeros(dtype=bool), truncated=zeros(dtype=bool), span=zeros(dtype=jnp.int32),
        )  # fmt: skip
        none = jnp.full(capacity, -1, jnp.int32)
        last = jnp.full(spec.num_envs, -1, jnp.int32)
        return cls(data, none, last, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def add(self, rows: Transition, valid: Bool[Array, " N"]) -> "Buffer":
        """Append the rows [N] that are valid (not the dummy steps of an autoreset); the oldest rows are overwritten."""
        capacity = self.data.reward.shape[0]
        place = (self.index + jnp.cumsum(valid) - 1) % capacity
        place = jnp.where(valid, place, capacity)  # out of range, so dropped
        count = jnp.sum(valid, dtype=jnp.int32)
        data = jax.tree.map(lambda d, r: d.at[place].set(r, mode="drop"), self.data, rows)
        overwritten = (self.last - self.index) % capacity < count
        last = jnp.where(overwritten, -1, self.last)
        before = jnp.where(valid & (last >= 0), last, capacity)
        links = self.next.at[before].set(place, mode="drop").at[place].set(-1, mode="drop")
        last = jnp.where(valid, jnp.where(rows.terminated | rows.truncated, -1, place), last)
        return Buffer(data, links, last, (self.index + count) % capacity, jnp.minimum(self.size + count, capacity))

    def cut(self) -> "Buffer":
        """The same rows; what is added next starts new episodes."""
        return eqx.tree_at(lambda b: b.last, self, jnp.full_like(self.last, -1))

    def sample(self, key: PRNGKey, n: int, steps: int = 1, gamma: float = 1.0) -> Transition:
        """n rows [n], uniform with replacement. The caller makes sure that the buffer is not empty.

        With steps > 1 each joins up to that many successive rows of its episode: reward = sum_k gamma^k r_k. Fewer, at
        an end or at the newest row, are a shorter `span`.
        """
        rows = jr.randint(key, (n,), 0, self.size)
        batch = jax.tree.map(lambda d: d[rows], self.data)
        reward, span, at, more = batch.reward, batch.span, rows, jnp.ones(n, bool)
        for k in range(1, steps):
            more &= self.next[at] >= 0
            at = jnp.where(more, self.next[at], at)
            reward += jnp.where(more, gamma**k * self.data.reward[at], 0.0)
            span += more
        next_obs, terminated, truncated = self.data.next_obs[at], self.data.terminated[at], self.data.truncated[at]
        return Transition(batch.obs, batch.action, reward, next_obs, terminated, truncated, span)
