"""Edits: small changes of the actions of a policy, given these actions: Gaussian (2507.07986) or one (1812.03201)."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.core.types import Obs, PRNGKey
from contraflow.flow.model import Flow
from contraflow.flow.targets import log_normal, log_sech2
from contraflow.nets.mlp import MLP
from contraflow.policy.base import Cost

Action = Float[Array, " a"]
LOG_STD = (-5.0, 2.0)


class Edit(eqx.Module):
    """a + scale tanh(u) within the box, u ~ N(mean(s, a), std(s, a)^2)."""

    net: MLP
    scale: float = eqx.field(static=True)

    def draw(self, obs: Obs, action: Action, key: PRNGKey) -> tuple[Action, Float[Array, ""]]:
        """Returns the edited action, and log pi(tanh u), the log-density of the edit in units of `scale`."""
        mean, log_std = jnp.split(self.net(obs, action), 2)
        std = jnp.exp(jnp.clip(log_std, *LOG_STD))
        u = mean + std * jr.normal(key, mean.shape)
        edited = jnp.clip(action + self.scale * jnp.tanh(u), -1.0, 1.0)
        return edited, log_normal(u, mean, std) - jnp.sum(log_sech2(u))


class Edited(eqx.Module):
    """An action of a policy, edited."""

    policy: Any
    edit: Edit

    def __call__(self, obs: Obs, key: PRNGKey, greedy: bool = True) -> Action:
        k_policy, k_edit = jr.split(key)
        return self.edit.draw(obs, self.policy(obs, k_policy, greedy), k_edit)[0]

    @property
    def cost(self) -> Cost:
        return Cost(1, self.policy.cost.nfe + 1, 0)


class AlsoEdited(eqx.Module):
    """Candidates: actions of a policy and their edits, in equal numbers; an odd one is an action of the policy."""

    policy: Any
    edit: Edit

    def particles(self, obs: Obs, key: PRNGKey, n: int) -> Float[Array, "n a"]:
        """Returns n actions."""
        k_policy, k_edit = jr.split(key)
        few = n // 2
        own = self.policy.particles(obs, k_policy, n - few)
        edited = jax.vmap(lambda a, k: self.edit.draw(obs, a, k)[0])(own[:few], jr.split(k_edit, few))
        return jnp.concatenate([own, edited])

    @property
    def flow(self) -> Flow:
        return self.policy.flow

    @property
    def cost(self) -> Cost:
        """The cost of a candidate: half the evaluations of an action and its edit, rounded up."""
        return Cost(1, (self.policy.cost.nfe + 2) // 2, 0)


class Residual(eqx.Module):
    """clip(a + scale tanh(net(s, a))) for an action a of `policy`; with Gaussian noise of std `noise` while exploring.

    With `scale` 0 it acts as `policy`, bit for bit.
    """

    policy: Any
    net: MLP
    scale: float = eqx.field(static=True)
    noise: float = eqx.field(static=True)

    def edited(self, obs: Obs, action: Action, seen: Action) -> Action:
        """Returns the edit of an action, made knowing `seen`, which is the action or zeros."""
        return jnp.clip(action + self.scale * jnp.tanh(self.net(obs, seen)), -1.0, 1.0)

    def __call__(self, obs: Obs, key: PRNGKey, greedy: bool = True) -> Action:
        k_policy, k_noise = jr.split(key)
        action = self.policy(obs, k_policy, greedy)
        action = self.edited(obs, action, action)
        return action if greedy else jnp.clip(action + self.noise * jr.normal(k_noise, action.shape), -1.0, 1.0)

    @property
    def cost(self) -> Cost:
        return Cost(1, self.policy.cost.nfe + 1, 0)
