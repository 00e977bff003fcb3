"""Chunks: decisions of `horizon` actions, of which the first `execute` are carried out.

The policy sees one decision as one step. Its action is the flat chunk, and the reward is sum_k gamma^k r_k over the
executed actions (gamma = 1 in DPPO, 2409.00588; the agent's gamma in Q-chunking, 2507.07969). `next_obs` follows the
last of them. A chunk ends with its episode: the rest is not carried out, and the copy is held until the others have
finished their chunks.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from contraflow.core.types import EnvSpec, PRNGKey, Step, UserError
from contraflow.envs.base import Env, close, notes


@dataclass(frozen=True)
class Chunked:
    """`env` with chunks of actions [N, horizon * a].

    A copy of a jittable environment is held by keeping its rows of the state: every array with a first axis of length
    N, except keys. A host environment with `holds` has a `step(state, action, active)` for this.

    Raises ValueError unless 1 <= execute <= horizon or for an environment that already takes chunks, and UserError for
    execute > 1 in a host environment that cannot hold copies, because an episode may end within a chunk.
    """

    env: Env
    horizon: int
    execute: int
    gamma: float = 1.0

    def __post_init__(self):
        if not 1 <= self.execute <= self.horizon:
            raise ValueError(f"a chunk needs 1 <= execute <= horizon, got {self.execute} and {self.horizon}")
        spec = self.env.spec
        if spec.horizon > 1:
            raise ValueError("the environment already takes chunks: pass the one without")
        if self.execute > 1 and not spec.jittable and not getattr(self.env, "holds", False):
            name = getattr(self.env, "name", type(self.env).__name__)
            raise UserError(
                f"environment {name} cannot hold single copies, so a chunk would run on into the next episode: use "
                "execute=1, or an environment that can step some of its copies"
            )

    @property
    def spec(self) -> EnvSpec:
        """Sizes of chunked actions; `episode_length` counts decisions."""
        inner = self.env.spec
        length = None if inner.episode_length is None else -(-inner.episode_length // self.execute)
        return replace(
            inner,
            action_dim=inner.action_dim * self.horizon,
            episode_length=length,
            horizon=self.horizon,
            execute=self.execute,
        )

    def reset(self, key: PRNGKey) -> tuple[Any, Any]:
        return self.env.reset(key)

    def step(self, state: Any, action: Any) -> tuple[Any, Step]:
        """Carries out the first `execute` actions of each chunk; `reward` is their discounted sum."""
        n = self.env.spec.num_envs
        xp: Any = jnp if self.env.spec.jittable else np
        first, *rest = self.actions(action)
        state, step = self._advance(state, first, xp.ones(n, bool))
        plain = step.undiscounted
        if plain is None and self.gamma != 1:
            plain = step.reward
        total = replace(step, steps=xp.ones(n, int), undiscounted=plain)
        for i, single in enumerate(rest, 1):
            active = ~(total.terminated | total.truncated)
            if not self.env.spec.jittable and not active.any():
                break
            state, step = self._advance(state, single, active)
            total = _joined(xp, total, step, active, self.gamma**i)
        return state, total

    def actions(self, action: Any) -> list[Any]:
        """Returns the `execute` actions, each [N, a], that `env` receives for a chunk [N, horizon * a]."""
        xp: Any = jnp if self.env.spec.jittable else np
        chunk = xp.asarray(action).reshape(self.env.spec.num_envs, self.horizon, -1)
        return [chunk[:, i] for i in range(self.execute)]

    def _advance(self, state: Any, action: Any, active: Any) -> tuple[Any, Step]:
        if self.env.spec.jittable:
            moved, step = self.env.step(state, action)
            return _held(active, moved, state), step
        env: Any = self.env
        return env.step(state, action) if active.all() else env.step(state, action, active)

    def frame(self) -> np.ndarray:
        env: Any = self.env
        return env.frame()

    def close(self) -> None:
        close(self.env)

    @property
    def notes(self) -> tuple[str, ...]:
        return notes(self.env)


def chunked(env: Env, horizon: int, execute: int, gamma: float = 1.0) -> Env:
    """Returns `env` with chunks of actions, or `env` itself for horizon 1."""
    return env if horizon == 1 else Chunked(env, horizon, execute, gamma)


def singly(env: Env, action: Any) -> tuple[Any, list[Any]]:
    """Returns the environment without chunks, and the actions that a decision carries out in it, for one copy.

    With several copies, those that end within the chunk would run on.
    """
    return (env.env, env.actions(action)) if isinstance(env, Chunked) else (env, [action])


def _joined(xp: Any, total: Step, step: Step, active: Any, weight: float) -> Step:
    """Joins two steps: active rows continue from `total` and add the weighted reward of `step`; others stay."""

    def pick(new, old):
        return xp.where(active.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    earned = xp.where(active, step.reward, xp.zeros_like(step.reward))
    plain = earned if step.undiscounted is None else xp.where(active, step.undiscounted, xp.zeros_like(step.reward))
    return Step(
        jax.tree.map(pick, step.obs, total.obs),
        jax.tree.map(pick, step.next_obs, total.next_obs),
        total.reward + (earned if weight == 1 else weight * earned),
        pick(step.terminated, total.terminated),
        pick(step.truncated, total.truncated),
        pick(step.valid, total.valid),
        total.steps + xp.where(active, 1, 0),
        None if total.undiscounted is None else total.undiscounted + plain,
        _either(total.success, None if step.success is None else active & step.success),
    )


def _either(one: Any, other: Any) -> Any:
    """Success at one of two times; None says nothing."""
    return one if other is None else other if one is None else one | other


def _held(active: Bool[Array, " N"], new: Any, old: Any) -> Any:
    """Returns `new`, with the rows of `old` where not `active`."""

    def pick(a, b):
        rows = a.ndim > 0 and a.shape[0] == active.shape[0] and not jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
        return jnp.where(active.reshape(-1, *[1] * (a.ndim - 1)), a, b) if rows else a

    return jax.tree.map(pick, new, old)
