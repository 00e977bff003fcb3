"""Rows and critics for tests with a known Q."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp

from contraflow.core.types import Batch
from contraflow.rl.critics import Critics


def bandit(n: int, dim: int = 1, discount: float = 0.0) -> Batch:
    """n rows of one state, action and reward 0; discount 0 ends the episode."""
    zeros, action = jnp.zeros((n, 1)), jnp.zeros((n, dim))
    return Batch(zeros, action, zeros[:, 0], jnp.full(n, discount), zeros, jnp.ones((n, dim)))


def with_slope(state, slope):
    """The state with critics Q(s, a) = slope . a: one hidden unit that is positive all over the box, the others off."""
    lift = 10.0 * jnp.max(jnp.abs(slope))

    def plane(critic):
        first, last = critic.first, critic.last
        weights = jnp.zeros_like(first.weights[0]).at[:, 0].set(slope), jnp.zeros_like(first.weights[1])
        values = *weights, jnp.zeros_like(first.bias).at[0].set(lift)
        values += jnp.zeros_like(last.weight).at[0].set(1.0), jnp.full_like(last.bias, -lift)
        where = lambda c: (*c.first.weights, c.first.bias, c.last.weight, c.last.bias)
        return eqx.tree_at(where, critic, values)

    critic = eqx.tree_at(lambda q: q.members, state.critic, jax.vmap(plane)(state.critic.members))
    return replace(state, critic=critic, target=jax.tree.map(jnp.copy, critic))


class Frozen(Critics):
    """Critics that do not learn."""

    def learn(self, critic, target, opt, batch, action, key, bonus=0.0):
        return critic, target, opt, {}


class Shift(eqx.Module):
    """The velocity of a flow whose end is m + s z, on straight lines: any number of Euler's steps is exact."""

    dim: int = eqx.field(static=True)
    m: float = eqx.field(static=True)
    s: float = eqx.field(static=True)

    def __call__(self, x, t, cond):
        z = (x - t * self.m) / (1 + t * (self.s - 1))
        return self.m + (self.s - 1) * z
