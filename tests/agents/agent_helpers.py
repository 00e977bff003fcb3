"""Rows and critics for tests with a known Q."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp

from contraflow.core.types import Batch
from contraflow.flow.path import Path
from contraflow.rl.critics import Critics


def bandit(n: int, dim: int = 1, discount: float = 0.0) -> Batch:
    """n rows of one state, action and reward 0; discount 0 ends the episode."""
    zeros, action = jnp.zeros((n, 1)), jnp.zeros((n, dim))
    return Batch(zeros, action, zeros[:, 0], jnp.full(n, discount), zeros, jnp.ones((n, dim)))


def with_slope(state, slope):
    """The state with critics Q(s, a) = slope . a, one slope [a] for all or one for each [m, a]: one hidden unit that
    is positive all over the box, the others off."""
    lift = 10.0 * jnp.max(jnp.abs(slope))
    slopes = jnp.broadcast_to(jnp.asarray(slope, jnp.float32), (state.critic.num, jnp.shape(slope)[-1]))

    def plane(critic, slope):
        first, last = critic.first, critic.last
        weights = jnp.zeros_like(first.weights[0]).at[:, 0].set(slope), jnp.zeros_like(first.weights[1])
        values = *weights, jnp.zeros_like(first.bias).at[0].set(lift)
        values += jnp.zeros_like(last.weight).at[0].set(1.0), jnp.full_like(last.bias, -lift)
        where = lambda c: (*c.first.weights, c.first.bias, c.last.weight, c.last.bias)
        return eqx.tree_at(where, critic, values)

    critic = eqx.tree_at(lambda q: q.members, state.critic, jax.vmap(plane)(state.critic.members, slopes))
    return replace(state, critic=critic, target=jax.tree.map(jnp.copy, critic))


class Frozen(Critics):
    """Critics that do not learn."""

    def learn(self, critic, target, opt, batch, action, key, bonus=0.0, over="mean"):
        return critic, target, opt, {}


class Shift(eqx.Module):
    """The velocity of a flow whose end is m + s z, on straight lines: any number of Euler's steps is exact."""

    dim: int = eqx.field(static=True)
    m: float = eqx.field(static=True)
    s: float = eqx.field(static=True)

    def __call__(self, x, t, cond):
        z = (x - t * self.m) / (1 + t * (self.s - 1))
        return self.m + (self.s - 1) * z


class GaussianNoise(eqx.Module):
    """What the network of a flow that predicts noise should return where x1 ~ N(mean, std^2): E[x0 | x_t]."""

    path: Path = eqx.field(static=True)
    dim: int = eqx.field(static=True)
    mean: float = eqx.field(static=True)
    std: float = eqx.field(static=True)
    clock: float = eqx.field(static=True, default=5.0)

    def __call__(self, x, t, cond):
        a, b = self.path.alpha(t / self.clock), self.path.beta(t / self.clock)
        return b * (x - a * self.mean) / (a**2 * self.std**2 + b**2)
