"""The two phases of off-policy training: random actions into the buffer, then acting and learning.

One body for every environment. A jittable environment runs many iterations in one compiled scan; a host environment
runs the same jitted pieces with Python between them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int

from contraflow.agents.base import Agent, acting_state
from contraflow.data.buffer import Buffer
from contraflow.envs.base import Env
from contraflow.types import EnvSpec, Metrics, PRNGKey, PRNGKeys, Step, Transition, UserError


class Learner(eqx.Module):
    """Everything that training changes, but for the environment: what a checkpoint must hold."""

    agent: Any
    buffer: Buffer
    returns: Float[Array, " N"]  # reward so far in each running episode
    steps: Int[Array, ""]  # environment steps taken, summed over environments
    iteration: Int[Array, ""]


class Carry(eqx.Module):
    learner: Learner
    env: Any
    obs: Any


@dataclass(frozen=True)
class Phase:
    """`updates` gradient steps on `batch_size` rows of `n_step` transitions after each step of all environments; 0 with
    random actions is the warm-up."""

    random: bool
    updates: int
    batch_size: int
    n_step: int = 1


@partial(jax.jit, static_argnames=("agent", "spec", "buffer_size"))
def first_learner(agent: Agent, spec: EnvSpec, buffer_size: int, key: PRNGKey) -> Learner:
    return Learner(
        agent.init(key, spec),
        Buffer.empty(buffer_size, spec),
        jnp.zeros(spec.num_envs),
        jnp.zeros((), jnp.int32),
        jnp.zeros((), jnp.int32),
    )


@partial(jax.jit, static_argnames=("phase", "agent", "spec"))
def decide(phase: Phase, agent: Agent, spec: EnvSpec, state: Any, obs: Any, iteration: Any, key: PRNGKey) -> Any:
    """Actions [N, a] for observations [N, o]: uniform in the warm-up, the agent's exploration afterwards."""
    key = jr.fold_in(jr.fold_in(key, iteration), 0)
    if phase.random:
        return jr.uniform(key, (spec.num_envs, spec.action_dim), minval=-1.0, maxval=1.0)
    return jax.vmap(lambda o, k: agent.act(state, o, k, True))(obs, jr.split(key, spec.num_envs))


@partial(jax.jit, static_argnames=("phase", "agent"), donate_argnames=("learner",))
def learn(
    phase: Phase, agent: Agent, learner: Learner, obs: Any, action: Any, step: Step, key: PRNGKey
) -> tuple[Learner, Metrics]:
    """Store one step of all environments and take `phase.updates` gradient steps."""
    one = jnp.ones_like(step.valid, jnp.int32)
    rows = Transition(obs, action, step.reward, step.next_obs, step.terminated, step.truncated, one)
    buffer = learner.buffer.add(rows, step.valid)
    returns = learner.returns + step.reward
    done = (step.terminated | step.truncated) & step.valid
    metrics: Metrics = {"episodes": jnp.sum(done), "episode_return_sum": jnp.sum(jnp.where(done, returns, 0.0))}
    state = learner.agent
    if phase.updates:
        keys = jr.split(jr.fold_in(jr.fold_in(key, learner.iteration), 1), phase.updates)

        def update(state, key):
            k_sample, k_update = jr.split(key)
            gamma = getattr(agent, "gamma") if phase.n_step > 1 else 1.0  # noqa: B009 - only n-step returns need it
            return agent.update(state, buffer.sample(k_sample, phase.batch_size, phase.n_step, gamma), k_update)

        state, info = jax.lax.scan(update, state, keys)
        metrics |= jax.tree.map(jnp.mean, info)
    steps = learner.steps + jnp.sum(step.valid, dtype=jnp.int32)
    return Learner(state, buffer, jnp.where(done, 0.0, returns), steps, learner.iteration + 1), metrics


def iterate(phase: Phase, agent: Agent, env: Env, carry: Carry, key: PRNGKey) -> tuple[Carry, Metrics]:
    """Act, step, store, learn: the body of every loop."""
    learner = carry.learner
    state = acting_state(agent, learner.agent)
    action = decide(phase, agent, env.spec, state, carry.obs, learner.iteration, key)
    env_state, step = env.step(carry.env, action)
    learner, metrics = learn(phase, agent, learner, carry.obs, action, step, key)
    return Carry(learner, env_state, step.obs), metrics


@partial(jax.jit, static_argnames=("phase", "agent", "env", "n"), donate_argnames=("carry",))
def _scan(phase: Phase, agent: Agent, env: Env, carry: Carry, key: PRNGKey, n: int) -> tuple[Carry, Metrics]:
    return jax.lax.scan(lambda c, _: iterate(phase, agent, env, c, key), carry, None, length=n)


@partial(jax.jit, static_argnames=("phase", "agent", "env", "n"), donate_argnames=("carry",))
def _scan_seeds(phase: Phase, agent: Agent, env: Env, carry: Carry, keys: PRNGKeys, n: int) -> tuple[Carry, Metrics]:
    return jax.vmap(lambda c, k: _scan(phase, agent, env, c, k, n))(carry, keys)


def epoch_seeds(
    phase: Phase, agent: Agent, env: Env, carry: Carry, keys: PRNGKeys, n: int
) -> tuple[Carry, list[dict[str, float]]]:
    """`epoch` of a jittable environment for S seeds in one program: `carry` with a leading [S], `keys` [S]."""
    carry, stacked = _scan_seeds(phase, agent, env, carry, keys, n)
    metrics = jax.device_get(stacked)
    return carry, [summarise({name: x[s] for name, x in metrics.items()}) for s in range(keys.shape[0])]


def epoch(
    phase: Phase,
    agent: Agent,
    env: Env,
    carry: Carry,
    key: PRNGKey,
    n: int,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Carry, dict[str, float], UserError | None]:
    """n iterations, the means of their metrics, and what a host environment complained of, if it did.

    A host loop ends early once `stop()` is true or the environment fails; the carry is good in either case.
    """
    if env.spec.jittable:
        carry, metrics = _scan(phase, agent, env, carry, key, n)
        return carry, summarise(jax.device_get(metrics)), None
    history, error = [], None
    for _ in range(n):
        try:
            carry, metrics = iterate(phase, agent, env, carry, key)
        except UserError as problem:
            error = problem
            break
        history.append(metrics)
        if stop():
            break
    stacked = jax.tree.map(lambda *m: np.stack(m), *jax.device_get(history)) if history else None
    return carry, summarise(stacked) if stacked else {}, error


def summarise(metrics: dict[str, np.ndarray]) -> dict[str, float]:
    """Means over the iterations of an epoch; `return` is the mean over the episodes that ended in it, if any did."""
    episodes, total = metrics.pop("episodes").sum(), metrics.pop("episode_return_sum").sum()
    means = {name: float(np.mean(value)) for name, value in metrics.items()}
    return means | {"episodes": float(episodes)} | ({"return": float(total / episodes)} if episodes else {})
