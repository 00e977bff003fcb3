"""Edits: small Gaussian changes of the actions of a policy, given these actions (2507.07986)."""

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
