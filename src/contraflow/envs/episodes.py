"""Shared code of tasks in pure JAX: resetting, stepping and drawing N copies.

A task has `num_envs`, `spec`, `start(key) -> body`, `observe(body)`, `move(body, action) -> (body, reward)` and
`sketch(body)`. It has `ended(body)` if an episode may end before its time limit.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int

from contraflow.core.types import EnvSpec, PRNGKey, Step, UserError
from contraflow.envs import base


class TaskState(eqx.Module):
    """State of a task between steps; the key draws the first states of coming episodes."""

    body: Float[Array, "N s"]
    age: Int[Array, " N"]  # steps since the episode began
    key: PRNGKey


def reset(task: Any, key: PRNGKey) -> tuple[TaskState, Float[Array, "N o"]]:
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

BLUE, ORANGE, GREY, BLACK = "#0072B2", "#E69F00", "#BBBBBB", "#222222"  # Okabe and Ito's colour-blind safe palette
SIZE, DPI = 3.2, 100  # inches, and dots per inch: 320 x 320


class Disc(NamedTuple):
    """A filled disc in a picture, in the units of the task."""

    centre: tuple[float, float]
    radius: float
    colour: str


class Path(NamedTuple):
    """A line through points in a picture, in the units of the task."""

    points: Sequence[tuple[float, float]]
    colour: str


Shape = Disc | Path


class Drawn:
    """A task that can be filmed: `frame()` is a picture of copy 0 in its latest state."""

    def __init__(self, task: Any, reach: float):
        self.task, self.reach, self._body = task, reach, None
        self._reset, self._step = jax.jit(task.reset), jax.jit(task.step)

    @property
    def spec(self) -> EnvSpec:
        return replace(self.task.spec, jittable=False)

    def reset(self, key: PRNGKey) -> tuple[TaskState, np.ndarray]:
        """Resets the task."""
        state, obs = self._reset(key)
        self._body = np.asarray(state.body[0])
        return state, np.asarray(obs)

    def step(self, state: TaskState, action: Any) -> tuple[TaskState, Step]:
        """Steps the task."""
        state, step = jax.device_get(self._step(state, jnp.asarray(action)))
        self._body = np.asarray(state.body[0])
        return state, step

    def frame(self) -> np.ndarray:
        """Returns uint8 [320, 320, 3]. Raises UserError before the first reset."""
        if self._body is None:
            raise UserError("there is nothing to draw before the first reset")
        return picture(self.task.sketch(self._body), self.reach)


def picture(shapes: Sequence[Shape], reach: float) -> np.ndarray:
    """Draws the shapes in a square with half side `reach`; returns uint8 [320, 320, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((SIZE, SIZE), DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach))
    axes.axis("off")
    draw(axes, shapes)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def draw(axes: Any, shapes: Sequence[Shape]) -> None:
    """Draws discs and lines on matplotlib axes."""
    from matplotlib.patches import Circle

    for shape in shapes:
        if isinstance(shape, Disc):
            axes.add_patch(Circle(shape.centre, shape.radius, color=shape.colour, linewidth=0))
        else:
            axes.plot(*np.asarray(shape.points).T, color=shape.colour, linewidth=4, solid_capstyle="round")


def kind(prefix: str, table: Mapping[str, tuple[Callable[[int], Any], float]]) -> base.Kind:
    """Returns the kind for the tasks of a table, each with half the side of its pictures."""
    plain = base.from_table(prefix, {name: task for name, (task, _) in table.items()})

    def make(name: str, num_envs: int, seed: int, render: bool) -> Any:
        task = plain.make(name, num_envs, seed, False)
        return Drawn(task, table[name][1]) if render else task

    return plain._replace(make=make, renders=True)
