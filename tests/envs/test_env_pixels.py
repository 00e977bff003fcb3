"""Tasks seen as images: what is drawn by closed forms, and stacks of frames that never hold two episodes."""

import math
from dataclasses import replace
from functools import cache
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from contraflow.core.observation import Part
from contraflow.envs import TASKS, make
from contraflow.envs.chunk import Chunked
from contraflow.envs.drawing import BLUE, GREY, LINE, ORANGE, Disc, Path, image
from contraflow.envs.episodes import Camera, TaskState
from contraflow.envs.gymnasium import Gymnasium
from contraflow.envs.stack import Stacked

# drawing


@cache
def camera(name: str) -> Any:
    """The jitted picture of a body of this task."""
    task, reach = TASKS[name]
    return jax.jit(Camera(task(1), reach).observe)


def look(name: str, *body: float) -> np.ndarray:
    return np.asarray(camera(name)(jnp.asarray(body, jnp.float32)))


def rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])


def test_a_pole_that_stands_covers_the_columns_in_its_middle():
    """A rod of half width w = LINE * reach in pixels of size h: column j is at |x| = |j - 31.5| h and is covered by
    clip(1/2 + (w - |x|) / h, 0, 1), in all rows between the disc of the motor and the tip."""
    _, reach = TASKS["pendulum"]
    h = 2 * reach / 64
    cover = np.clip(0.5 + (LINE * reach - np.abs(np.arange(64) - 31.5) * h) / h, 0, 1)
    assert 0 < cover[31] < 1 and cover[31] + cover[32] == pytest.approx(2 * LINE * reach / h)
    want = np.round(255 + cover[:, None] * (rgb(BLUE) - 255))
    up, down = look("pendulum", 0.0, 3.0), look("pendulum", math.pi, 0.0)
    top = math.ceil(31.5 - 1.0 / h)  # the first row whose centre is below the tip
    for row in range(top, 29):
        np.testing.assert_allclose(up[row], want, atol=1)
        np.testing.assert_allclose(down[63 - row], want, atol=1)
    assert (up[: top - 2] == 255).all() and (up[35:] == 255).all() and (down[:29] == 255).all()


@pytest.mark.parametrize(("name", "one", "other"), [
    ("pendulum", (0.7, 1.0), (-0.7, -1.0)),
    ("cartpole-swingup", (0.4, 2.0, 0.0, 0.0), (-0.4, -2.0, 0.0, 0.0)),
    ("multi-goal", (0.3, -0.6), (-0.3, -0.6)),
    ("two-way-arm", (0.3, 0.2, -0.4, 0.1, 0.0, 0.5, -0.2, 0.3), (-0.3, -0.2, 0.4, -0.1, 0.0, -0.5, 0.2, -0.3)),
])  # fmt: skip
def test_mirrored_states_make_mirrored_images(name, one, other):
    first, second = look(name, *one), look(name, *other)
    np.testing.assert_allclose(first[:, ::-1].astype(int), second, atol=1)
    assert first.dtype == np.uint8 and np.abs(first.astype(int) - second).max() > 50


def test_what_a_shape_covers_is_its_area():
    """pi r^2 of a disc, and 2 w l + pi w^2 of a line with round ends, wherever they lie; the later shape is on top."""
    draw = jax.jit(lambda x, y: (
        image([Disc((x, y), 0.4, "#000000")], 1.0, 64), image([Path(((x, y), (x + 0.5, y + 0.3)), "#000000")], 1.0, 64)
    ))  # fmt: skip
    area = lambda picture: (1 - np.asarray(picture)[..., 0] / 255).sum() * (2 / 64) ** 2
    for x, y in ((0.0, 0.0), (0.013, -0.207), (-0.4, 0.11)):
        disc, line = draw(x, y)
        assert area(disc) == pytest.approx(math.pi * 0.4**2, rel=0.005)
        assert area(line) == pytest.approx(2 * LINE * math.hypot(0.5, 0.3) + math.pi * LINE**2, rel=0.03)
    both = np.asarray(image([Disc((0.0, 0.0), 0.5, ORANGE), Disc((0.0, 0.0), 0.2, GREY)], 1.0, 32))
    np.testing.assert_array_equal(both[16, 16], rgb(GREY))
    np.testing.assert_array_equal(both[16, 22], rgb(ORANGE))


@pytest.mark.parametrize("name", ["pendulum", "multi-goal"])
def test_a_camera_changes_nothing_else(name):
    """The same rewards and ends as the task, from the same key; episodes of multi-goal terminate."""
    plain, seen = make(f"jax:{name}", 3, 0), make(f"jax:{name}/pixels", 3, 0)
    assert seen.spec.observation == (Part("", (64, 64, 9), "uint8"),)
    assert replace(plain.spec, obs_dim=0) == replace(seen.spec, obs_dim=0, obs_parts=())
    action = 0.7 * jr.normal(jr.key(1), (60, 3, plain.spec.action_dim)) + jnp.eye(plain.spec.action_dim)[-1][None, None]

    def play(env, key):
        return jax.lax.scan(env.step, env.reset(key)[0], action)[1]

    one, other = (jax.device_get(jax.jit(play, static_argnums=0)(env, jr.key(0))) for env in (plain, seen))
    np.testing.assert_allclose(one.reward, other.reward, rtol=1e-4, atol=1e-4)
    for key in ("terminated", "truncated", "valid"):
        np.testing.assert_array_equal(getattr(one, key), getattr(other, key))
    assert one.terminated.any() == (name == "multi-goal")
    assert other.obs.dtype == other.next_obs.dtype == np.uint8


# stacks


