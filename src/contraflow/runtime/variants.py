"""A trained policy beside what is left of it without its choice among particles, and without its actor."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from contraflow.agents import RFM, SIR
from contraflow.agents.base import acting_state
from contraflow.agents.online.sir import SIRState
from contraflow.core.types import UserError
from contraflow.envs import make
from contraflow.envs.base import Env
from contraflow.envs.chunk import chunked
from contraflow.policy.select import Argmax, First
from contraflow.runtime.policy import Policy

OWN, ONE, UNIFORM = "own", "one particle", "uniform actions"


def variants(policy: Policy) -> dict[str, tuple[Any, Any]]:
    """(agent, state) by rule: `own`, and for RFM `one particle` and `uniform actions` in place of the actor's.

    As many uniform actions as the policy has particles, so that both ask the critic equally often; 32 for one particle.
    """
    out: dict[str, tuple[Any, Any]] = {OWN: (policy.agent, policy.state)}
    if isinstance(policy.agent, RFM):
        out[ONE] = (replace(policy.agent, greedy=First()), policy.state)
        out[UNIFORM] = without_actor(policy)
    return out


def without_actor(policy: Policy) -> tuple[SIR, SIRState]:
    """The best of n uniform actions by the critic of a flow policy: what the critic does alone."""
    particles = policy.agent.greedy.particles
    critic, step, stats = policy.state.critic, policy.state.step, policy.state.stats
    agent = SIR(greedy=Argmax(particles if particles > 1 else 32))
    return agent, acting_state(agent, SIRState(critic, critic, (), jnp.zeros(policy.spec.action_dim), step, stats))


@contextmanager
def environment(
    policy: Policy, id: str, num_envs: int, seed: int, trust: bool = False, render: bool = False
) -> Iterator[Env]:
    """The environment `id` for the policy, closed afterwards. Raises UserError when their sizes differ."""
    env = chunked(make(id, num_envs, seed, trust=trust, render=render), policy.spec.horizon, policy.spec.execute)
    try:
        have, want = (env.spec.obs_dim, env.spec.action_dim), (policy.spec.obs_dim, policy.spec.action_dim)
        if have != want:
            raise UserError(
                f"{id} has {have[0]} observations and {have[1] // policy.spec.horizon} actions, the policy was trained "
                f"for {want[0]} and {want[1] // policy.spec.horizon}: choose an environment like {policy.env}"
            )
        yield env
    finally:
        getattr(env, "close", lambda: None)()
