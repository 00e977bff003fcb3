"""Values of actions, for guidance and for the choice among several: a critic, or a function of the user's own."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from contraflow.core.observation import rows
from contraflow.core.types import PRNGKey, UserError
from contraflow.flow.path import Scalar, Vector
from contraflow.nets.critic import QEnsemble
from contraflow.policy.base import Policy, inner
from contraflow.policy.normalise import RunningMoments


class Judge(eqx.Module):
    """Q(s, a) of a critic, which may have been trained elsewhere and then has its own normalisation."""

    critic: QEnsemble
    stats: RunningMoments | None = None

    def under(self, obs: Any) -> Callable[[Vector], Scalar]:
        """Returns Q(s, .); the observation is encoded once."""
        seen = self.critic.encode(obs if self.stats is None else self.stats(obs))
        return lambda action: self.critic.value(seen, action)


class Plain(eqx.Module):
    """A function of (action, observation) as a value; with `horizon` h > 1 it takes chunks [h, a].

    Actions lie in [-1, 1], and the observation is the one before it is normalised.
    """

    function: Callable[..., Scalar] = eqx.field(static=True)
    horizon: int = eqx.field(static=True, default=1)

    def __call__(self, action: Vector, *more: Any) -> Any:
        return self.function(action.reshape(self.horizon, -1) if self.horizon > 1 else action, *more)


def under(value: Any, obs: Any) -> Callable[[Vector], Scalar]:
    """Returns the value of an action [a] under one observation."""
    return value.under(obs) if isinstance(value, Judge) else lambda action: value(action, obs)


def own_critic(policy: Policy) -> Judge:
    """Returns the critic within a policy. Raises UserError if there is none."""
    critic = inner(policy, "critic")
    if critic is None:
        raise UserError("this policy has no critic: give --value a run that has one, or module:function")
    return Judge(critic, inner(policy, "stats"))


def as_value(value: Any) -> Any:
    """Returns a module, or a plain function as one."""
    return value if isinstance(value, eqx.Module) else Plain(value)


def value_scale(policy: Policy, value: Any, obs: Any, key: PRNGKey) -> Scalar:
    """Returns mean |f(s, a)| over observations [N, ...] and actions of the policy."""

    def one(obs, key):
        return jnp.abs(under(value, obs)(policy(obs, key)))

    return jnp.mean(jax.vmap(one)(obs, jr.split(key, rows(obs))))
