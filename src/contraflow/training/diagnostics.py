"""Diagnostics during a run: the distribution of the policy's actions, and the agent's own diagnostics."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.agents.base import Agent
from contraflow.core.types import PRNGKey
from contraflow.policy.base import Policy

BINS = 16  # of the action histogram
STATES = 16


def diagnose(agent: Agent, state: Any, obs: Any, key: PRNGKey) -> dict[str, float]:
    """Returns diagnostics on the first 16 of the observations [B, ...], as plain numbers.

    Exploring actions of any agent give `action_mean`, `action_std`, `saturated` (P(|a| > .95)), `action_entropy` (nats
    per dimension, from a 32-bin histogram; uniform is log 2 = .69) and `action_share/i` (fraction of actions, over all
    dimensions, in the i-th of 16 bins over [-1, 1]). The agent's own `diagnostics` are added.
    """
    obs = jax.tree.map(lambda x: jnp.asarray(x)[:STATES], obs)
    out = _actions(agent.policy(state), obs, jr.fold_in(key, 0))
    if hasattr(agent, "diagnostics"):
        out |= _own(agent, state, obs, jr.fold_in(key, 1))
    return {f"diagnostics/{name}": float(value) for name, value in jax.device_get(out).items()}


@partial(jax.jit, static_argnames=("agent",))
def _own(agent: Any, state: Any, obs: Any, key: PRNGKey) -> dict[str, Float[Array, ""]]:
    return agent.diagnostics(state, obs, key)


@jax.jit
def _actions(policy: Policy, obs: Any, key: PRNGKey) -> dict[str, Float[Array, ""]]:
    keys = jr.split(key, (jax.tree.leaves(obs)[0].shape[0], 128))
    actions = jax.vmap(lambda o, ks: jax.vmap(lambda k: policy(o, k, False))(ks))(obs, keys)
    width = 2.0 / 32
    bins = jnp.clip(jnp.floor((actions + 1.0) / width), 0, 31).astype(jnp.int32)
    share = jnp.mean(jax.nn.one_hot(bins, 32), axis=1)  # [B, a, 32]
    entropy = -jnp.sum(share * jnp.log(jnp.maximum(share, 1e-12) / width), axis=-1)
    histogram = share.mean((0, 1)).reshape(BINS, -1).sum(1)
    return {
        "action_mean": actions.mean(),
        "action_std": jnp.std(actions, axis=1).mean(),
        "saturated": jnp.mean(jnp.abs(actions) > 0.95),
        "action_entropy": entropy.mean(),
        **{f"action_share/{i}": histogram[i] for i in range(BINS)},
    }
