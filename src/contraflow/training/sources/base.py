"""What all sources share."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp

from contraflow.core.trust import Trust
from contraflow.core.types import EnvSpec, PRNGKey, UserError
from contraflow.data.datasets.dataset import Dataset
from contraflow.data.replay import Buffer
from contraflow.envs import close, copies, make, notes, reward
from contraflow.envs.base import Env
from contraflow.envs.chunk import chunked
from contraflow.training.loop import Learner, World


@dataclass(frozen=True)
class Opened:
    """A source at work: what is learned in, the environment of evaluations, and the dataset if there is one."""

    world: World
    evaluation: Env | None
    data: Dataset | None = None
    base: str | None = None
    """Revision of the frozen policy."""

    @cached_property
    def digest(self) -> str | None:
        """Of the dataset, or the revision of the frozen policy."""
        return self.data.digest() if self.data else self.base

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should read of data and environments, each once."""
        envs = [env for env in (self.world.env, self.evaluation) if env is not None]
        said = [*(self.data.notes if self.data else ()), *(note for env in envs for note in notes(env))]
        return tuple(dict.fromkeys(said))

    def close(self) -> None:
        for env in (self.world.env, self.evaluation):
            if env is not None:
                close(env)


def environment(source: Any, num_envs: int, seed: int, trust: Trust) -> Env:
    """The environment of a source as it is, with chunks of actions where it has any."""
    return chunked(make(source.env, num_envs, seed, trust=trust), source.horizon, source.execute)


def environments(source: Any, run: Any, trust: Trust, gamma: float = 1.0) -> tuple[Env, Env]:
    """That of training, whose rewards are those to learn from, discounted by `gamma` within a chunk; and that of
    evaluations."""
    env, name, shift = make(source.env, source.num_envs, run.seed, trust=trust), *relabelling(source)
    with closed_on_error(env):
        if name != reward.DENSE or shift:
            env = reward.Rewarded(env, reward.rule(name, trust), shift, name)
        env = chunked(env, source.horizon, source.execute, gamma)
        return env, environment(source, copies(source.env, run.eval_episodes, trust), run.seed + 10_000, trust)


def relabelling(source: Any) -> tuple[str, float]:
    """`reward` and `reward_shift` of a source that has them."""
    return getattr(source, "reward", reward.DENSE), getattr(source, "reward_shift", 0.0)


@contextmanager
def closed_on_error(*envs: Env | None) -> Iterator[None]:
    """What was opened is closed if what comes next fails: nobody else holds it yet."""
    try:
        yield
    except BaseException:
        for env in envs:
            if env is not None:
                close(env)
        raise


@partial(jax.jit, static_argnames=("agent", "spec", "buffer_size"))
def first_learner(agent: Any, spec: EnvSpec, key: PRNGKey, buffer_size: int = 0) -> Learner:
    """The start of a run: a fresh agent, nothing counted, an empty replay."""
    buffer = Buffer.empty(buffer_size, spec) if buffer_size else None
    zero = jnp.zeros((), jnp.int32)
    return Learner(agent.init(key, spec), buffer, jnp.zeros(spec.num_envs), zero, jnp.copy(zero))


def discount(agent: Any) -> float | None:
    """gamma of an agent that has one."""
    return getattr(agent, "gamma", None)


def gamma_of(agent: Any) -> float:
    """gamma of an agent, 0 included; 1 where it has none."""
    gamma = discount(agent)
    return 1.0 if gamma is None else gamma


def check_counts(settings: Any, *names: str, least: int = 1) -> None:
    """Refuse settings below `least`; messages name the flag."""
    for name in names:
        if getattr(settings, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(settings, name)}")


def check_chunk(source: Any) -> None:
    if not 1 <= source.execute <= source.horizon:
        raise ValueError(f"chunks need 1 <= --execute <= --horizon, got {source.execute} and {source.horizon}")


def check_images(source: Any, spec: EnvSpec) -> None:
    """Raises UserError for random shifts of observations without images."""
    if source.random_shift and not any(part.image for part in spec.obs_parts):
        raise UserError("--random-shift moves images, and these observations are vectors: set it to 0")


def iterations(taken: int, until: int, each: int) -> int:
    """How many iterations of `each` steps reach step `until`; at least one."""
    return max(1, -(-(until - taken) // each))


def need(value: str, flag: str, what: str) -> None:
    """Raise UserError for a setting without a default that was not given."""
    if not value:
        raise UserError(f"{what} is missing: give {flag}")
