"""Q-guided flow, QGF (arXiv 2606.11087): a critic guides a cloned flow while it acts. Nothing is trained for it.

    dx/dt = v(x_t, t, s) + weight grad_a Q(s, a) at a = clip(x_t + (1 - t) v, -1, 1),

which is the end that the flow predicts at x_t. Q is evaluated at actions, not at noisy ones, and the derivative of that
end by x_t is left out. The weight is in units of action^2 by Q. Divided by `value_scale` it means the same for all
rewards.
"""

from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.core.observation import rows
from contraflow.core.types import Obs, PRNGKey, UserError
from contraflow.flow.model import Flow
from contraflow.flow.path import Scalar, Vector
from contraflow.flow.support import Box
from contraflow.nets.critic import QEnsemble
from contraflow.policy.base import Cost, Policy, inner
from contraflow.policy.flow import FlowPolicy, solves_velocity


class Pushed(eqx.Module):
    """A network of velocities that are pushed up Q, under one observation."""

    net: Any
    critic: QEnsemble
    seen: Any  # the observation, as the critic encodes it
    weight: Float[Array, ""]
    clock: float = eqx.field(static=True)

    @property
    def dim(self) -> int:
        return self.net.dim

    def __call__(self, x: Vector, t: Scalar, cond: Float[Array, " c"]) -> Vector:
        v = self.net(x, t, cond)
        end = jnp.clip(x + (1.0 - t / self.clock) * v, -1.0, 1.0)
        return v + self.weight * jax.grad(lambda a: self.critic.value(self.seen, a))(end)


class Guided(eqx.Module):
    """A flow guided by the slope of Q; with the weight 0 the flow itself."""

    policy: FlowPolicy
    critic: QEnsemble
    weight: Float[Array, ""]

    @property
    def flow(self) -> Flow:
        """The flow without guidance."""
        return self.policy.flow

    def pushed(self, obs: Obs) -> FlowPolicy:
        """Returns the policy under one observation."""
        flow, seen = self.flow, self.critic.encode(obs)
        net = Pushed(flow.net, self.critic, seen, self.weight, flow.spec.clock)
        return replace(self.policy, flow=replace(flow, net=net))

    def particles(self, obs: Obs, key: PRNGKey, n: int) -> Float[Array, "n a"]:
        """Returns n independent actions."""
        return self.pushed(obs).particles(obs, key, n)

    def __call__(self, obs: Obs, key: PRNGKey, greedy: bool = True) -> Float[Array, " a"]:
        return self.pushed(obs)(obs, key, greedy)

    @property
    def cost(self) -> Cost:
        """Each step also takes one evaluation of the critic, with a gradient."""
        nfe = self.policy.cost.nfe
        return Cost(1, nfe, nfe)


def guided(policy: Policy, weight: float) -> Policy:
    """Returns the policy with its flow guided by its critic; wrappers and the choice of actions stay.

    Raises UserError for a policy without a flow or critic, and for a flow that is not a velocity on the linear path.
    """
    if inner(policy, "flow") is None or inner(policy, "critic") is None:
        raise UserError("guidance needs a flow and a critic, such as those of ifql: this policy has not both")
    spec = inner(policy, "flow").spec
    if not (solves_velocity(spec) and isinstance(spec.support, Box)):
        raise UserError("guidance is for velocities on the linear path, solved without noise, of actions in the box")
    return _within(policy, inner(policy, "critic"), jnp.asarray(weight, jnp.float32))


def _within(policy: Any, critic: QEnsemble, weight: Float[Array, ""]) -> Any:
    if isinstance(policy, FlowPolicy):
        return Guided(policy, critic, weight)
    if not hasattr(policy, "policy"):
        raise UserError(f"the flow of {type(policy).__name__} cannot be guided")
    return replace(policy, policy=_within(policy.policy, critic, weight))


def value_scale(policy: Policy, obs: Any, key: PRNGKey) -> Float[Array, ""]:
    """Returns mean |Q(s, a)| over observations [N, ...] and actions of the policy, by the critic within it."""
    critic, stats = inner(policy, "critic"), inner(policy, "stats")

    def one(obs, key):
        seen = obs if stats is None else stats(obs)
        return jnp.abs(critic.value(seen, policy(obs, key)))

    return jnp.mean(jax.vmap(one)(obs, jr.split(key, rows(obs))))
