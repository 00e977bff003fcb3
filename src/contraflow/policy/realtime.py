"""Real-time chunking: a new chunk of actions that continues the one being executed while it was computed.

Inference takes `delay` control steps. When the observation for a new chunk is taken, the next `delay` actions of the
previous chunk are already decided. The new chunk must begin with them, and should go on as they do.

    Guidance   any flow: the velocity is pulled towards the previous chunk (2506.07339)
    Prefix     a flow that was trained with the first actions given, `BC(delay_max=...)` (2512.05964)
"""

from dataclasses import dataclass
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from contraflow.core.optim import check_positive
from contraflow.core.types import PRNGKey, UserError
from contraflow.flow.model import Condition, Flow
from contraflow.flow.path import Scalar, Vector
from contraflow.policy.base import Cost, Policy, inner, mapped_ablations
from contraflow.policy.flow import solves_velocity
from contraflow.policy.push import Push, renetted, with_flow

Count = Int[Array, ""] | int
Chunk = Float[Array, "h a"]


@dataclass(frozen=True)
class Guidance:
    """Each step of the solver pulls the end that the flow predicts towards the previous chunk Y (2506.07339):

        v + min(limit, (t^2 + (1 - t)^2 / std^2) / (t (1 - t))) J^T W (Y - x1),   x1 = x_t + (1 - t) v,   J = dx1/dx_t.

    The factor without the limit is that of Y = x1 + noise with the variance that x1 has given x_t, if actions are
    independent with standard deviation `std`. Raises ValueError for a limit or deviation that is not positive.
    """

    limit: float = 10.0
    """Published settings take the number of solver steps."""
    std: float = 0.5
    """1 in the paper. Actions in [-1, 1] deviate less, and would be pulled too little."""
    soft: Literal["exp", "linear", "none"] = "exp"
    """Weights W between the actions that are fixed, 1, and those that the previous chunk does not hold, 0."""
    jacobian: bool = True
    """False replaces J by the identity: half the cost, further from the exact answer."""

    def __post_init__(self):
        check_positive(self, "limit", "std")


@dataclass(frozen=True)
class Prefix:
    """The first actions are given to the network at time 1; it has been trained with up to `delay_max` of them.

    Raises ValueError for a negative `delay_max`.
    """

    delay_max: int

    def __post_init__(self):
        if self.delay_max < 0:
            raise ValueError(f"delay_max must not be negative, got {self.delay_max}")


class RealTime(eqx.Module):
    """A flow policy of chunks that can also `resume` a chunk."""

    policy: Any
    rule: Guidance | Prefix = eqx.field(static=True)

    def resume(self, obs: Any, previous: Chunk, left: Count, delay: Count, key: PRNGKey, greedy: bool = True) -> Chunk:
        """Returns a chunk [h, a] for an observation, of which the first `delay` actions are those of `previous`.

        `previous` [h, a] begins with the action that is executed next. Only its first `left` actions are known; with
        `left` = 0 there is no previous chunk.
        """
        shape, known = previous.shape, jnp.minimum(delay, left)
        goal, places = previous.reshape(-1), jnp.arange(shape[0])
        given = jnp.repeat(places < known, shape[1])

        def steered(flow: Flow) -> Flow:
            end = flow.spec.support.latent(goal)
            if isinstance(self.rule, Prefix):
                net: Any = _Given(flow, end, places < known)
            else:
                weight = overlap_weights(self.rule.soft, shape[0], known, left)
                net = _pulled(flow, end, jnp.repeat(weight, shape[1]), self.rule)
            return renetted(flow, net)

        action = with_flow(self.policy, steered)(obs, key, greedy)
        return jnp.where(given, goal, action).reshape(shape)

    def __call__(self, obs: Any, key: PRNGKey, greedy: bool = True) -> Float[Array, " a"]:
        return self.policy(obs, key, greedy)

    def ablations(self) -> dict[str, Policy]:
        return mapped_ablations(self.policy, lambda policy: RealTime(policy, self.rule))

    @property
    def cost(self) -> Cost:
        """The cost of a chunk without a previous one. With one, guidance also takes a gradient in every evaluation."""
        return self.policy.cost


def _pulled(flow: Flow, goal: Vector, weight: Vector, rule: Guidance) -> Push:
    """Returns the velocity of a flow, pulled towards `goal`: up -|W^1/2 (Y - x1)|^2 / 2."""

    def gain(t):
        strength = (t**2 + (1.0 - t) ** 2 / rule.std**2) / jnp.maximum(t * (1.0 - t), 1e-6)
        return jnp.minimum(rule.limit, strength)

    return Push(flow, lambda x1, t: weight * (goal - x1), gain, "end" if rule.jacobian else "held")


class _Given(eqx.Module):
    """The velocity of a flow that sees the first actions of `goal` at time 1; these move straight to their values."""

    flow: Flow
    goal: Vector
    given: Bool[Array, " h"]

    @property
    def dim(self) -> int:
        return self.flow.dim

    def __call__(self, x: Vector, t: Scalar, cond: Condition) -> Vector:
        given = jnp.repeat(self.given, self.dim // self.given.shape[0])
        seen = jnp.where(given, self.goal, x)
        v = self.flow.output(seen, jnp.where(self.given, 1.0, t), cond)
        return jnp.where(given, (self.goal - x) / jnp.maximum(1.0 - t, 1e-3), v)


def overlap_weights(soft: str, horizon: int, known: Count, left: Count) -> Float[Array, " h"]:
    """Returns W [h]: 1 for the `known` actions, falling to 0 for those that the previous chunk does not hold.

    In between W = c for "linear", c (e^c - 1) / (e - 1) for "exp", with c = (left - i) / (left - known + 1), and 0 for
    "none" (2506.07339, eq. 5).
    """
    i = jnp.arange(horizon)
    c = jnp.clip((left - i) / (left - jnp.minimum(known, left) + 1.0), 0.0, 1.0)
    between = {"exp": c * jnp.expm1(c) / jnp.expm1(1.0), "linear": c, "none": 0.0 * c}[soft]
    return jnp.where(i < jnp.minimum(known, left), 1.0, between)


def realtime(policy: Policy, rule: Guidance = Guidance()) -> RealTime:
    """Returns the policy with the ability to resume chunks by guidance; wrappers and the choice of actions stay.

    Raises UserError for a policy without a flow, and for a flow that is not a velocity on the linear path.
    """
    if isinstance(policy, RealTime):
        policy = policy.policy
    flow = inner(policy, "flow")
    if flow is None or not solves_velocity(flow.spec):
        raise UserError("real-time chunking needs a flow policy with velocities on the linear path, without noise")
    with_flow(policy, lambda flow: flow)
    return RealTime(policy, rule)
