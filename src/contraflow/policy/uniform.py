"""Policies that ignore observations: a fixed distribution, used by agents without an actor, and zero actions."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.core.types import PRNGKey
from contraflow.policy.base import Cost


class BetaActions(eqx.Module):
    """a = 2 b - 1, b ~ Beta(kappa, kappa)^a. kappa = 1 is uniform; kappa < 1 favours the faces of the box."""

    like: Float[Array, " a"]  # zeros; holds the size of an action
    kappa: float = eqx.field(static=True, default=1.0)

    def __call__(self, obs: Any, key: PRNGKey, greedy: bool = True) -> Float[Array, " a"]:
        return self.particles(obs, key, 1)[0]

    def particles(self, obs: Any, key: PRNGKey, n: int) -> Float[Array, "n a"]:
        shape = (n, *self.like.shape)
        if self.kappa == 1:
            return jr.uniform(key, shape, minval=-1.0, maxval=1.0)
        return symmetric_beta(key, self.kappa, shape)

    @property
    def cost(self) -> Cost:
        return Cost(1, 0, 0)


def symmetric_beta(key: PRNGKey, kappa: float, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Draws 2 b - 1 in [-1, 1], b ~ Beta(kappa, kappa), kappa > 0, in the given shape.

    With u, v uniform: cos(2 pi v) / sqrt(cos(2 pi v)^2 + 1 / (u^(-1 / kappa) - 1)) (Devroye, Random variate generation
    in one line of code, Winter Simulation Conference 1996). `jax.random.beta` uses rejection and takes fifteen times as
    long on a CPU.
    """
    k_size, k_angle = jr.split(key)
    cos = jnp.cos(2.0 * jnp.pi * jr.uniform(k_angle, shape))
    odds = jnp.expm1(-jnp.log(jr.uniform(k_size, shape, minval=1e-37)) / kappa) * cos**2  # inf (small kappa) gives +-1
    return jnp.sign(cos) / jnp.sqrt(1.0 + 1.0 / odds)


def uniform_policy(action_dim: int) -> BetaActions:
    """Returns the policy of uniformly random actions [action_dim]."""
    return BetaActions(jax.device_put(jnp.zeros(action_dim)))


class NoAction(eqx.Module):
    """a = 0, the middle of the range of each action, greedy or not."""

    like: Float[Array, " a"]

    def __call__(self, obs: Any, key: PRNGKey, greedy: bool = True) -> Float[Array, " a"]:
        return self.like


def still_policy(action_dim: int) -> NoAction:
    """Returns the policy of zero actions [action_dim]."""
    return NoAction(jax.device_put(jnp.zeros(action_dim)))
