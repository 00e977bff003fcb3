"""Offline, then online: gradient steps on recorded data, then steps of an environment beside the data."""

from dataclasses import dataclass, replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from contraflow.core.trust import Trust
from contraflow.core.types import PRNGKey, UserError
from contraflow.data.replay import Buffer
from contraflow.data.rows import Rows
from contraflow.data.samplers import Mixed, Sampler
from contraflow.envs.reward import DENSE
from contraflow.training.loop import Carry, Learner, Stage, World
from contraflow.training.sources import dataset
from contraflow.training.sources.base import (
    Opened,
    check_images,
    closed_on_error,
    environments,
    first_learner,
    gamma_of,
    need,
)
from contraflow.training.sources.dataset import Dataset
from contraflow.training.sources.replay import Interact, Replay


@dataclass(frozen=True)
class OfflineToOnline:
    """`offline_steps` gradient steps on the data, the rest of the run's steps in the environment. Chunks are carried
    out whole."""

    data: str = ""
    """A folder, a file, or the id of a Minari dataset (docs/how-to/data.md)."""
    env: str = ""
    """Environment to go on in; empty is the one that the data name."""
    offline_steps: int | None = None
    """Gradient steps on the data before the first step in the environment; None is half of all."""
    mix: float | None = 0.5
    """Share of the data in each batch afterwards; None puts the data into the replay, as its first rows."""
    num_envs: int = 1
    """Environments stepped in parallel."""
    updates: int = 1
    """Gradient steps after each step of all environments."""
    batch_size: int = 256
    """Rows of one gradient step."""
    n_step: int = 1
    """Rewards of online rows summed before the value is asked."""
    buffer_size: int = 250_000
    """Decisions kept."""
    horizon: int = 1
    """Actions per decision; those of the pretrained policy where one is given."""
    task: str | None = None
    """For a file of OGBench: the single-task id that rewards it; that of an `ogbench:` environment unless given."""
    low: tuple[float, ...] = ()
    """Lower bounds of the recorded actions, one for all or one for each, in place of those that the data state."""
    high: tuple[float, ...] = ()
    """Upper bounds of the recorded actions."""
    clip: bool = False
    """Clip actions of the data that lie outside their range, in place of refusing them."""
    reward: str = DENSE
    """What is learned from: dense, the rewards as they are; sparse, for tasks of OGBench 0 where all is done and -1
    elsewhere; or module:function, from a dict of rows to rewards (with --trust), of the data and of the environment."""
    reward_shift: float = 0.0
    """Added to every reward, in the data and in the environment; returns are reported without it."""
    random_shift: int = 0
    """Most pixels by which every image of a batch is moved at random along each axis; DrQ has 4, 0 is none."""

    @property
    def execute(self) -> int:
        return self.horizon

    @property
    def offline(self) -> Dataset:
        """The first part."""
        sizes, reading = (self.batch_size, self.horizon, self.horizon), (self.task, self.low, self.high, self.clip)
        return Dataset(self.data, self.env, *sizes, *reading, self.reward, self.reward_shift, self.random_shift)

    @property
    def online(self) -> Replay:
        """The second; it begins with the policy, not with random actions."""
        sizes = self.num_envs, 1, self.updates, self.batch_size, self.n_step, self.buffer_size
        return Replay(self.env, *sizes, self.horizon, self.horizon, random_shift=self.random_shift)

    def check(self, agent: Any, steps: int) -> None:
        """Raise ValueError for settings that do not go together."""
        self.offline.check(agent, steps)
        replace(self.online, collect=None).check(agent, steps)
        if self.offline_steps is not None and not 0 < self.offline_steps < steps:
            raise ValueError(f"--offline-steps must lie between 0 and --steps {steps}, got {self.offline_steps}")
        if self.mix is not None and not 0 <= self.mix <= 1:
            raise ValueError(f"--mix is the share of the data, in [0, 1], got {self.mix}")

    def resolved(self, steps: int) -> "OfflineToOnline":
        """With a number in place of what depends on the budget."""
        return self if self.offline_steps else replace(self, offline_steps=max(1, steps // 2))

    def open(self, run: Any, trust: Trust) -> Opened:
        """Both parts. Raises UserError where the data do not fit the environment."""
        data = dataset.read(self, trust)
        need(self.env, "--env, where the data name none", "the environment to go on in")
        env, evaluation = environments(self, run, trust, gamma_of(run.agent))
        with closed_on_error(env, evaluation):
            check_images(self, env.spec)
            data = data.check(env.spec, self.env, clip=self.clip)
            if self.mix is None and (len(data) > self.buffer_size or self.horizon > 1):
                raise UserError(
                    f"the {len(data)} steps of the data do not fit the replay: raise --buffer-size to more"
                    if self.horizon == 1
                    else "chunks of the data cannot be put into the replay: give --mix"
                )
            if self.mix is None and data.human is not None:
                raise UserError("the replay does not keep which actions a person took: give --mix")
            return Opened(World(env.spec, env, dataset.rows_of(data, run.agent)), evaluation, data)

    def learner(self, agent: Any, opened: Opened, key: PRNGKey) -> Learner:
        """A fresh one, that knows the moments of the observations; with `mix` None the replay holds the data."""
        learner = dataset.knowing(first_learner(agent, opened.world.spec, key, self.buffer_size), opened.data)
        if self.mix is not None:
            return learner
        return eqx.tree_at(lambda x: x.buffer, learner, filled(learner.buffer, opened.world.data))

    def total(self, steps: int) -> int:
        """Steps that a run of `steps` takes: whole iterations."""
        first = self.resolved(steps).offline_steps or 0
        return first + self.online.total(steps - first)

    def stage(self, agent: Any, taken: int, until: int) -> tuple[Stage, int]:
        """The stage at step `taken`, and its iterations until step `until` at the most."""
        assert self.offline_steps is not None
        if taken < self.offline_steps:
            return self.offline.stage(agent, taken, min(until, self.offline_steps))
        _, n = self.online.stage(agent, taken, until)
        return Interact(False, self.updates, self.batch_size, self._sampler(agent)), n

    def _sampler(self, agent: Any) -> Sampler:
        online = self.online.sampler(agent)
        return online if self.mix is None else Mixed(dataset.sampler(self, agent), online, self.mix)

    def typical_obs(self, carry: Carry, world: World, key: PRNGKey) -> Any:
        """Observations of the data."""
        return self.offline.typical_obs(carry, world, key)


@jax.jit
def filled(buffer: Buffer, rows: Rows) -> Buffer:
    """An empty replay with recorded rows in it."""
    n = rows.reward.shape[0]
    arrays = jax.tree.map(
        lambda b, r: b.at[:n].set(r),
        (
            buffer.rows.obs,
            buffer.rows.action,
            buffer.rows.reward,
            buffer.rows.next_obs,
            buffer.rows.terminated,
            buffer.rows.next,
        ),
        (rows.obs, rows.action, rows.reward, rows.next_obs, rows.terminated, rows.next),
    )
    size = jnp.asarray(n, jnp.int32)
    obs, action, reward, next_obs, terminated, links = arrays
    rows = Rows(obs, action, reward, next_obs, terminated, links, size)
    return Buffer(rows, buffer.last, size % buffer.rows.reward.shape[0])
