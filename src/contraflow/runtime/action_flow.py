"""A trained policy on a robot whose dynamics have changed (after action flow matching, AFM, 2504.18471).

The policy plans an action whose effect it knows from the old robot. A flow maps the plan to the action with this effect
on the changed robot. It starts at the plan rather than at noise, and is fitted to pairs (plan, intended action):

    x_t = (1 - t) a_plan + t a_int,   loss |v(x_t, t, s) - (a_int - a_plan)|^2.

The paper simulates pairs for many changes and tells them apart by an observed error. Here there is one robot, and pairs
come from its transitions (s, a, s'): a is the intended action, and the plan is what would have led from s to s' on the
old robot, by an inverse model of that.

The end of a flow from x_0 to x_1 depends on x_t alone on its way, so that two plans cannot cross: in one dimension the
map rises. A motor that turns the other way is beyond it. With the plan in the condition there is no such limit, and the
field is constant along each path; this is the default.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float

from contraflow.core.types import PRNGKey, UserError
from contraflow.flow.matching import matching_error
from contraflow.flow.model import Ddim, Flow, FlowSpec
from contraflow.nets.mlp import MLP
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.base import Cost, Policy

Obs = Float[Array, "n o"]
Actions = Float[Array, "n a"]
BATCH = 256
FLOW = FlowSpec(solver=Ddim(10), network=ResidualMLP(64, 2, 32))


class Inverse(eqx.Module):
    """The action that leads from s to s', by regression on transitions."""

    net: MLP
    mean: Float[Array, " i"]
    std: Float[Array, " i"]

    def __call__(self, obs: Float[Array, " o"], next_obs: Float[Array, " o"]) -> Float[Array, " a"]:
        return self.net((jnp.concatenate([obs, next_obs - obs]) - self.mean) / self.std)


def inverse_model(
    obs: Obs, action: Actions, next_obs: Obs, key: PRNGKey, width: int = 64, steps: int = 3000
) -> Inverse:
    """Returns the inverse model of a robot from its transitions."""
    k_net, k_rows = jr.split(key)
    rows = jnp.concatenate([obs, next_obs - obs], 1)
    start = Inverse(MLP(rows.shape[1], action.shape[1], width, 2, key=k_net), rows.mean(0), rows.std(0) + 1e-6)

    def loss(net, key):
        at = jr.randint(key, (BATCH,), 0, len(obs))
        model = eqx.tree_at(lambda m: m.net, start, net)
        return jnp.mean((jax.vmap(model)(obs[at], next_obs[at]) - action[at]) ** 2)

    return eqx.tree_at(lambda m: m.net, start, _fitted(loss, start.net, k_rows, steps))


class Transformed(eqx.Module):
    """A policy whose actions pass through a flow that starts at them.

    Observations outside the range of the transitions count as those at its edge.
    """

    policy: Any
    flow: Flow
    low: Float[Array, " o"]
    high: Float[Array, " o"]
    given_plan: bool = eqx.field(static=True)

    def condition(self, obs: Float[Array, " o"], plan: Float[Array, " a"]) -> Float[Array, " c"]:
        """Returns what the flow is conditioned on: the observation, and the plan if it is given."""
        seen = 2.0 * jnp.clip((obs - self.low) / (self.high - self.low + 1e-6), 0.0, 1.0) - 1.0
        return jnp.concatenate([seen, plan]) if self.given_plan else seen

    def transform(self, obs: Float[Array, " o"], plan: Float[Array, " a"]) -> Float[Array, " a"]:
        """Returns the action for a plan."""
        return self.flow.action(self.flow.sample(plan, self.condition(obs, plan)))

    def __call__(self, obs: Float[Array, " o"], key: PRNGKey, greedy: bool = True) -> Float[Array, " a"]:
        return self.transform(obs, self.policy(obs, key, greedy))

    @property
    def cost(self) -> Cost:
        return self.policy.cost


def transformed(
    policy: Policy,
    inverse: Callable[..., Any],
    obs: Obs,
    action: Float[Array, "m a"],
    next_obs: Float[Array, "k o"],
    key: PRNGKey,
    given_plan: bool = True,
    steps: int = 3000,
    spec: FlowSpec = FLOW,
) -> Transformed:
    """Returns the policy with a flow fitted to transitions of the changed robot; `inverse(s, s')` is of the old one.

    Policies must give one action at a time. Raises UserError for arrays of different lengths.
    """
    if not len(obs) == len(action) == len(next_obs):
        raise UserError(f"give a row for each transition, got {len(obs)}, {len(action)} and {len(next_obs)}")
    k_flow, k_rows = jr.split(key)
    size, cond = action.shape[1], obs.shape[1] + (action.shape[1] if given_plan else 0)
    flow = spec.init(k_flow, size, cond)
    start = Transformed(policy, flow, obs.min(0), obs.max(0), given_plan)
    plan = jax.vmap(inverse)(obs, next_obs)

    def loss(flow, key):
        k_at, k_t = jr.split(key)
        at = jr.randint(k_at, (BATCH,), 0, len(obs))
        seen = jax.vmap(start.condition)(obs[at], plan[at])
        rows = seen, plan[at], action[at], jr.uniform(k_t, (BATCH,))
        return jnp.mean(jax.vmap(lambda *row: matching_error(flow, *row))(*rows) ** 2)

    return eqx.tree_at(lambda p: p.flow, start, _fitted(loss, flow, k_rows, steps))


def _fitted(loss: Callable[..., Any], net: Any, key: PRNGKey, steps: int) -> Any:
    """Returns the network after `steps` of Adam."""
    tx = optax.adam(optax.cosine_decay_schedule(2e-3, steps, 0.01))

    def body(carry, key):
        net, opt = carry
        updates, opt = tx.update(jax.grad(loss)(net, key), opt, net)
        return (eqx.apply_updates(net, updates), opt), None

    return jax.jit(lambda net: jax.lax.scan(body, (net, tx.init(net)), jr.split(key, steps))[0][0])(net)
