"""The two phases of off-policy training: random actions into the buffer, then acting and learning."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr

from contraflow.agents.base import Agent, acting_state
from contraflow.data.buffer import Buffer
from contraflow.envs.base import Env
from contraflow.train.loop import Carry, Learner
from contraflow.types import EnvSpec, Metrics, PRNGKey, Step, Transition


@dataclass(frozen=True)
class OffPolicy:
    """`updates` gradient steps on `batch_size` rows of `n_step` transitions after each step of all environments; 0 with
    random actions is the warm-up."""

    random: bool
    updates: int
    batch_size: int
    n_step: int = 1

    def iterate(self, agent: Agent, env: Env, carry: Carry, key: PRNGKey) -> tuple[Carry, Metrics]:
        """Act, step, store, learn."""
        learner = carry.learner
        state = acting_state(agent, learner.agent)
        action = decide(self, agent, env.spec, state, carry.obs, learner.iteration, key)
        env_state, step = env.step(carry.env, action)
        learner, metrics = learn(self, agent, learner, carry.obs, action, step, key)
        return Carry(learner, env_state, step.obs), metrics


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
def decide(phase: OffPolicy, agent: Agent, spec: EnvSpec, state: Any, obs: Any, iteration: Any, key: PRNGKey) -> Any:
    """Actions [N, a] for observations [N, o]: uniform in the warm-up, the agent's exploration afterwards."""
    key = jr.fold_in(jr.fold_in(key, iteration), 0)
    if phase.random:
        return jr.uniform(key, (spec.num_envs, spec.action_dim), minval=-1.0, maxval=1.0)
    return jax.vmap(lambda o, k: agent.act(state, o, k, True))(obs, jr.split(key, spec.num_envs))


@partial(jax.jit, static_argnames=("phase", "agent"), donate_argnames=("learner",))
def learn(
    phase: OffPolicy, agent: Agent, learner: Learner, obs: Any, action: Any, step: Step, key: PRNGKey
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
    steps = learner.steps + jnp.sum(step.valid * step.steps, dtype=jnp.int32)
    return Learner(state, buffer, jnp.where(done, 0.0, returns), steps, learner.iteration + 1), metrics
