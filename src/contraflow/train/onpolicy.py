"""On-policy training: a rollout of all environments under one policy, then one update from it; its settings."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from contraflow.agents.base import Agent
from contraflow.agents.onpolicy.ppo import PPO
from contraflow.core.types import EnvSpec, Metrics, PRNGKey, Rollout, Step
from contraflow.envs import make
from contraflow.envs.base import Env
from contraflow.envs.chunk import chunked
from contraflow.train.log import TrackerName
from contraflow.train.loop import Carry, Learner, check_counts, next_due
from contraflow.train.pretrained import settle


@dataclass(frozen=True)
class OnPolicy:
    """`unroll` steps of all environments, then `agent.update` on the rollout [unroll, N]."""

    unroll: int

    @property
    def learns(self) -> bool:
        return True

    def iterate(self, agent: Any, env: Env, carry: Carry, key: PRNGKey) -> tuple[Carry, Metrics]:
        """Act and step `unroll` times, then learn."""
        learner = carry.learner
        policy = agent.policy(learner.agent)

        def advance(env_state, obs, i):
            action, extras = decide(policy, obs, learner.iteration, i, key)
            env_state, step = env.step(env_state, action)
            counted = replace(step, steps=step.steps * step.valid)
            return env_state, counted, (obs, extras, counted)

        if env.spec.jittable:

            def body(c, i):
                env_state, obs = c
                env_state, step, row = advance(env_state, obs, i)
                return (env_state, step.obs), row

            (env_state, obs), rows = jax.lax.scan(body, (carry.env, carry.obs), jnp.arange(self.unroll))
        else:
            env_state, obs, history = carry.env, carry.obs, []
            for i in range(self.unroll):
                env_state, step, row = advance(env_state, obs, i)
                obs = step.obs
                history.append(row)
            rows = jax.tree.map(lambda *x: np.stack(x), *jax.device_get(history))
        obs_rows, extras, steps = rows
        learner, metrics = learn(agent, learner, obs_rows, extras, steps, key)
        return Carry(learner, env_state, obs), metrics


@partial(jax.jit, static_argnames=("agent", "spec"))
def first_learner(agent: Any, spec: EnvSpec, key: PRNGKey) -> Learner:
    """The start of a run: a fresh agent, nothing counted."""
    zero = jnp.zeros((), jnp.int32)
    return Learner(agent.init(key, spec), None, jnp.zeros(spec.num_envs), zero, jnp.copy(zero))


@jax.jit
def decide(policy: Any, obs: Any, iteration: Any, i: Any, key: PRNGKey) -> tuple[Any, Any]:
    """Actions [N, a] for observations [N, o] at step i of a rollout, and what the agent remembers of them."""
    key = jr.fold_in(jr.fold_in(jr.fold_in(key, iteration), 0), i)
    return jax.vmap(policy.sample)(obs, jr.split(key, obs.shape[0]))


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


@dataclass(frozen=True)
class OnPolicyRun:
    """One on-policy agent on one environment with one seed. Steps are environment steps summed over `num_envs`."""

    env: str = "envpool:CartpoleSwingup-v1"
    agent: Agent = field(default_factory=PPO)
    pretrained: str | None = None
    """Folder of a run or policy to start from: its networks, normalisation and chunks; None starts from scratch."""
    steps: int = 1_000_000
    num_envs: int = 8
    """Environments stepped in parallel."""
    unroll: int = 128
    """Decisions of each environment between two updates."""
    horizon: int = 1
    """Actions per decision; those of the pretrained policy where one is given."""
    execute: int = 1
    """How many of them are carried out."""
    eval_every: int = 50_000
    eval_episodes: int = 10
    log_every: int = 10_000
    seed: int = 0
    trackers: tuple[TrackerName, ...] = ("tensorboard",)

    def __post_init__(self):
        check_counts(self, "steps", "num_envs", "unroll", "eval_every", "eval_episodes", "log_every")
        if not 1 <= self.execute <= self.horizon:
            raise ValueError(f"a chunk needs 1 <= execute <= horizon, got {self.execute} and {self.horizon}")

    def resolve(self, trust: bool) -> "OnPolicyRun":
        """The run with what comes from the pretrained policy."""
        return settle(self, trust)

    def environments(self, trust: bool) -> tuple[Env, Env]:
        """That of training and that of evaluations."""
        return (
            chunked(make(self.env, self.num_envs, self.seed, trust=trust), self.horizon, self.execute),
            chunked(make(self.env, self.eval_episodes, self.seed + 10_000, trust=trust), self.horizon, self.execute),
        )

    def learner(self, env: Env, key: PRNGKey) -> Learner:
        """A fresh one."""
        return first_learner(self.agent, env.spec, key)

    def next_phase(self, taken: int) -> tuple[OnPolicy, int]:
        """The phase at step `taken`, and its iterations until something is due."""
        size = self.unroll * self.num_envs * self.execute
        return OnPolicy(self.unroll), max(1, -(-(min(self.steps, next_due(self, taken)) - taken) // size))

    def typical_obs(self, carry: Carry, key: PRNGKey) -> Any:
        """Observations [N, o] of late, to look at the agent with."""
        return carry.obs
