"""Values that guide a flow while it acts: a critic, a goal or a constraint. Nothing is trained for it.

    QGF (2606.11087)                    v + w grad f(a) at a = clip(x_t + (1 - t) v), without the derivative of that end
    NRG (2501.13918)                    v + w (1 - t) / t grad_x f(x_t + (1 - t) v)
    controller of FOCUS (2510.02315)    v + w grad_x f(x_t, t)

A change of the score by grad E_t is a change of the velocity by (1 - t) / t grad E_t. Hence NRG samples p exp(w f) for
E_t(x) = log E[exp(w f(x_1)) | x_t = x], which is its "state" form with such an f. At the predicted end it is exact for
a linear f on a Gaussian. For a concave f it pulls too much, as it leaves out that x_1 still varies.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from contraflow.core.types import PRNGKey, UserError
from contraflow.flow.model import Flow
from contraflow.flow.path import Scalar, Vector
from contraflow.flow.support import Box, Support
from contraflow.policy.base import Cost, Policy, ablations, inner
from contraflow.policy.flow import solves_velocity
from contraflow.policy.push import At, Push, renetted, with_flow
from contraflow.policy.realtime import RealTime
from contraflow.policy.value import Judge, as_value, own_critic, under

FIRST = 0.02  # (1 - t) / t is for gradients that are 0 at t = 0; those of a network are only nearly so


@dataclass(frozen=True)
class Rule:
    """Where the gradient is taken (`contraflow.policy.push`), and whether it counts as one of the score."""

    at: At
    gain: Literal["score", "equal"]


QGF, NRG, CONTROLLER = Rule("held", "equal"), Rule("end", "score"), Rule("state", "equal")


class Guided(eqx.Module):
    """A policy whose flow is pushed up a value. With weight 0 it is the policy itself. Build it with `guided`."""

    policy: Any
    value: Any
    weight: Scalar
    form: Rule = eqx.field(static=True)

    def pushed(self, obs: Any) -> Any:
        """Returns the policy under one observation."""
        return with_flow(self.policy, lambda flow: self._pushed(flow, obs))

    def _pushed(self, flow: Flow, obs: Any) -> Flow:
        if self.form.at == "state":
            slope = jax.grad(lambda x, t: self.value(x, t, obs))
        else:
            value = under(self.value, obs)
            slope = lambda y, t: _slope(flow.spec.support, value, y)
        score = self.form.gain == "score"
        gain = lambda t: self.weight * ((1.0 - t) / t if score else 1.0)
        return renetted(flow, Push(flow, slope, gain, self.form.at, FIRST if score else 0.0))

    def __call__(self, obs: Any, key: PRNGKey, greedy: bool = True) -> Float[Array, " a"]:
        return self.pushed(obs)(obs, key, greedy)

    def ablations(self) -> dict[str, Policy]:
        parts = ablations(self.policy).items()
        return {name: part if inner(part, "flow") is None else replace(self, policy=part) for name, part in parts}

    @property
    def cost(self) -> Cost:
        """Each step also takes a gradient of the value, and at the end one of the network."""
        cost = self.policy.cost
        return replace(cost, critic_calls=cost.critic_calls + cost.particles * cost.nfe)


def _slope(support: Support, value: Callable[[Vector], Scalar], y: Vector) -> Vector:
    """Returns the gradient by an end y [d] of the value of its action. That of the clip is left out: outside of the box
    the value still pulls back."""
    if isinstance(support, Box):
        return jax.grad(value)(support.action(y))
    return jax.grad(lambda y: value(support.action(y)))(y)


def guided(policy: Policy, weight: float, value: Any = None, rule: Rule | None = None) -> Any:
    """Returns the policy with its flow guided by a value; wrappers and the choice of actions stay.

    `value` is a `Judge`, or a function of (action, observation) or of (x_t, t, observation) for the rule "state", large
    where actions are good. None is the policy's own critic. The rule is QGF for a critic and NRG for a function, unless
    given. Raises UserError for a policy without a flow, or a critic if it is needed, and for a flow that is not a
    velocity on the linear path.
    """
    if isinstance(policy, RealTime):
        return replace(policy, policy=guided(policy.policy, weight, value, rule))
    if inner(policy, "flow") is None:
        raise UserError(f"guidance needs a policy that is a flow, as cloned or aligned ones are: {policy!r:.40}")
    if not solves_velocity(inner(policy, "flow").spec):
        raise UserError("guidance is for velocities on the linear path, solved without noise: train the flow with bc")
    value = own_critic(policy) if value is None else as_value(value)
    with_flow(policy, lambda flow: flow)  # refused now rather than when it acts
    rule = rule or (QGF if isinstance(value, Judge) else NRG)
    return Guided(policy, value, jnp.asarray(weight, jnp.float32), rule)
