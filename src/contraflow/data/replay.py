"""Replay: a ring of rows as a pytree, with a pure `add` that runs inside a donated `jit`.

Rows of N environments are interleaved and some environments skip rows: links between rows hold episodes together. The
successor is stored beside each row: only the newest row and the ends of episodes need it, but how many there are is
not known before, and a place of their own would have to be as large as the ring.
"""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from contraflow.core.observation import blank
from contraflow.core.types import EnvSpec, Step
from contraflow.data.rows import Rows


class Buffer(eqx.Module):
    """The next write goes to place `index` of `rows`."""

    rows: Rows
    last: Int[Array, " N"]  # place of each environment's newest row, -1 before the first of an episode
    index: Int[Array, ""]

    @classmethod
    def empty(cls, capacity: int, spec: EnvSpec, obs: PyTree = None) -> "Buffer":
        """Room for `capacity` steps of spec.num_envs environments. `obs` has the structure, shapes and types of one
        observation; None is that of the spec."""

        def zeros(shape=(), dtype=jnp.float32):
            return jnp.zeros((capacity, *shape), dtype)

        def observations():
            return jax.tree.map(lambda x: zeros(x.shape, x.dtype), blank(spec.observation) if obs is None else obs)

        flags, links = zeros(dtype=bool), jnp.full(capacity, -1, jnp.int32)
        steps = zeros(dtype=jnp.int32) if spec.execute > 1 else None
        size = jnp.zeros((), jnp.int32)
        rows = Rows(observations(), zeros((spec.action_dim,)), zeros(), observations(), flags, links, size, steps=steps)
        return cls(rows, jnp.full(spec.num_envs, -1, jnp.int32), jnp.zeros((), jnp.int32))

    @property
    def size(self) -> Int[Array, ""]:
        """How many rows are filled."""
        return self.rows.size

    def add(self, obs: PyTree, action: Float[Array, "N a"], step: Step) -> "Buffer":
        """Append what `step` made of `action` at `obs` [N, ...], where it is valid (no dummy step of an autoreset); the
        oldest rows are overwritten."""
        rows, capacity = self.rows, self.rows.reward.shape[0]
        place = (self.index + jnp.cumsum(step.valid) - 1) % capacity
        place = jnp.where(step.valid, place, capacity)  # out of range, so dropped
        count = jnp.sum(step.valid, dtype=jnp.int32)
        old = rows.obs, rows.action, rows.reward, rows.next_obs, rows.terminated
        new = obs, action, step.reward, step.next_obs, step.terminated
        stored = jax.tree.map(lambda d, r: d.at[place].set(r, mode="drop"), old, new)
        overwritten = (self.last - self.index) % capacity < count
        last = jnp.where(overwritten, -1, self.last)
        before = jnp.where(step.valid & (last >= 0), last, capacity)
        links = rows.next.at[before].set(place, mode="drop").at[place].set(-1, mode="drop")
        last = jnp.where(step.valid, jnp.where(step.terminated | step.truncated, -1, place), last)
        obs, action, reward, next_obs, terminated = stored
        size = jnp.minimum(rows.size + count, capacity)
        steps = None if rows.steps is None else rows.steps.at[place].set(step.steps, mode="drop")
        rows = Rows(obs, action, reward, next_obs, terminated, links, size, steps=steps)
        return Buffer(rows, last, (self.index + count) % capacity)

    def cut(self) -> "Buffer":
        """The same rows; what is added next starts new episodes."""
        return replace(self, last=jnp.full_like(self.last, -1))
