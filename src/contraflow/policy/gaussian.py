"""Gaussian and deterministic policies."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.core.types import Obs, PRNGKey
from contraflow.flow.targets import log_normal, log_sech2
from contraflow.nets.mlp import MLP
from contraflow.policy.base import Cost

Action = Float[Array, " a"]
Scalar = Float[Array, ""]


class SquashedGaussian(eqx.Module):
    """a = tanh(u), u ~ N(mean(s), std(s)^2), with log std clipped to `log_std`; greedy: tanh(mean) (1801.01290)."""

    net: MLP
    log_std: tuple[float, float] = eqx.field(static=True)

    def moments(self, obs: Obs) -> tuple[Action, Action]:
        """Returns the mean and the standard deviation of u, each [a]."""
        mean, log_std = jnp.split(self.net(obs), 2)
        return mean, jnp.exp(jnp.clip(log_std, *self.log_std))

    def draw(self, obs: Obs, key: PRNGKey) -> tuple[Action, Scalar]:
        """Returns an action a [a] and log pi(a) = log N(u) - sum log sech^2 u []."""
        mean, std = self.moments(obs)
        u = mean + std * jr.normal(key, mean.shape)
        return jnp.tanh(u), log_normal(u, mean, std) - jnp.sum(log_sech2(u))

    def __call__(self, obs: Obs, key: PRNGKey, greedy: bool = True) -> Action:
        return jnp.tanh(self.moments(obs)[0]) if greedy else self.draw(obs, key)[0]

    @property
    def cost(self) -> Cost:
        return Cost(1, 1, 0)


class Draw(eqx.Module):
    """Data a policy gradient needs about a clipped Gaussian action: x before clipping, and its log-density."""

    action: Float[Array, "*batch a"]
    log_prob: Float[Array, "*batch"]


class ClippedGaussian(eqx.Module):
    """a = clip(x, -1, 1), x ~ N(mean(s), std^2), with a learned std that does not depend on s; greedy: clip(mean)."""

    mean: MLP
    log_std: Float[Array, " a"]

    def sample(self, obs: Obs, key: PRNGKey) -> tuple[Action, Draw]:
        """Returns an exploring action [a] and the data a policy gradient needs about it."""
        mean, std = self.mean(obs), jnp.exp(self.log_std)
        x = mean + std * jr.normal(key, mean.shape)
        return jnp.clip(x, -1.0, 1.0), Draw(x, log_normal(x, mean, std))

    def log_prob(self, obs: Obs, x: Action) -> Scalar:
        """Returns log N(x; mean(s), std^2) []."""
        return log_normal(x, self.mean(obs), jnp.exp(self.log_std))

    def __call__(self, obs: Obs, key: PRNGKey, greedy: bool = True) -> Action:
        return jnp.clip(self.mean(obs), -1.0, 1.0) if greedy else self.sample(obs, key)[0]

    @property
    def cost(self) -> Cost:
        return Cost(1, 1, 0)


class Deterministic(eqx.Module):
    """a = tanh f(s), with Gaussian noise while exploring."""

    net: MLP
    noise: float = eqx.field(static=True)

    def __call__(self, obs: Obs, key: PRNGKey, greedy: bool = True) -> Action:
        action = jnp.tanh(self.net(obs))
        return action if greedy else jnp.clip(action + self.noise * jr.normal(key, action.shape), -1.0, 1.0)

    @property
    def cost(self) -> Cost:
        return Cost(1, 1, 0)
