"""The advantage of an action by a critic, as a reward of alignment: `critic:DIR`."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.core.trust import Trust
from contraflow.core.types import UserError
from contraflow.nets.critic import QEnsemble
from contraflow.policy.artifact import load_policy, policy_folder
from contraflow.policy.base import Policy, inner, innermost
from contraflow.policy.normalise import RunningMoments

PREFIX = "critic:"
ACTIONS, STATES = 16, 512  # actions behind the mean of a state, and states behind the scale


@dataclass(frozen=True, eq=False)
class Advantage:
    """r(a, s) = (Q(s, a) - mean_j Q(s, a_j)) / scale, with 16 actions a_j of the critic's own policy, from fixed noise.

    The level of Q in a state says nothing about its actions. Methods that weigh samples by exp(r / lambda) would learn
    the states of high value alone.
    """

    critic: QEnsemble
    policy: Any  # has `particles` of an observation as the critic sees it
    stats: RunningMoments | None
    scale: Float[Array, ""]

    def __call__(self, x: Float[Array, " a"], cond: Float[Array, " o"]) -> Float[Array, ""]:
        seen = cond if self.stats is None else self.stats(cond)
        return (self.critic.value(seen, x) - jnp.mean(self.values(seen))) / self.scale

    def values(self, seen: Float[Array, " o"]) -> Float[Array, " n"]:
        """Returns Q of the policy's own actions."""
        return jax.vmap(partial(self.critic.value, seen))(self.policy.particles(seen, jr.key(0), ACTIONS))


def advantage(policy: Policy, obs: Float[Array, "n o"], name: str) -> Advantage:
    """Returns the reward of a policy with a critic. Over the policy's actions in a state it has mean 0, and deviation 1
    in the root mean square over the states `obs`.

    Raises UserError for a policy without a critic or without actions to draw, and for a critic that tells none apart.
    """
    critic, base, stats = inner(policy, "critic"), innermost(policy), inner(policy, "stats")
    if critic is None or not hasattr(base, "particles"):
        raise UserError(f"{name} needs a policy with a critic and a flow, such as those of ifql: it has not both")
    found = Advantage(critic, base, stats, jnp.ones(()))
    seen = obs[jr.randint(jr.key(1), (STATES,), 0, len(obs))]
    seen = seen if stats is None else jax.vmap(stats)(seen)
    scale = jnp.sqrt(jnp.mean(jnp.var(jax.jit(jax.vmap(found.values))(seen), axis=1, ddof=1)))
    if not scale > 0:
        raise UserError(f"{name} values all actions of its policy alike: train the critic first")
    return Advantage(critic, base, stats, scale)


def load(name: str, obs: Float[Array, "n o"], dim: int, trust: Trust) -> Advantage:
    """Returns the reward `critic:DIR` of actions [dim] under observations like `obs`. Raises UserError for other
    sizes."""
    policy, spec, _ = load_policy(policy_folder(Path(name.removeprefix(PREFIX))), trust)
    if (spec.obs_dim, spec.action_dim) != (obs.shape[1], dim):
        raise UserError(
            f"{name} was trained for {spec.obs_dim} observations and {spec.action_dim} numbers of action, the model "
            f"has {obs.shape[1]} and {dim}: take a critic of the same environment and horizon"
        )
    return advantage(policy, obs, name)
