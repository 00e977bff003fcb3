"""Policies composed while they act, without training: sums of their fields (GPC, 2510.01068), alternatives, agreement.

    convex    v = sum_i w_i v_i with sum_i w_i = 1
    or        v = sum_i k_i v_i, k_i ~ w_i p_i,t(x): the field of the mixture sum_i w_i p_i (2412.17762)
    and       v = sum_i w_i v_i + (1 - sum_i w_i) v_0: scores add, v_0 is the field of N(0, I)

`or` is exact but for the steps of the solver: log p_i,t is tracked along the way,

    d log p_i = (-div v_i + s_i . (v - v_i)) dt,   s_i = (t v_i - x) / (1 - t).

`convex` and `and` are not the tilted densities p_1^w1 p_2^w2: noise does not commute with products. Gaussians of equal
variance under `convex` are the exception: the result has the mean sum_i w_i m_i and their variance.
"""

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from contraflow.core.types import PRNGKey, UserError
from contraflow.flow.model import Condition, Flow
from contraflow.flow.path import Scalar, Vector
from contraflow.policy.base import Cost, Policy, inner, innermost
from contraflow.policy.flow import FlowPolicy, solves_velocity

Rule = Literal["convex", "or", "and"]


class Composed(eqx.Module):
    """A policy that follows the fields of several flow policies, with Euler's steps. Build it with `composed`."""

    policies: tuple[Any, ...]
    weights: Float[Array, " n"]
    rule: Rule = eqx.field(static=True)
    steps: int = eqx.field(static=True)

    def __call__(self, obs: Any, key: PRNGKey, greedy: bool = True) -> Float[Array, " a"]:
        flows = [inner(policy, "flow") for policy in self.policies]
        conds = [_condition(policy, obs) for policy in self.policies]
        return flows[0].action(self._end(flows, conds, flows[0].noise(key)))

    def _end(self, flows: list[Flow], conds: list[Condition], x0: Vector) -> Vector:
        pairs = list(zip(flows, conds, strict=True))

        def step(carry, k):
            x, log_density = carry
            t = k / self.steps
            if self.rule != "or":
                v = jnp.stack([flow.velocity(x, t, cond) for flow, cond in pairs])
                total = self.weights @ v
                if self.rule == "and":
                    total = total + (1.0 - self.weights.sum()) * (2 * t - 1) / (t**2 + (1 - t) ** 2) * x
                return (x + total / self.steps, log_density), None
            found = [_with_divergence(flow, x, t, cond) for flow, cond in pairs]
            v, divergence = (jnp.stack(part) for part in zip(*found, strict=True))
            total = jax.nn.softmax(jnp.log(self.weights) + log_density) @ v
            score = (t * v - x[None]) / (1.0 - t)
            change = -divergence + jnp.sum(score * (total[None] - v), 1)
            return (x + total / self.steps, log_density + change / self.steps), None

        start = x0, jnp.zeros(len(flows))
        return jax.lax.scan(step, start, jnp.arange(self.steps, dtype=x0.dtype))[0][0]

    @property
    def cost(self) -> Cost:
        """The evaluations of all parents together; `or` also takes d derivatives of each."""
        return Cost(1, self.steps * len(self.policies), 0)


def _condition(policy: Any, obs: Any) -> Condition:
    stats = inner(policy, "stats")
    return innermost(policy).condition(obs if stats is None else stats(obs))


def _with_divergence(flow: Flow, x: Vector, t: Scalar, cond: Condition) -> tuple[Vector, Scalar]:
    """Returns the velocity [d] and its divergence, by d derivatives."""
    field = lambda x: flow.velocity(x, t, cond)
    return field(x), jnp.trace(jax.jacfwd(field)(x))


def composed(policies: tuple[Policy, ...], weights: tuple[float, ...], rule: Rule = "convex") -> Composed:
    """Returns the composition of flow policies over the same actions; each keeps its own normalisation.

    Raises UserError for a policy that is not a flow with velocities on the linear path, for flows of different sizes or
    supports, for another number of weights than policies, negative ones, and for weights of "convex" or "or" that do
    not add up to 1.
    """
    flows = [inner(policy, "flow") for policy in policies]
    for policy, flow in zip(policies, flows, strict=True):
        if flow is None or not solves_velocity(flow.spec) or not isinstance(innermost(policy), FlowPolicy):
            raise UserError("a composition is of flow policies with velocities on the linear path, without noise")
        if inner(policy, "value") is not None:
            raise UserError("a composition would lose the guidance of a policy: compose policies that are not guided")
    if len({(flow.dim, flow.spec.support) for flow in flows}) != 1:
        raise UserError("composed policies must have actions, chunks and supports of the same size and kind")
    if len(weights) != len(policies) or min(weights) < 0:
        raise UserError(f"give one weight, not negative, for each of {len(policies)} policies")
    if rule != "and" and abs(sum(weights) - 1.0) > 1e-6:
        raise UserError(f"weights of {rule} must add up to 1, got {sum(weights):g}")
    steps = max(flow.spec.solver.nfe for flow in flows)
    return Composed(tuple(policies), jnp.asarray(weights, jnp.float32), rule, steps)
