"""The one hook into a sampler: the velocity of a flow is pushed while an action is made.

    v(x_t, t) + gain(t) J^T slope(y, t),   J = dy / dx_t

    "end"     y = x_t + (1 - t) v, the end that the flow predicts at x_t
    "held"    the same with J replaced by the identity: no derivative of the network
    "state"   y = x_t

Guidance by a critic, a goal or a constraint (`contraflow.policy.guided`) and real-time chunking
(`contraflow.policy.realtime`) are slopes and gains. Pushes add up, and the last one sees the velocity of those before.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp

from contraflow.core.types import UserError
from contraflow.flow.model import Condition, Flow
from contraflow.flow.path import Scalar, Vector
from contraflow.policy.flow import FlowPolicy

At = Literal["end", "held", "state"]
Slope = Callable[[Vector, Scalar], Vector]


class Push(eqx.Module):
    """The velocity of a flow with a push, as a network that sees times in [0, 1]."""

    flow: Flow
    slope: Slope
    gain: Callable[[Scalar], Scalar]
    at: At = eqx.field(static=True)
    first: float = eqx.field(static=True, default=0.0)
    """The push is that of this time before it, for gains without a bound at t = 0."""

    @property
    def dim(self) -> int:
        return self.flow.dim

    def __call__(self, x: Vector, t: Scalar, cond: Condition) -> Vector:
        time = jnp.maximum(t, self.first)
        if self.at == "state":
            return self.flow.output(x, t, cond) + self.gain(time) * self.slope(x, time)

        def end(x):
            v = self.flow.output(x, time, cond)
            return x + (1.0 - time) * v, v

        if self.at == "end":
            y, transposed, v = jax.vjp(end, x, has_aux=True)
            push = transposed(self.slope(y, time))[0]
        else:
            y, v = end(x)
            push = self.slope(y, time)
        return (self.flow.output(x, t, cond) if self.first else v) + self.gain(time) * push


def renetted(flow: Flow, net: Any) -> Flow:
    """Returns the flow with a network that is its whole velocity at times in [0, 1]."""
    return replace(flow, net=net, spec=replace(flow.spec, clock=1.0, guidance=1.0))


def with_flow(policy: Any, change: Callable[[Flow], Flow]) -> Any:
    """Returns the policy with its flow changed; wrappers and the choice of actions stay.

    Raises UserError for a policy without a flow.
    """
    if isinstance(policy, FlowPolicy):
        return replace(policy, flow=change(policy.flow))
    if not hasattr(policy, "policy"):
        raise UserError(f"{type(policy).__name__} has no flow that can be pushed: take a policy cloned by bc or ifql")
    return replace(policy, policy=with_flow(policy.policy, change))
