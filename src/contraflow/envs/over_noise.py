"""An environment whose action is the start noise of a frozen policy: acting in it steers that policy (2506.15799)."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax

from contraflow.core.types import EnvSpec, PRNGKey, Step
from contraflow.envs.base import Env, close, notes


@runtime_checkable
class Base(Protocol):
    """A frozen policy and the meaning of a choice of its noise."""

    @property
    def size(self) -> int:
        """Numbers of a choice, each in [-1, 1]."""
        ...

    @property
    def compiled(self) -> bool:
        """Whether `decode` may be part of a compiled program."""
        ...

    def decode(self, obs: Any, choice: Any) -> Any:
        """Returns actions [N, d] for observations [N, ...] and choices [N, size]."""
        ...

    def steered(self, policy: Any) -> Any:
        """Returns the policy that acts by the choices of `policy`."""
        ...


@dataclass(frozen=True)
class OverNoise:
    """`env`, in which a frozen policy acts from the noise that an action in [-1, 1]^size chooses.

    The state also holds the observation.
    """

    env: Env
    base: Base

    @property
    def spec(self) -> EnvSpec:
        """Sizes of a choice; one noise for a whole chunk has no parts in time."""
        inner, size = self.env.spec, self.base.size
        horizon = inner.horizon if size == inner.action_dim else 1
        jittable = inner.jittable and self.base.compiled
        return replace(inner, action_dim=size, horizon=horizon, low=(), high=(), jittable=jittable)

    def reset(self, key: PRNGKey) -> tuple[Any, Any]:
        """Resets the environment."""
        state, obs = self.env.reset(key)
        return (state, obs), obs

    def step(self, state: Any, action: Any) -> tuple[Any, Step]:
        """Carries out what the frozen policy makes of the choice."""
        inner, obs = state
        advance = partial(_step, self.env) if self.env.spec.jittable else self.env.step
        inner, step = advance(inner, self.base.decode(obs, action))
        return (inner, step.obs), step

    def close(self) -> None:
        close(self.env)

    @property
    def notes(self) -> tuple[str, ...]:
        return notes(self.env)


@partial(jax.jit, static_argnums=0)
def _step(env: Env, state: Any, action: Any) -> Any:
    return env.step(state, action)
