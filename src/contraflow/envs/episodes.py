"""Shared code of tasks in pure JAX: resetting, stepping and drawing N copies.

A task has `num_envs`, `spec`, `start(key) -> body`, `observe(body)`, `move(body, action) -> (body, reward)` and
`sketch(body)`. It has `ended(body)` if an episode may end before its time limit.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8

from contraflow.core.observation import Part
from contraflow.core.types import EnvSpec, PRNGKey, Step, UserError
from contraflow.envs import base
from contraflow.envs.drawing import image
from contraflow.envs.stack import Stacked

PIXELS = "/pixels"


class TaskState(eqx.Module):
    """State of a task between steps; the key draws the first states of coming episodes."""

    body: Float[Array, "N s"]
    age: Int[Array, " N"]  # steps since the episode began
    key: PRNGKey


def reset(task: Any, key: PRNGKey) -> tuple[TaskState, Shaped[Array, "N ..."]]:
    """Starts N episodes; all randomness comes from the key."""
    k_now, k_later = jr.split(key)
    body = jax.vmap(task.start)(jr.split(k_now, task.num_envs))
    return TaskState(body, jnp.zeros(task.num_envs, jnp.int32), k_later), jax.vmap(task.observe)(body)


def step(task: Any, state: TaskState, action: Float[Array, "N a"]) -> tuple[TaskState, Step]:
    """Advances all copies by actions clipped to [-1, 1]; a copy with an ended episode restarts within the step."""
    moved, reward = jax.vmap(task.move)(state.body, jnp.clip(action, -1.0, 1.0))
    age, valid = state.age + 1, jnp.ones(task.num_envs, dtype=bool)
    terminated = jax.vmap(task.ended)(moved) if hasattr(task, "ended") else ~valid
    truncated = (age >= task.spec.episode_length) & ~terminated
    over = terminated | truncated
    k_now, k_later = jr.split(state.key)
    fresh = jax.vmap(task.start)(jr.split(k_now, task.num_envs))
    body = jnp.where(over[:, None], fresh, moved)
    observe = jax.vmap(task.observe)
    result = Step(observe(body), observe(moved), reward, terminated, truncated, valid)
    return TaskState(body, jnp.where(over, 0, age), k_later), result


# pictures

FRAMES, SIDE = 3, 64  # of what `NAME/pixels` observes: images in a stack, and pixels along a side


@dataclass(frozen=True)
class Camera:
    """A task that is seen: its observation is a picture [side, side, 3] of bytes, with half side `reach` in metres."""

    task: Any
    reach: float
    side: int = SIDE

    @property
    def num_envs(self) -> int:
        return self.task.num_envs

    @property
    def spec(self) -> EnvSpec:
        part = Part("", (self.side, self.side, 3), "uint8")
        return replace(self.task.spec, obs_dim=part.size, obs_parts=(part,))

    def start(self, key: PRNGKey) -> Float[Array, " s"]:
        return self.task.start(key)

    def observe(self, body: Float[Array, " s"]) -> UInt8[Array, "h w 3"]:
        return image(self.task.sketch(body), self.reach, self.side)

    def move(self, body: Float[Array, " s"], action: Float[Array, " a"]) -> tuple[Float[Array, " s"], Float[Array, ""]]:
        return self.task.move(body, action)

    def ended(self, body: Float[Array, " s"]) -> Bool[Array, ""]:
        return self.task.ended(body) if hasattr(self.task, "ended") else jnp.zeros((), bool)

    def reset(self, key: PRNGKey) -> tuple[TaskState, UInt8[Array, "N h w 3"]]:
        return reset(self, key)

    def step(self, state: TaskState, action: Float[Array, "N a"]) -> tuple[TaskState, Step]:
        return step(self, state, action)


class Drawn:
    """An environment that can be filmed: `frame()` is a picture of copy 0 of its `task` in the latest state."""

    def __init__(self, env: Any, task: Any, reach: float):
        self.env, self._body = env, None
        self._reset, self._step = jax.jit(env.reset), jax.jit(env.step)
        self._picture = jax.jit(lambda body: image(task.sketch(body), reach, 320))

    @property
    def spec(self) -> EnvSpec:
        return replace(self.env.spec, jittable=False)

    def reset(self, key: PRNGKey) -> tuple[Any, Any]:
        """Resets the environment."""
        state, obs = jax.device_get(self._reset(key))
        self._look(state)
        return state, obs

    def step(self, state: Any, action: Any) -> tuple[Any, Step]:
        """Steps the environment."""
        state, step = jax.device_get(self._step(state, jnp.asarray(action)))
        self._look(state)
        return state, step

    def frame(self) -> np.ndarray:
        """Returns uint8 [320, 320, 3]. Raises UserError before the first reset."""
        if self._body is None:
            raise UserError("there is nothing to draw before the first reset")
        return np.asarray(self._picture(self._body))

    def _look(self, state: Any) -> None:
        inner = state if isinstance(state, TaskState) else state[0]  # below a stack of frames
        self._body = inner.body[0]


def kind(prefix: str, table: Mapping[str, tuple[Callable[[int], Any], float]]) -> base.Kind:
    """Returns the kind for the tasks of a table, each with half the side of its pictures; `NAME/pixels` observes the
    last `FRAMES` of these."""

    def seen(name: str) -> Callable[[int], Any]:
        task, reach = table[name]
        return lambda num_envs: Stacked(Camera(task(num_envs), reach), FRAMES)

    tasks = {name: task for name, (task, _) in table.items()}
    plain = base.from_table(prefix, tasks | {f"{name}{PIXELS}": seen(name) for name in table})

    def make(name: str, num_envs: int, seed: int, render: bool) -> Any:
        env = plain.make(name, num_envs, seed, False)
        if not render:
            return env
        task, reach = table[name.removesuffix(PIXELS)]
        return Drawn(env, task(num_envs), reach)

    return plain._replace(make=make, renders=True)
