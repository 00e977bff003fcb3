"""Reward alignment: samples for conditions, their rewards, an update; no environment but for evaluations.

With `data` the samples are actions, the conditions observations, and evaluations play the environment.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from contraflow.agents.align.base import Pairs, Scored
from contraflow.core.trust import Trust
from contraflow.core.types import EnvSpec, Metrics, PRNGKey, UserError
from contraflow.data.datasets.readers import load
from contraflow.envs import align, copies, make
from contraflow.envs.align.control import Control
from contraflow.training.loop import Carry, Learner, World
from contraflow.training.sources import critic
from contraflow.training.sources.base import (
    Opened,
    check_chunk,
    check_counts,
    closed_on_error,
    environment,
    first_learner,
    iterations,
)


@dataclass(frozen=True)
class Align:
    """`prompts` conditions with a group of samples each, then `agent.update` on them and their rewards."""

    prompts: int
    group: int

    name = "learning"
    learns = True

    def compiled(self, world: World) -> bool:
        return not world.env.outside

    def iterate(self, agent: Any, world: World, carry: Carry, key: PRNGKey) -> tuple[Carry, Metrics]:
        """Draw samples, reward them, learn from them; the first and the last are compiled."""
        cond, draws, x = draw(self, agent, world, carry.learner, key)
        if self.compiled(world):
            reward = jax.vmap(lambda c, x: jax.vmap(lambda x: world.env.each(x, c))(x))(cond, x)
        else:
            flat = np.asarray(x).reshape(-1, x.shape[-1])
            reward = world.env.each_of(flat, np.repeat(cond, self.group, 0)).reshape(*x.shape[:2], -1)
        learner, metrics = learn(self, agent, world, carry.learner, cond, draws, reward, key)
        return Carry(learner, carry.env, carry.obs), metrics


@partial(jax.jit, static_argnames=("stage", "agent"))
def draw(stage: Align, agent: Any, world: World, learner: Learner, key: PRNGKey) -> tuple[Any, Any, Any]:
    """Returns conditions [B, c], draws of the agent, and its samples [B, G, d]."""
    k_cond, k_draw, _, _ = keys(key, learner)
    cond = world.env.conditions(k_cond, stage.prompts)
    draws = agent.explore(learner.agent, cond, stage.group, k_draw)
    return cond, draws, agent.flow.support.action(draws.end)


@partial(jax.jit, static_argnames=("stage", "agent"))
def learn(
    stage: Align, agent: Any, world: World, learner: Learner, cond: Any, draws: Any, reward: Any, key: PRNGKey
) -> tuple[Learner, Metrics]:
    """Update from samples and their rewards [B, G, m]."""
    env, data = world.env, None
    _, _, k_data, k_update = keys(key, learner)
    if world.data is not None:
        rows = jr.randint(k_data, (stage.prompts * stage.group,), 0, world.data.x.shape[0])
        data = Pairs(world.data.cond[rows], world.data.x[rows])
    scored = Scored(cond, draws, reward, data, env.weights, None if env.outside else env.score)
    state, metrics = agent.update(learner.agent, scored, k_update)
    count = jnp.asarray(stage.prompts * stage.group, jnp.int32)
    metrics |= {"episodes": count, "episode_return_sum": jnp.sum(scored.total)}
    metrics |= {f"reward_{j}": jnp.mean(reward[..., j]) for j in range(reward.shape[-1]) if reward.shape[-1] > 1}
    return Learner(state, None, learner.returns, learner.steps + count, learner.iteration + 1), metrics


def keys(key: PRNGKey, learner: Learner) -> Any:
    """Returns the keys of an iteration: conditions, draws, data, update."""
    return jr.split(jr.fold_in(key, learner.iteration), 4)


@dataclass(frozen=True)
class Conditions:
    """Samples of the flow itself, scored by rewards. Step counts are rewards: `prompts` x `group` in an iteration."""

    env: str = "align:mixture2d"
    """The problem, with its default reward (`align:digits`) or another (`align:digits/ink`); with `data` the
    environment that the actions are for."""
    reward: tuple[str, ...] = ()
    """Rewards by name, as module:function (with --trust), onnx:FILE or, with `data`, critic:DIR; empty is that of
    `env`."""
    weights: tuple[float, ...] = ()
    """Weights of the rewards; empty is 1 for each."""
    prompts: int = 8
    """Conditions of an iteration."""
    group: int = 16
    """Samples for each condition."""
    data: str = ""
    """Recorded steps, whose observations are the conditions: a folder, a file, or the id of a Minari dataset."""
    horizon: int = 1
    """Actions of a sample, as in the pretrained policy."""
    execute: int = 1
    """How many of them are carried out before the next decision."""

    def check(self, agent: Any, steps: int) -> None:
        """Raise ValueError for settings that do not go together."""
        check_counts(self, "prompts", "group")
        check_chunk(self)
        if self.weights and len(self.weights) != max(1, len(self.reward)):
            raise ValueError(f"--weights needs a number for each reward, got {len(self.weights)} for {self.reward}")
        if self.group % (leaves := getattr(agent, "leaves", 1)):
            raise ValueError(f"--group must be a multiple of {leaves}, the samples that share a start: {self.group}")

    def resolved(self, steps: int) -> "Conditions":
        """With paths that hold in any working folder."""

        def whole(name: str) -> str:
            prefix = next((prefix for prefix in (align.ONNX, critic.PREFIX) if name.startswith(prefix)), None)
            return name if prefix is None else prefix + str(Path(name.removeprefix(prefix)).resolve())

        return replace(self, reward=tuple(map(whole, self.reward)))

    def control(self, obs: Any, spec: EnvSpec, trust: Trust) -> Any:
        """Actions as in `spec` under recorded observations, with their rewards."""
        if not (isinstance(obs, np.ndarray) and obs.shape[1:] == (spec.obs_dim,)):
            raise UserError(
                f"{self.data} does not hold the {spec.obs_dim} observations of {self.env}: give its own data"
            )
        if not self.reward:
            raise UserError("actions need a reward: give --reward critic:DIR, or module:function of your own")
        problem = Control(jnp.asarray(obs), spec.action_dim)

        def reward(name: str) -> Any:
            if name.startswith(critic.PREFIX):
                return critic.load(name, problem.obs, spec.action_dim, trust)
            return align.rewards(problem, (name,), trust)[0]

        return align.Generation(problem, tuple(map(reward, self.reward)), self.weights or (1.0,) * len(self.reward))

    def generation(self, seed: int, trust: Trust) -> Any:
        """The problem with its rewards."""
        if any(name.startswith(critic.PREFIX) for name in self.reward):
            raise UserError("critic:DIR rewards actions under recorded observations: give --data and --env")
        env: Any = make(self.env, 1, seed, trust=trust)
        if not isinstance(env, align.Generation):
            raise UserError(f"{self.env} is not a problem of alignment: give --env align:NAME (`contraflow list envs`)")
        found = align.rewards(env.problem, self.reward, trust) if self.reward else env.rewards
        return replace(env, rewards=found, weights=self.weights or (1.0,) * len(found))

    def open(self, run: Any, trust: Trust) -> Opened:
        """The problem with its rewards, to train on, and what evaluates: the same, or the environment of actions."""
        if self.data:
            if self.env.startswith(align.PREFIX):
                raise UserError(f"--data holds observations to act on, and {self.env} has none: give --env")
            data = load(self.data, clip=True)  # its actions are not used
            evaluation = environment(self, copies(self.env, run.eval_episodes, trust), run.seed + 10_000, trust)
            with closed_on_error(evaluation):
                spec = replace(evaluation.spec, num_envs=1)
                env = self.control(data.obs, spec, trust)
                _try(env)
                return Opened(World(spec, env), evaluation, data)
        env = self.generation(run.seed, trust)
        _try(env)
        with closed_on_error(env):
            data = env.problem.data()
        pairs = None if data is None else Pairs(jnp.asarray(data[0]), jnp.asarray(data[1]))
        return Opened(World(env.spec, env, pairs), replace(env, num_envs=run.eval_episodes))

    def learner(self, agent: Any, opened: Opened, key: PRNGKey) -> Learner:
        """A fresh one."""
        return first_learner(agent, opened.world.spec, key)

    @property
    def each(self) -> int:
        """Steps of one iteration."""
        return self.prompts * self.group

    def total(self, steps: int) -> int:
        """Steps that a run of `steps` takes: whole iterations."""
        return -(-steps // self.each) * self.each

    def stage(self, agent: Any, taken: int, until: int) -> tuple[Align, int]:
        """The stage at step `taken`, and its iterations until step `until`."""
        return Align(self.prompts, self.group), iterations(taken, until, self.each)

    def typical_obs(self, carry: Carry, world: World, key: PRNGKey) -> Any:
        """Conditions, to look at the policy with."""
        return world.env.conditions(key, 64)


def _try(env: align.Generation) -> None:
    """Asks rewards outside of JAX once: what fails at all fails here, and not after the first samples."""
    if env.outside:
        with closed_on_error(env):
            env.each_of(np.zeros((2, env.spec.action_dim), np.float32), env.conditions(jr.key(0), 2))
