"""Off-policy: random actions into a replay buffer, then acting and learning from it."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.random as jr

from contraflow.core.trust import Trust
from contraflow.core.types import EnvSpec, Metrics, PRNGKey, Step
from contraflow.data.augment import Shifted, augmented
from contraflow.data.samplers import Mixed, NStep, Sampler, Uniform
from contraflow.training import frozen
from contraflow.training.loop import Carry, Learner, World, shown, step
from contraflow.training.sources.base import (
    Opened,
    check_chunk,
    check_counts,
    check_images,
    closed_on_error,
    discount,
    environments,
    first_learner,
    gamma_of,
    iterations,
)


@dataclass(frozen=True)
class Interact:
    """`updates` gradient steps on `batch_size` rows after each step of all environments, of which the warm-up takes
    none; its actions may be random."""

    random: bool
    updates: int
    batch_size: int
    sampler: Sampler

    @property
    def name(self) -> str:
        return "learning" if self.updates else "collecting"

    @property
    def learns(self) -> bool:
        return self.updates > 0

    def compiled(self, world: World) -> bool:
        return world.env.spec.jittable

    def iterate(self, agent: Any, world: World, carry: Carry, key: PRNGKey) -> tuple[Carry, Metrics]:
        """Act, step, store, learn."""
        learner = carry.learner
        policy = None if self.random else agent.policy(learner.agent)
        action = decide(policy, world.spec, carry.obs, learner.iteration, key)
        env_state, after = step(world.env, carry.env, action)
        learner, metrics = learn(self, agent, learner, world.data, carry.obs, action, after, key)
        return Carry(learner, env_state, after.obs), metrics


@partial(jax.jit, static_argnames=("spec",))
def decide(policy: Any, spec: EnvSpec, obs: Any, iteration: Any, key: PRNGKey) -> Any:
    """Actions [N, a] for observations [N, ...]: uniform without a policy, its exploration with one."""
    key = jr.fold_in(jr.fold_in(key, iteration), 0)
    if policy is None:
        return jr.uniform(key, (spec.num_envs, spec.action_dim), minval=-1.0, maxval=1.0)
    return jax.vmap(lambda o, k: policy(o, k, False))(obs, jr.split(key, spec.num_envs))


@partial(jax.jit, static_argnames=("stage", "agent"), donate_argnames=("learner",))
def learn(
    stage: Interact, agent: Any, learner: Learner, data: Any, obs: Any, action: Any, after: Step, key: PRNGKey
) -> tuple[Learner, Metrics]:
    """Store one step of all environments and take `stage.updates` gradient steps."""
    buffer = learner.buffer.add(obs, action, after)
    returns = learner.returns + shown(after)
    done = (after.terminated | after.truncated) & after.valid
    metrics: Metrics = {"episodes": jnp.sum(done), "episode_return_sum": jnp.sum(jnp.where(done, returns, 0.0))}
    state = learner.agent
    if stage.updates:
        keys = jr.split(jr.fold_in(jr.fold_in(key, learner.iteration), 1), stage.updates)
        rows: Any = (data, buffer.rows) if isinstance(stage.sampler, Mixed) else buffer.rows

        def update(state, key):
            k_sample, k_update = jr.split(key)
            return agent.update(state, stage.sampler(rows, k_sample, stage.batch_size), k_update)

        state, info = jax.lax.scan(update, state, keys)
        metrics |= jax.tree.map(jnp.mean, info)
    steps = learner.steps + jnp.sum(after.valid * after.steps, dtype=jnp.int32)
    return Learner(state, buffer, jnp.where(done, 0.0, returns), steps, learner.iteration + 1), metrics


@dataclass(frozen=True)
class Replay:
    """Steps of an environment, kept and learned from many times."""

    env: str = "envpool:CartpoleSwingup-v1"
    """Environment; `contraflow list envs` shows them."""
    num_envs: int = 1
    """Number of parallel environments."""
    collect: int | None = None
    """Steps before learning starts; None is a twentieth of all, at most 5000."""
    updates: int = 1
    """Gradient steps per step of all environments; updates / num_envs is the update-to-data ratio."""
    batch_size: int = 256
    """Batch size of a gradient step."""
    n_step: int = 1
    """Rewards summed before bootstrapping: y = sum_{k<n} gamma^k r_k + gamma^n V(s_n), without correction for the
    actions in between being those of older policies."""
    buffer_size: int = 250_000
    """Decisions kept."""
    horizon: int = 1
    """Chunk length: actions per decision; that of the pretrained policy if one is given."""
    execute: int = 1
    """Actions of a chunk that are executed before the next decision."""
    warm_up: Literal["random", "policy"] = "random"
    """Actions of the `collect` steps: random ones, or those of the policy."""
    base: str | None = None
    """Frozen policy whose start noise is learned in place of actions: a folder, or ws://host:port of a served one."""
    noise_bound: float = 1.5
    """That noise lies in [-noise_bound, noise_bound]."""
    noise_repeat: bool = False
    """One noise for all actions of a chunk of `base`."""
    random_shift: int = 0
    """Most pixels by which every image of a batch is moved at random along each axis; DrQ has 4, 0 is none."""

    def check(self, agent: Any, steps: int) -> None:
        """Raise ValueError for settings that do not go together."""
        check_counts(self, "num_envs", "batch_size", "n_step", "buffer_size")
        check_chunk(self)
        if self.noise_bound <= 0:
            raise ValueError(f"--noise-bound must be positive, got {self.noise_bound}")
        check_counts(self, "updates", "random_shift", least=0)
        if self.collect is not None and not 0 < self.collect < steps:
            raise ValueError(f"--collect must lie between 0 and --steps {steps}, got {self.collect}")
        if self.buffer_size < self.num_envs:
            raise ValueError(f"--buffer-size {self.buffer_size} is smaller than --num-envs {self.num_envs}")
        if (self.n_step > 1 or self.execute > 1) and discount(agent) is None:
            flag = f"--n-step {self.n_step}" if self.n_step > 1 else f"--execute {self.execute}"
            raise ValueError(f"{flag} needs an agent with a discount `gamma`; use 1")

    def resolved(self, steps: int) -> "Replay":
        """With numbers in place of what depends on the budget."""
        return replace(self, collect=max(1, min(5_000, steps // 20))) if self.collect is None else self

    def open(self, run: Any, trust: Trust) -> Opened:
        """Its environments, with nothing run in them yet."""
        env, evaluation = environments(self, run, trust, gamma_of(run.agent))
        with closed_on_error(env, evaluation):
            check_images(self, env.spec)
            base = frozen.load(self, trust)
            if base is None:
                return Opened(World(env.spec, env), evaluation)
            env, evaluation = (frozen.over_noise(one, base, self) for one in (env, evaluation))
            return Opened(World(env.spec, env), evaluation, base=base.revision)

    def learner(self, agent: Any, opened: Opened, key: PRNGKey) -> Learner:
        """A fresh one."""
        return first_learner(agent, opened.world.spec, key, self.buffer_size)

    @property
    def each(self) -> int:
        """Steps of one iteration."""
        return self.num_envs * self.execute

    def total(self, steps: int) -> int:
        """Steps that a run of `steps` takes: whole iterations."""
        return -(-steps // self.each) * self.each

    def stage(self, agent: Any, taken: int, until: int) -> tuple[Interact, int]:
        """The stage at step `taken`, and its iterations until step `until` at the most."""
        assert self.collect is not None
        warm_up = taken < self.collect
        until = min(self.collect, until) if warm_up else until
        random = warm_up and self.warm_up == "random"
        stage = Interact(random, 0 if warm_up else self.updates, self.batch_size, self.sampler(agent))
        return stage, iterations(taken, until, self.each)

    def sampler(self, agent: Any) -> Uniform | NStep | Shifted:
        """Rows are decisions; one of several steps is discounted by those that were taken (`Rows.steps`)."""
        gamma = gamma_of(agent)
        return augmented(Uniform(gamma) if self.n_step == 1 else NStep(self.n_step, gamma), self.random_shift)

    def typical_obs(self, carry: Carry, world: World, key: PRNGKey) -> Any:
        """Observations [B, ...] of late, to look at the agent with; `carry` is of one seed."""
        rows = carry.learner.buffer.rows
        at = rows.draw(key, self.batch_size)
        return jax.tree.map(lambda x: x[at], rows.obs)
