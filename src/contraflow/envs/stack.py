"""Stacks of frames: an observation holds the last images, so that speeds can be seen."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from contraflow.core.types import EnvSpec, PRNGKey, Step
from contraflow.envs.base import Env, close, notes


@dataclass(frozen=True)
class Stacked:
    """`env` whose images [H, W, C] become the last `frames` of them, [H, W, frames * C], the oldest first.

    Where an episode begins the first image is repeated, so that no stack holds images of two episodes. Vectors remain
    as they are. Raises ValueError for fewer than two frames or observations without images.
    """

    env: Env
    frames: int = 3

    def __post_init__(self):
        if self.frames < 2 or not any(part.image for part in self.env.spec.obs_parts):
            raise ValueError(f"a stack needs at least 2 frames and images, got {self.frames} and {self.env.spec}")

    @property
    def spec(self) -> EnvSpec:
        inner = self.env.spec
        shape = lambda s: (*s[:2], s[2] * self.frames)
        parts = tuple(replace(p, shape=shape(p.shape)) if p.image else p for p in inner.obs_parts)
        return replace(inner, obs_dim=sum(part.size for part in parts), obs_parts=parts)

    @property
    def holds(self) -> bool:
        return getattr(self.env, "holds", False)

    def reset(self, key: PRNGKey) -> tuple[Any, Any]:
        """Starts N episodes; the state is that of `env` and the stacks."""
        state, obs = self.env.reset(key)
        first = jax.tree.map(self._repeated, obs)
        return (state, first), first

    def step(self, state: Any, action: Any, active: np.ndarray | None = None) -> tuple[Any, Step]:
        """As that of `env`; `active` where it `holds`."""
        inner, before = state
        inner, step = self.env.step(inner, action) if active is None else self.env.step(inner, action, active)  # pyright: ignore[reportCallIssue]
        xp: Any = jnp if self.env.spec.jittable else np
        begins = step.terminated | step.truncated | ~step.valid

        def rows(which, new, old):
            return xp.where(which.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        after = jax.tree.map(self._pushed, before, step.next_obs)
        obs = jax.tree.map(lambda new, pushed: rows(begins, self._repeated(new), pushed), step.obs, after)
        kept = obs if active is None else jax.tree.map(lambda new, old: rows(active, new, old), obs, before)
        return (inner, kept), replace(step, obs=kept, next_obs=after)

    def frame(self) -> np.ndarray:
        env: Any = self.env
        return env.frame()

    def close(self) -> None:
        close(self.env)

    @property
    def notes(self) -> tuple[str, ...]:
        return notes(self.env)

    def _repeated(self, x: Any) -> Any:
        """Returns stacks of equal images; vectors [N, k] unchanged."""
        return x if x.ndim == 2 else (jnp if isinstance(x, jax.Array) else np).tile(x, (1, 1, 1, self.frames))

    def _pushed(self, stack: Any, x: Any) -> Any:
        """Returns the stacks with the newest image in the place of the oldest; vectors as they are now."""
        if x.ndim == 2:
            return x
        xp: Any = jnp if isinstance(x, jax.Array) else np
        return xp.concatenate([stack[..., x.shape[-1] :], x], axis=-1)
