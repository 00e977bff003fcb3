"""Two tasks in pure JAX with several solutions of equal value, to test policies with several modes.

`blocked` closes one way with an obstacle that is not observed. The response of a policy shows which other ways it
knows.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float

from contraflow.core.types import EnvSpec, PRNGKey, Step
from contraflow.envs import episodes
from contraflow.envs.drawing import BLACK, BLUE, GREY, ORANGE, Disc, Path, Shape
from contraflow.envs.episodes import TaskState

START = (0.0, -1.0)
DISTANCE = 1.5  # of every goal from the start
DIRECTIONS = tuple(math.radians(angle) for angle in (-50, -20, 20, 50))  # from straight ahead, clockwise
GOALS = tuple((START[0] + DISTANCE * math.sin(a), START[1] + DISTANCE * math.cos(a)) for a in DIRECTIONS)
GOAL, MIDDLE, BLOCK = 0.1, 0.25, 0.2  # radii of a goal, of the obstacle in the middle, and of one that blocks a way


@dataclass(frozen=True)
class MultiGoal:
    """A point runs to any of four equally distant goals, past an obstacle straight ahead (after 1702.08165).

    - Body and observation: the position, at first (0, -1) plus noise of standard deviation .02.
    - Action: a step of at most .1 in its direction. A step that would end in an obstacle is not made.
    - Reward -(distance to the nearest goal) after the step. Within .1 of a goal the episode terminates; otherwise it is
      truncated after 40 steps.
    - `blocked` = i puts an obstacle of radius .2 on the straight way to goal i.
    """

    num_envs: int = 1
    blocked: int | None = None

    @property
    def spec(self) -> EnvSpec:
        return EnvSpec(2, 2, self.num_envs, 40, jittable=True)

    @property
    def obstacles(self) -> list[Disc]:
        discs = [Disc((0.0, 0.0), MIDDLE, GREY)]
        if self.blocked is not None:
            a = DIRECTIONS[self.blocked]
            discs.append(Disc((START[0] + 0.9 * math.sin(a), START[1] + 0.9 * math.cos(a)), BLOCK, BLACK))
        return discs

    def start(self, key: PRNGKey) -> Float[Array, " s"]:
        return jnp.asarray(START) + 0.02 * jr.normal(key, (2,))

    def observe(self, body: Float[Array, " s"]) -> Float[Array, " o"]:
        return body

    def move(self, body: Float[Array, " s"], action: Float[Array, " a"]) -> tuple[Float[Array, " s"], Float[Array, ""]]:
        """Returns (next body, reward) of one copy; `action` in [-1, 1]."""
        length = jnp.sqrt(jnp.sum(action**2) + 1e-12)
        there = jnp.clip(body + 0.1 * action / jnp.maximum(length, 1.0), -1.6, 1.6)
        hits = [jnp.sum((there - jnp.asarray(disc.centre)) ** 2) < disc.radius**2 for disc in self.obstacles]
        body = jnp.where(jnp.any(jnp.stack(hits)), body, there)
        return body, -jnp.sqrt(jnp.min(_squares_to_goals(body)) + 1e-12)

    def ended(self, body: Float[Array, " s"]) -> Bool[Array, ""]:
        """Returns whether the point is within a goal."""
        return jnp.min(_squares_to_goals(body)) < GOAL**2

    def reset(self, key: PRNGKey) -> tuple[TaskState, Float[Array, "N o"]]:
        return episodes.reset(self, key)

    def step(self, state: TaskState, action: Float[Array, "N a"]) -> tuple[TaskState, Step]:
        return episodes.step(self, state, action)

    def sketch(self, body: Float[Array, " s"]) -> list[Shape]:
        """Returns the shapes of goals, obstacles and the point."""
        goals = [Disc(goal, GOAL, ORANGE) for goal in GOALS]
        return [*goals, *self.obstacles, Disc((body[0], body[1]), 0.05, BLUE)]


def _squares_to_goals(body: Float[Array, " s"]) -> Float[Array, " g"]:
    return jnp.sum((body[None] - jnp.asarray(GOALS)) ** 2, 1)


TARGET, HINDRANCE = (0.0, 0.5), 0.1  # target of the tip; radius of an obstacle that blocks a way


@dataclass(frozen=True)
class TwoWayArm:
    """A planar arm of `joints` equal links, 1 m in total, stands upright and moves its tip to a target half way down.

    It must bend to the left or to the right, and every way has its mirror image. At first, half of the best actions are
    minus the other half, in as many dimensions as there are joints.

    - Body: the angle of each link to the previous one, at first 0 plus noise of standard deviation .02, and kept within
      2.5 rad. Observation: the angles, and the tip minus the target.
    - Action: a turn of at most .15 rad of each joint.
    - Reward 1 / (1 + (distance of the tip from the target / .1 m)^2) after the step; 40 steps, truncated.
    - `blocked` = (x, y) puts an obstacle of radius .1 there, into which no part of the arm can move.
    """

    num_envs: int = 1
    joints: int = 8
    blocked: tuple[float, float] | None = None

    @property
    def spec(self) -> EnvSpec:
        return EnvSpec(self.joints + 2, self.joints, self.num_envs, 40, jittable=True)

    def start(self, key: PRNGKey) -> Float[Array, " s"]:
        return 0.02 * jr.normal(key, (self.joints,))

    def places(self, body: Float[Array, " s"]) -> Float[Array, "j 2"]:
        """Returns the ends of the links [j, 2], the tip last."""
        angles = jnp.cumsum(body)
        return jnp.cumsum(jnp.stack([jnp.sin(angles), jnp.cos(angles)], 1), 0) / self.joints

    def observe(self, body: Float[Array, " s"]) -> Float[Array, " o"]:
        return jnp.concatenate([body, self.places(body)[-1] - jnp.asarray(TARGET)])

    def move(self, body: Float[Array, " s"], action: Float[Array, " a"]) -> tuple[Float[Array, " s"], Float[Array, ""]]:
        """Returns (next body, reward) of one copy; `action` in [-1, 1]."""
        there = jnp.clip(body + 0.15 * action, -2.5, 2.5)
        body = there if self.blocked is None else jnp.where(self.hits(there, self.blocked), body, there)
        square = jnp.sum((self.places(body)[-1] - jnp.asarray(TARGET)) ** 2)
        return body, 1.0 / (1.0 + square / 0.1**2)

    def hits(self, body: Float[Array, " s"], centre: tuple[float, float]) -> Bool[Array, ""]:
        """Returns whether the end or the middle of a link lies in the obstacle."""
        ends = self.places(body)
        middles = (ends + jnp.concatenate([jnp.zeros((1, 2)), ends[:-1]])) / 2
        off = jnp.concatenate([ends, middles]) - jnp.asarray([centre])
        return jnp.any(jnp.sum(off**2, 1) < HINDRANCE**2)

    def reset(self, key: PRNGKey) -> tuple[TaskState, Float[Array, "N o"]]:
        return episodes.reset(self, key)

    def step(self, state: TaskState, action: Float[Array, "N a"]) -> tuple[TaskState, Step]:
        return episodes.step(self, state, action)

    def sketch(self, body: Float[Array, " s"]) -> list[Shape]:
        """Returns the shapes of target, obstacle and arm."""
        arm = [(0.0, 0.0), *((x, y) for x, y in self.places(body))]
        block = [Disc(self.blocked, HINDRANCE, BLACK)] if self.blocked else []
        return [Disc(TARGET, 0.05, ORANGE), *block, Path(arm, BLUE), *(Disc(place, 0.02, BLACK) for place in arm)]
