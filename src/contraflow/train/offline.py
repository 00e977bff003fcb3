"""Training on demonstrations: gradient steps on chunks of a dataset; the settings of such a run."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.agents.base import Agent
from contraflow.agents.offline.bc import BC
from contraflow.core.types import EnvSpec, Metrics, PRNGKey, UserError
from contraflow.data.datasets.dataset import Dataset
from contraflow.data.datasets.readers import load
from contraflow.data.rows import Rows
from contraflow.data.samplers import Chunk
from contraflow.envs import make
from contraflow.envs.base import Env
from contraflow.envs.chunk import chunked
from contraflow.policy.normalise import RunningMoments
from contraflow.train.log import TrackerName
from contraflow.train.loop import Carry, Learner, check_counts, next_due
from contraflow.train.onpolicy import first_learner
from contraflow.train.pretrained import settle

TOGETHER = 50  # gradient steps in one compiled program


class Recorded(eqx.Module):
    """A dataset on the device; it stands where other loops have an environment."""

    rows: Rows
    mean: Float[Array, " o"]
    std: Float[Array, " o"]
    spec: EnvSpec = eqx.field(static=True)

    @classmethod
    def of(cls, data: Dataset, horizon: int, execute: int) -> "Recorded":
        mean, std = map(jnp.asarray, data.moments())
        return cls(Rows.of(data, successor=False), mean, std, data.spec(horizon, execute))

    def reset(self, key: PRNGKey) -> tuple[None, Float[Array, "64 o"]]:
        """No state; observations to look at a policy with."""
        return None, self.rows.obs[self.rows.draw(key, 64)]


@dataclass(frozen=True)
class Offline:
    """`updates` gradient steps on `batch_size` chunks each."""

    updates: int
    batch_size: int

    @property
    def learns(self) -> bool:
        return True

    def iterate(self, agent: Any, env: Recorded, carry: Carry, key: PRNGKey) -> tuple[Carry, Metrics]:
        learner, metrics = learn(self, agent, env, carry.learner, key)
        return Carry(learner, None, carry.obs), metrics


@partial(jax.jit, static_argnames=("phase", "agent"), donate_argnames=("learner",))
def learn(phase: Offline, agent: Any, rows: Recorded, learner: Learner, key: PRNGKey) -> tuple[Learner, Metrics]:
    """The gradient steps of one iteration; a step counts as one."""

    def update(state, i):
        k_sample, k_update = jr.split(jr.fold_in(key, i))
        return agent.update(state, Chunk(rows.spec.horizon, 1.0)(rows.rows, k_sample, phase.batch_size), k_update)

    state, info = jax.lax.scan(update, learner.agent, learner.steps + jnp.arange(phase.updates))
    metrics = {"episodes": jnp.zeros(()), "episode_return_sum": jnp.zeros(())} | jax.tree.map(jnp.mean, info)
    return Learner(state, None, learner.returns, learner.steps + phase.updates, learner.iteration + 1), metrics


@dataclass(frozen=True)
class OfflineRun:
    """One agent on one dataset with one seed. Step counts are gradient steps."""

    data: str = ""
    """Dataset: a folder, a file, or the id of a Minari dataset (docs/data.md)."""
    env: str = ""
    """Environment of the evaluations; empty is the one that the data names, or none."""
    agent: Agent = field(default_factory=BC)
    pretrained: str | None = None
    """Folder of a run or policy whose network to start from; None starts from scratch."""
    steps: int = 20_000
    batch_size: int = 256
    horizon: int = 1
    """Actions per chunk."""
    execute: int = 1
    """How many of them are carried out before the next decision."""
    eval_every: int = 5_000
    eval_episodes: int = 10
    log_every: int = 500
    seed: int = 0
    trackers: tuple[TrackerName, ...] = ("tensorboard",)

    def __post_init__(self):
        check_counts(self, "steps", "batch_size", "eval_every", "eval_episodes", "log_every")
        if not 1 <= self.execute <= self.horizon:
            raise ValueError(f"a chunk needs 1 <= execute <= horizon, got {self.execute} and {self.horizon}")

    def resolve(self, trust: bool) -> "OfflineRun":
        """The run with what comes from the data and the pretrained policy."""
        run = settle(self, trust)
        return run if run.env or not run.data else replace(run, env=load(run.data).env or "")

    def environments(self, trust: bool) -> tuple[Recorded, Env | None]:
        """The data, and the environment of evaluations if there is one. Raises UserError if they do not fit."""
        if not self.data:
            raise UserError("a dataset is missing: give --data (`contraflow record` writes one)")
        data = load(self.data)
        env = None
        if self.env:
            data.spec(self.horizon)  # a horizon that no trajectory has is refused before the environment is made
            env = make(self.env, self.eval_episodes, self.seed + 10_000, trust=trust)
            env = chunked(env, self.horizon, self.execute)
            data = data.check(env.spec, self.env)
        return Recorded.of(data, self.horizon, self.execute), env

    def learner(self, env: Recorded, key: PRNGKey) -> Learner:
        """A fresh one, that knows the moments of the observations."""
        learner = first_learner(self.agent, env.spec, key)
        stats = RunningMoments(env.mean, env.std**2, jnp.asarray(float(env.rows.reward.shape[0])))
        return eqx.tree_at(lambda x: x.agent.stats, learner, stats)

    def next_phase(self, taken: int) -> tuple[Offline, int]:
        """The phase at step `taken`, and its iterations until something is due."""
        left = min(self.steps, next_due(self, taken)) - taken
        return (
            (Offline(TOGETHER, self.batch_size), left // TOGETHER)
            if left >= TOGETHER
            else (
                Offline(left, self.batch_size),
                1,
            )
        )

    def typical_obs(self, carry: Carry, key: PRNGKey) -> Any:
        """Observations of the data."""
        return carry.obs
