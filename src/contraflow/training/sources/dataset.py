"""Offline: gradient steps on recorded data, as single steps or chunks of actions; imitation too."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from contraflow.core.ogbench import PREFIX, single_task
from contraflow.core.trust import Trust
from contraflow.core.types import Metrics, PRNGKey
from contraflow.data.augment import Shifted, augmented
from contraflow.data.datasets import dataset as datasets
from contraflow.data.datasets.readers import load, needs_task
from contraflow.data.rows import Rows
from contraflow.data.samplers import Chunk
from contraflow.envs import copies
from contraflow.envs.reward import DENSE, rewards, rule
from contraflow.envs.reward import check as check_reward
from contraflow.policy.normalise import RunningMoments
from contraflow.training.loop import Carry, Learner, World
from contraflow.training.sources.base import (
    Opened,
    check_chunk,
    check_counts,
    check_images,
    closed_on_error,
    discount,
    environment,
    first_learner,
    gamma_of,
    need,
    relabelling,
)

GLANCE = 64  # observations to look at a policy with


@dataclass(frozen=True)
class Regress:
    """One gradient step on `batch_size` rows of the data, which counts as one step."""

    batch_size: int
    sampler: Chunk | Shifted

    name = "learning"
    learns = True

    def compiled(self, world: World) -> bool:
        return True

    def iterate(self, agent: Any, world: World, carry: Carry, key: PRNGKey) -> tuple[Carry, Metrics]:
        learner, metrics = learn(self, agent, world.data, carry.learner, key)
        return Carry(learner, carry.env, carry.obs), metrics


@partial(jax.jit, static_argnames=("stage", "agent"))
def learn(stage: Regress, agent: Any, rows: Rows, learner: Learner, key: PRNGKey) -> tuple[Learner, Metrics]:
    """The gradient step of one iteration."""
    k_sample, k_update = jr.split(jr.fold_in(key, learner.steps))
    batch = stage.sampler(rows, k_sample, stage.batch_size)
    state, metrics = agent.update(learner.agent, batch, k_update)
    return Learner(state, learner.buffer, learner.returns, learner.steps + 1, learner.iteration + 1), metrics


@dataclass(frozen=True)
class Dataset:
    """Recorded steps; no environment is needed but for evaluations. Step counts are gradient steps."""

    data: str = ""
    """A folder, a file, or the id of a Minari dataset (docs/how-to/data.md)."""
    env: str = ""
    """Environment of the evaluations; empty is the one that the data name, or none."""
    batch_size: int = 256
    """Rows of one gradient step."""
    horizon: int = 1
    """Actions per chunk."""
    execute: int = 1
    """How many of them are carried out before the next decision."""
    task: str | None = None
    """For a file of OGBench: the single-task id that rewards it; that of an `ogbench:` environment unless given."""
    low: tuple[float, ...] = ()
    """Lower bounds of the recorded actions, one for all or one for each, in place of those that the data state."""
    high: tuple[float, ...] = ()
    """Upper bounds of the recorded actions."""
    clip: bool = False
    """Clip actions that lie outside their range, in place of refusing them."""
    reward: str = DENSE
    """What is learned from: dense, the rewards as they are; sparse, for tasks of OGBench 0 where all is done and -1
    elsewhere; or module:function, from a dict of rows to rewards (with --trust)."""
    reward_shift: float = 0.0
    """Added to every reward; returns are reported without it."""
    random_shift: int = 0
    """Most pixels by which every image of a batch is moved at random along each axis; DrQ has 4, 0 is none."""

    def check(self, agent: Any, steps: int) -> None:
        """Raise ValueError for settings that do not go together."""
        check_counts(self, "batch_size")
        check_counts(self, "random_shift", least=0)
        check_chunk(self)
        check_reward(self.reward)

    def resolved(self, steps: int) -> "Dataset":
        return self

    def open(self, run: Any, trust: Trust) -> Opened:
        """The rows on the device, and the environment of evaluations if one is known."""
        data = read(self, trust)
        evaluation = None
        if self.env:
            evaluation = environment(self, copies(self.env, run.eval_episodes, trust), run.seed + 10_000, trust)
        with closed_on_error(evaluation):
            if evaluation is not None:
                data = data.check(evaluation.spec, self.env, clip=self.clip)
            spec = data.spec(self.horizon, self.execute)
            check_images(self, spec)
            world = World(spec, None, rows_of(data, run.agent))
        return Opened(world, evaluation, data)

    def learner(self, agent: Any, opened: Opened, key: PRNGKey) -> Learner:
        """A fresh one, that knows the moments of the observations."""
        return knowing(first_learner(agent, opened.world.spec, key), opened.data)

    def total(self, steps: int) -> int:
        return steps

    def stage(self, agent: Any, taken: int, until: int) -> tuple[Regress, int]:
        """The stage at step `taken`, and its iterations until step `until`."""
        return Regress(self.batch_size, sampler(self, agent)), until - taken

    def typical_obs(self, carry: Carry, world: World, key: PRNGKey) -> Any:
        """Observations of the data."""
        at = world.data.draw(key, GLANCE)
        return jax.tree.map(lambda x: x[at], world.data.obs)


def sampler(source: Any, agent: Any) -> Chunk | Shifted:
    """Rows of `source.horizon` actions, discounted as the agent does."""
    return augmented(Chunk(source.horizon, gamma_of(agent)), source.random_shift)


def read(source: Any, trust: Trust) -> datasets.Dataset:
    """The dataset of a source, with the rewards that are learned from. Raises UserError if there is none, or no
    trajectory of it has `horizon` steps."""
    need(source.data, "--data (`contraflow record` writes one)", "a dataset")
    data = recorded(source)
    data.spec(source.horizon)
    name, shift = relabelling(source)
    if name == DENSE and not shift:
        return data
    rows = {key: getattr(data, key) for key in ("obs", "action", "next_obs", "reward", "terminated")}
    rows |= {"success": data.terminated} if (data.env or "").startswith(PREFIX) else {}
    reward = rewards(rule(name, trust), rows, shift, name)
    note = f"rewards are {name}{f', plus {shift:g}' if shift else ''}: {reward.min():g} to {reward.max():g}"
    return replace(data, reward=reward, notes=(*data.notes, note))


def recorded(source: Any) -> datasets.Dataset:
    """The dataset with what the source says of it, and rewarded by the task of its environment."""
    task = source.task or (single_task(source.env) if needs_task(source.data) else None)
    return load(source.data, task=task, low=source.low, high=source.high, clip=source.clip)


def rows_of(data: datasets.Dataset, agent: Any) -> Rows:
    """On the device. An agent without a discount reads no successors, so it keeps the steps whose successor is not
    recorded."""
    return Rows.of(data, successor=discount(agent) is not None)


def knowing(learner: Learner, data: datasets.Dataset | None) -> Learner:
    """The learner with the moments of the recorded observations, where its agent normalises."""
    if data is None or not isinstance(getattr(learner.agent, "stats", None), RunningMoments):
        return learner
    mean, std = map(jnp.asarray, data.moments())
    return eqx.tree_at(lambda x: x.agent.stats, learner, RunningMoments(mean, std**2, jnp.asarray(float(len(data)))))
