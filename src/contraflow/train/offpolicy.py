"""Off-policy training: random actions into the buffer, then acting and learning; the settings of such a run."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr

from contraflow.agents.base import Agent
from contraflow.agents.online.rfm import RFM
from contraflow.core.types import EnvSpec, Metrics, PRNGKey, Step
from contraflow.data.replay import Buffer
from contraflow.data.samplers import NStep
from contraflow.envs import make
from contraflow.envs.base import Env
from contraflow.train.log import TrackerName
from contraflow.train.loop import Carry, Learner, check_counts, next_due


@dataclass(frozen=True)
class OffPolicy:
    """`updates` gradient steps on `batch_size` rows of `n_step` transitions after each step of all environments; 0 with
    random actions is the warm-up."""

    random: bool
    updates: int
    batch_size: int
    n_step: int = 1

    @property
    def learns(self) -> bool:
        return not self.random

    def iterate(self, agent: Agent, env: Env, carry: Carry, key: PRNGKey) -> tuple[Carry, Metrics]:
        """Act, step, store, learn."""
        learner = carry.learner
        action = decide(self, env.spec, agent.policy(learner.agent), carry.obs, learner.iteration, key)
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


@partial(jax.jit, static_argnames=("phase", "spec"))
def decide(phase: OffPolicy, spec: EnvSpec, policy: Any, obs: Any, iteration: Any, key: PRNGKey) -> Any:
    """Actions [N, a] for observations [N, o]: uniform in the warm-up, the agent's exploration afterwards."""
    key = jr.fold_in(jr.fold_in(key, iteration), 0)
    if phase.random:
        return jr.uniform(key, (spec.num_envs, spec.action_dim), minval=-1.0, maxval=1.0)
    return jax.vmap(lambda o, k: policy(o, k, False))(obs, jr.split(key, spec.num_envs))


@partial(jax.jit, static_argnames=("phase", "agent"), donate_argnames=("learner",))
def learn(
    phase: OffPolicy, agent: Agent, learner: Learner, obs: Any, action: Any, step: Step, key: PRNGKey
) -> tuple[Learner, Metrics]:
    """Store one step of all environments and take `phase.updates` gradient steps."""
    buffer = learner.buffer.add(obs, action, step)
    returns = learner.returns + step.reward
    done = (step.terminated | step.truncated) & step.valid
    metrics: Metrics = {"episodes": jnp.sum(done), "episode_return_sum": jnp.sum(jnp.where(done, returns, 0.0))}
    state = learner.agent
    if phase.updates:
        keys = jr.split(jr.fold_in(jr.fold_in(key, learner.iteration), 1), phase.updates)

        def update(state, key):
            k_sample, k_update = jr.split(key)
            batch = NStep(phase.n_step, agent.gamma)(buffer.rows, k_sample, phase.batch_size)
            return agent.update(state, batch, k_update)

        state, info = jax.lax.scan(update, state, keys)
        metrics |= jax.tree.map(jnp.mean, info)
    steps = learner.steps + jnp.sum(step.valid * step.steps, dtype=jnp.int32)
    return Learner(state, buffer, jnp.where(done, 0.0, returns), steps, learner.iteration + 1), metrics


@dataclass(frozen=True)
class Run:
    """One agent on one environment with one seed. All step counts are environment steps summed over `num_envs`."""

    env: str = "envpool:CartpoleSwingup-v1"
    agent: Agent = field(default_factory=RFM)
    steps: int = 100_000
    """Environment steps in all, the random ones included."""
    collect: int = 5_000
    """Steps of uniformly random actions before learning starts."""
    num_envs: int = 1
    """Environments stepped in parallel."""
    updates: int = 1
    """Gradient steps after each step of all environments; updates / num_envs is the update-to-data ratio."""
    batch_size: int = 256
    n_step: int = 1
    """Rewards summed before the value is asked: y = sum_{k<n} gamma^k r_k + gamma^n V(s_n), without correction for the
    actions in between being those of older policies."""
    buffer_size: int = 250_000
    eval_every: int = 10_000
    eval_episodes: int = 10
    log_every: int = 1_000
    seed: int = 0
    trackers: tuple[TrackerName, ...] = ("tensorboard",)

    def __post_init__(self):
        check_counts(
            self, "steps", "num_envs", "batch_size", "n_step", "buffer_size", "eval_every", "eval_episodes", "log_every"
        )
        if self.updates < 0:
            raise ValueError(f"updates must not be negative, got {self.updates}")
        if not 0 < self.collect < self.steps:
            raise ValueError(f"collect must lie between 0 and steps={self.steps}, got {self.collect}")
        if self.buffer_size < self.num_envs:
            raise ValueError(f"buffer_size={self.buffer_size} is smaller than num_envs={self.num_envs}")

    def resolve(self, trust: bool) -> "Run":
        """The run as it will be written down: itself."""
        return self

    def environments(self, trust: bool) -> tuple[Env, Env]:
        """That of training and that of evaluations."""
        return (
            make(self.env, self.num_envs, self.seed, trust=trust),
            make(self.env, self.eval_episodes, self.seed + 10_000, trust=trust),
        )

    def learner(self, env: Env, key: PRNGKey) -> Learner:
        """A fresh one."""
        return first_learner(self.agent, env.spec, self.buffer_size, key)

    def next_phase(self, taken: int) -> tuple[OffPolicy, int]:
        """The phase at step `taken`, and its iterations until something is due."""
        warm_up = taken < self.collect
        milestone = min(self.collect if warm_up else self.steps, next_due(self, taken))
        phase = OffPolicy(warm_up, 0 if warm_up else self.updates, self.batch_size, self.n_step)
        return phase, max(1, -(-(milestone - taken) // self.num_envs))

    def typical_obs(self, carry: Carry, key: PRNGKey) -> Any:
        """Observations [B, o] of late, to look at the agent with."""
        rows = carry.learner.buffer.rows
        return rows.obs[rows.draw(key, self.batch_size)]
