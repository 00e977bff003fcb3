"""On-policy: a rollout of all environments under one policy, then one update from it."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from contraflow.core.trust import Trust
from contraflow.core.types import Metrics, PRNGKey, Rollout, Step
from contraflow.training.loop import Carry, Learner, World, shown, step
from contraflow.training.sources.base import Opened, check_chunk, check_counts, environments, first_learner, iterations


@dataclass(frozen=True)
class Unroll:
    """`unroll` steps of all environments, then `agent.update` on the rollout [unroll, N]."""

    unroll: int

    name = "learning"
    learns = True

    def compiled(self, world: World) -> bool:
        return world.env.spec.jittable

    def iterate(self, agent: Any, world: World, carry: Carry, key: PRNGKey) -> tuple[Carry, Metrics]:
        """Act and step `unroll` times, then learn."""
        learner, env = carry.learner, world.env
        policy = agent.policy(learner.agent)

        def advance(env_state, obs, i):
            action, extras = decide(policy, obs, learner.iteration, i, key)
            env_state, after = step(env, env_state, action)
            after = replace(after, steps=after.steps * after.valid)
            return env_state, after, (obs, extras, after)

        if env.spec.jittable:

            def body(c, i):
                env_state, obs = c
                env_state, after, row = advance(env_state, obs, i)
                return (env_state, after.obs), row

            (env_state, obs), rows = jax.lax.scan(body, (carry.env, carry.obs), jnp.arange(self.unroll))
        else:
            env_state, obs, history = carry.env, carry.obs, []
            for i in range(self.unroll):
                env_state, after, row = advance(env_state, obs, i)
                obs = after.obs
                history.append(row)
            rows = jax.tree.map(lambda *x: np.stack(x), *jax.device_get(history))
        obs_rows, extras, steps = rows
        learner, metrics = learn(agent, learner, obs_rows, extras, steps, key)
        return Carry(learner, env_state, obs), metrics


@jax.jit
def decide(policy: Any, obs: Any, iteration: Any, i: Any, key: PRNGKey) -> tuple[Any, Any]:
    """Actions [N, a] for observations [N, ...] at step i of a rollout, and what its update must know of them."""
    key = jr.fold_in(jr.fold_in(jr.fold_in(key, iteration), 0), i)
    return jax.vmap(policy.sample)(obs, jr.split(key, jax.tree.leaves(obs)[0].shape[0]))


@partial(jax.jit, static_argnames=("agent",), donate_argnames=("learner",))
def learn(agent: Any, learner: Learner, obs: Any, extras: Any, after: Step, key: PRNGKey) -> tuple[Learner, Metrics]:
    """Update from a rollout; every leaf of `obs`, `extras` and `after` is [T, N, ...]."""
    rollout = Rollout(obs, extras, after.reward, after.next_obs, after.terminated, after.truncated, after.valid)
    done = (after.terminated | after.truncated) & after.valid

    def tally(returns, row):
        reward, done = row
        returns = returns + reward
        return jnp.where(done, 0.0, returns), jnp.sum(jnp.where(done, returns, 0.0))

    returns, ended = jax.lax.scan(tally, learner.returns, (shown(after), done))
    state, info = agent.update(learner.agent, rollout, jr.fold_in(jr.fold_in(key, learner.iteration), 1))
    metrics = {"episodes": jnp.sum(done), "episode_return_sum": jnp.sum(ended)} | info
    steps = learner.steps + jnp.sum(after.steps, dtype=jnp.int32)
    return Learner(state, None, returns, steps, learner.iteration + 1), metrics


@dataclass(frozen=True)
class Rollouts:
    """Steps of environments under the newest policy, learned from once."""

    env: str = "envpool:CartpoleSwingup-v1"
    """Environment; `contraflow list envs` shows them."""
    num_envs: int = 8
    """Number of parallel environments."""
    unroll: int = 128
    """Decisions of each environment between two updates."""
    horizon: int = 1
    """Chunk length: actions per decision; that of the pretrained policy if one is given."""
    execute: int = 1
    """Actions of a chunk that are executed before the next decision."""

    def check(self, agent: Any, steps: int) -> None:
        """Raise ValueError for settings that do not go together."""
        check_counts(self, "num_envs", "unroll")
        check_chunk(self)
        rows = self.unroll * self.num_envs
        path, owner = ("--agent.ppo", agent.ppo) if hasattr(agent, "ppo") else ("--agent", agent)
        parts = getattr(owner, "minibatches", 1)
        if parts > rows:
            raise ValueError(
                f"a rollout has {rows} rows (--unroll {self.unroll} x --num-envs {self.num_envs}), too few for "
                f"{path}.minibatches {parts}"
            )

    def resolved(self, steps: int) -> "Rollouts":
        return self

    def open(self, run: Any, trust: Trust) -> Opened:
        """Its environments, with nothing run in them yet."""
        env, evaluation = environments(self, run, trust)
        return Opened(World(env.spec, env), evaluation)

    def learner(self, agent: Any, opened: Opened, key: PRNGKey) -> Learner:
        """A fresh one."""
        return first_learner(agent, opened.world.spec, key)

    @property
    def each(self) -> int:
        """Steps of one iteration."""
        return self.unroll * self.num_envs * self.execute

    def total(self, steps: int) -> int:
        """Steps that a run of `steps` takes: whole rollouts."""
        return -(-steps // self.each) * self.each

    def stage(self, agent: Any, taken: int, until: int) -> tuple[Unroll, int]:
        """The stage at step `taken`, and its iterations until step `until`."""
        return Unroll(self.unroll), iterations(taken, until, self.each)

    def typical_obs(self, carry: Carry, world: World, key: PRNGKey) -> Any:
        """Observations [N, ...] of late, to look at the agent with; `carry` is of one seed."""
        return carry.obs
