"""The phase of on-policy training: a rollout of all environments under one policy, then one update from it."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from contraflow.agents.base import acting_state
from contraflow.envs.base import Env
from contraflow.train.loop import Carry, Learner
from contraflow.types import EnvSpec, Metrics, PRNGKey, Rollout, Step


@dataclass(frozen=True)
class OnPolicy:
    """`unroll` steps of all environments, then `agent.update` on the rollout [unroll, N]."""

    unroll: int

    def iterate(self, agent: Any, env: Env, carry: Carry, key: PRNGKey) -> tuple[Carry, Metrics]:
        """Act and step `unroll` times, then learn."""
        learner = carry.learner
        state = acting_state(agent, learner.agent)

        def advance(env_state, obs, i):
            action, extras = decide(agent, state, obs, learner.iteration, i, key)
            env_state, step = env.step(env_state, action)
            return env_state, step, (obs, extras, replace(step, steps=step.steps * step.valid))

        if env.spec.jittable:

            def body(c, i):
                env_state, step, row = advance(*c, i)
                return (env_state, step.obs), row

            (env_state, obs), rows = jax.lax.scan(body, (carry.env, carry.obs), jnp.arange(self.unroll))
        else:
            env_state, obs, history = carry.env, carry.obs, []
            for i in range(self.unroll):
                env_state, step, row = advance(env_state, obs, i)
                obs = step.obs
                history.append(row)
            rows = jax.tree.map(lambda *x: np.stack(x), *jax.device_get(history))
        learner, metrics = learn(agent, learner, *rows, key)
        return Carry(learner, env_state, obs), metrics


@partial(jax.jit, static_argnames=("agent", "spec"))
def first_learner(agent: Any, spec: EnvSpec, key: PRNGKey) -> Learner:
    """The start of a run: a fresh agent, nothing counted."""
    zero = jnp.zeros((), jnp.int32)
    return Learner(agent.init(key, spec), None, jnp.zeros(spec.num_envs), zero, jnp.copy(zero))


@partial(jax.jit, static_argnames=("agent",))
def decide(agent: Any, state: Any, obs: Any, iteration: Any, i: Any, key: PRNGKey) -> tuple[Any, Any]:
    """Actions [N, a] for observations [N, o] at step i of a rollout, and what the agent remembers of them."""
    key = jr.fold_in(jr.fold_in(jr.fold_in(key, iteration), 0), i)
    return jax.vmap(lambda o, k: agent.sample(state, o, k))(obs, jr.split(key, obs.shape[0]))


@partial(jax.jit, static_argnames=("agent",), donate_argnames=("learner",))
def learn(agent: Any, learner: Learner, obs: Any, extras: Any, step: Step, key: PRNGKey) -> tuple[Learner, Metrics]:
    """Update from a rollout; every leaf of `obs`, `extras` and `step` is [T, N, ...]."""
    rollout = Rollout(obs, extras, step.reward, step.next_obs, step.terminated, step.truncated, step.valid)
    done = (step.terminated | step.truncated) & step.valid

    def tally(returns, row):
        reward, done = row
        returns = returns + reward
        return jnp.where(done, 0.0, returns), jnp.sum(jnp.where(done, returns, 0.0))

    returns, ended = jax.lax.scan(tally, learner.returns, (step.reward, done))
    state, info = agent.update(learner.agent, rollout, jr.fold_in(jr.fold_in(key, learner.iteration), 1))
    metrics = {"episodes": jnp.sum(done), "episode_return_sum": jnp.sum(ended)} | info
    steps = learner.steps + jnp.sum(step.steps, dtype=jnp.int32)
    return Learner(state, None, returns, steps, learner.iteration + 1), metrics