def frames(stack: np.ndarray) -> list[np.ndarray]:
    return [stack[..., i : i + 3].astype(int) for i in (0, 3, 6)]


def test_a_stack_begins_with_its_episode_and_holds_the_last_three_images():
    """Copies of different age, over two ends: each frame is the picture of the body at that time."""
    env = make("jax:pendulum/pixels", 2, 0)
    (inner, _), obs = jax.jit(env.reset)(jr.key(0))
    first = frames(np.asarray(obs))
    for frame in first[1:]:
        np.testing.assert_array_equal(frame, first[0])
    state, step = (TaskState(inner.body, jnp.array([198, 196], jnp.int32), inner.key), obs), jax.jit(env.step)
    history = [[look("pendulum", *body)] * 3 for body in inner.body]
    for t in range(5):
        state, after = step(state, jnp.ones((2, 1)))
        over = np.asarray(after.truncated)
        np.testing.assert_array_equal(over, [t == 1, t == 3])
        for i in range(2):
            seen, following = frames(np.asarray(after.obs[i])), frames(np.asarray(after.next_obs[i]))
            now = look("pendulum", *np.asarray(state[0].body[i]))
            if over[i]:
                np.testing.assert_allclose(np.stack(following[:2]), np.stack(history[i][1:]), atol=1)
                assert not np.array_equal(following[2], following[1])
            history[i] = [now] * 3 if over[i] else [*history[i][1:], now]
            np.testing.assert_allclose(np.stack(seen), np.stack(history[i]), atol=1)
            if not over[i]:
                np.testing.assert_array_equal(after.obs[i], after.next_obs[i])


class Ages(gymnasium.Env):
    """An image of 10 * episode + age, and the age."""

    action_space = Box(-1, 1, (1,), np.float32)
    observation_space = Dict({"view": Box(0, 255, (8, 9, 1), np.uint8), "age": Box(0, 9, (1,), np.float32)})
    episode = 0

    def __init__(self, length: int = 3):
        self.length = length

    def observe(self) -> Any:
        view = np.full((8, 9, 1), 10 * self.episode + self.age, np.uint8)
        return {"view": view, "age": np.array([self.age], np.float32)}

    def reset(self, *, seed=None, options=None):
        self.episode, self.age = self.episode + 1, 0
        return self.observe(), {}

    def step(self, action):
        self.age += 1
        return self.observe(), 1.0, False, self.age >= self.length, {}


def vector(mode: AutoresetMode) -> Any:
    return lambda: SyncVectorEnv([Ages, Ages], autoreset_mode=mode)


@pytest.mark.parametrize("build", [Ages, vector(AutoresetMode.SAME_STEP), vector(AutoresetMode.NEXT_STEP)])
def test_stacks_of_a_simulator_hold_one_episode(build):
    """However it resets; vectors are not stacked."""
    env = Stacked(Gymnasium(build, 2), 3)
    assert env.spec.observation == (Part("age", (1,)), Part("view", (8, 9, 3), "uint8"))
    state, obs = env.reset(jr.key(0))
    ends = 0
    for _ in range(9):
        age, seen = obs["age"][:, 0].astype(int), obs["view"][:, 2, 3].astype(int)
        assert isinstance(obs["view"], np.ndarray) and obs["view"].dtype == np.uint8
        np.testing.assert_array_equal(seen % 10, np.maximum(age[:, None] + np.arange(-2, 1)[None], 0))
        assert (seen // 10 == seen[:, :1] // 10).all(), "one episode"
        state, step = env.step(state, np.zeros((2, 1)))
        if step.valid.all():
            np.testing.assert_array_equal(step.next_obs["view"][:, 2, 3], np.c_[seen[:, 1:], seen[:, 2:] + 1])
        ends += step.truncated.all()
        obs = step.obs
        if step.truncated.all() and build is not Ages and env.env._mode is AutoresetMode.NEXT_STEP:
            state, step = env.step(state, np.zeros((2, 1)))
            assert not step.valid.any()
            obs = step.obs
    assert ends == 3
    env.close()


def test_copies_that_are_held_keep_their_stack():
    """Chunks of three actions, of which copy 0 needs one to its end: the other two are not carried out."""
    env = Chunked(make("jax:pendulum/pixels", 2, 0), 3, 3)
    (inner, seen), _ = env.reset(jr.key(0))
    state = TaskState(inner.body, jnp.array([199, 0], jnp.int32), inner.key), seen
    one, other = (frames(np.asarray(x)) for x in jax.jit(env.step)(state, jnp.ones((2, 3)))[1].obs)
    assert all(np.array_equal(one[0], frame) for frame in one[1:])
    assert not np.array_equal(other[0], other[2])


def test_copies_of_a_simulator_that_are_held_keep_their_stack():
    """Chunks of two actions; copy 0 ends with the third step and is held for the fourth, in which copy 1 goes on."""
    lengths = iter((3, 5))
    env = Chunked(Stacked(Gymnasium(lambda: Ages(next(lengths)), 2)), 2, 2)
    state, obs = env.reset(jr.key(0))
    first = obs["view"][0, 0, 0, 0]
    for wanted in ([[0, 1, 2], [0, 1, 2]], [[10, 10, 10], [2, 3, 4]], [[10, 11, 12], [10, 10, 10]]):
        state, step = env.step(state, np.zeros((2, 2)))
        np.testing.assert_array_equal(step.obs["view"][:, 0, 0].astype(int) - first, wanted)


def test_what_cannot_be_stacked_is_refused():
    for env, count in ((make("jax:pendulum", 1, 0), 3), (Camera(TASKS["pendulum"][0](1), 1.2), 1)):
        with pytest.raises(ValueError, match="at least 2 frames and images"):
            Stacked(env, count)
