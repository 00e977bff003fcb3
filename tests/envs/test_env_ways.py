"""The tasks with several best ways: they are of equal value, lead where they should, and can be closed one by one."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from contraflow.core.types import UserError
from contraflow.envs import TASKS, make
from contraflow.envs.drawing import BLACK, BLUE, ORANGE
from contraflow.envs.episodes import Drawn, TaskState
from contraflow.envs.ways import DIRECTIONS, GOALS, START, MultiGoal, TwoWayArm

rng = np.random.default_rng


def run(task, body, actions):
    """Bodies [T + 1, s] and the steps [T] of copy 0 under actions [T, a]."""
    state = TaskState(jnp.asarray(body, jnp.float32)[None], jnp.zeros(1, jnp.int32), jr.key(0))

    def step(state, action):
        state, after = task.step(state, action[None])
        return state, (after.next_obs[0], jax.tree.map(lambda x: x[0], (after.reward, after.terminated)))

    return jax.device_get(jax.jit(lambda s, a: jax.lax.scan(step, s, a)[1])(state, jnp.asarray(actions, jnp.float32)))


# the point


def straight(direction, steps=20):
    """Steps of .097: no number of them ends on the rim of a goal, where rounding would decide."""
    return np.tile([[0.97 * np.sin(direction), 0.97 * np.cos(direction)]], (steps, 1))


def test_every_goal_is_as_far_and_as_good():
    returns = []
    for i, direction in enumerate(DIRECTIONS):
        places, (rewards, ended) = run(MultiGoal(), START, straight(direction))
        assert ended.argmax() == 14
        np.testing.assert_allclose(places[14], GOALS[i], atol=0.05)
        returns.append(rewards[:15].sum())
    np.testing.assert_allclose(returns, returns[0], rtol=1e-3)


def test_the_way_between_them_ends_at_the_obstacle():
    """The mean of the two inner ways, and of all four, is straight ahead."""
    places, (_, ended) = run(MultiGoal(), START, straight(0.0, 30))
    assert not ended.any()
    np.testing.assert_allclose(places[-1], [0.0, -0.321], atol=1e-3)  # it stops a step before the rim


@pytest.mark.parametrize("blocked", range(4))
def test_a_blocked_way_is_blocked_and_the_others_are_open(blocked):
    for i, direction in enumerate(DIRECTIONS):
        _, (_, ended) = run(MultiGoal(blocked=blocked), START, straight(direction))
        assert ended.any() == (i != blocked)


def test_a_step_has_its_length_and_mirror_image():
    task, random = MultiGoal(), rng(0)
    bodies = random.uniform(-1.2, 1.2, (500, 2)).astype(np.float32)
    actions = random.uniform(-1, 1, (500, 2)).astype(np.float32)
    mirror = np.array([[-1.0, 1.0]], np.float32)
    move = jax.jit(jax.vmap(task.move))
    (moved, rewards), (other, same) = move(bodies, actions), move(bodies * mirror, actions * mirror)
    np.testing.assert_allclose(moved * mirror, other, atol=1e-6)
    np.testing.assert_allclose(rewards, same, atol=1e-6)
    lengths = np.linalg.norm(moved - bodies, axis=1)
    wanted = 0.1 * np.minimum(np.linalg.norm(actions, axis=1), 1)
    stopped = np.linalg.norm(bodies + (wanted / np.linalg.norm(actions, axis=1))[:, None] * actions, axis=1) < 0.25
    np.testing.assert_allclose(lengths, np.where(stopped, 0, wanted), atol=1e-6)
    distances = np.linalg.norm(np.asarray(moved)[:, None] - np.array(GOALS), axis=-1).min(1)
    np.testing.assert_allclose(rewards, -distances, atol=1e-5)


def test_who_arrives_with_the_last_step_is_not_cut_off():
    """The next value is then 0 and not that of where the point stands; others at that age are truncated."""
    body = jnp.array([[GOALS[0][0], GOALS[0][1] - 0.12], [0.0, -1.0]])
    state = TaskState(body, jnp.full(2, 39, jnp.int32), jr.key(0))
    _, step = MultiGoal(2).step(state, jnp.array([[0.0, 0.9], [0.0, 0.9]]))
    assert step.terminated.tolist() == [True, False] and step.truncated.tolist() == [False, True]


# the arm


def test_the_arm_is_a_chain_of_rotations():
    body = rng(1).uniform(-2, 2, 8)
    place, turn, places = np.zeros(2), 0.0, []
    for angle in body:
        turn += angle
        place = place + np.array([np.sin(turn), np.cos(turn)]) / 8
        places.append(place)
    np.testing.assert_allclose(TwoWayArm().places(jnp.asarray(body)), places, atol=1e-6)


def bent(side, joints=8):
    """Two straight halves: a triangle of sides 1/2 whose corner is 60 degrees off, the tip on the target."""
    body = np.zeros(joints)
    body[0], body[joints // 2] = side * np.pi / 3, -2 * side * np.pi / 3
    return body


def test_both_ways_are_best_and_their_mean_is_not():
    task = TwoWayArm()
    for side in (-1, 1):
        np.testing.assert_allclose(task.move(jnp.asarray(bent(side)), jnp.zeros(8))[1], 1.0, rtol=1e-5)
    assert task.move(jnp.zeros(8), jnp.zeros(8))[1] < 0.05, "upright"


def test_everything_has_its_mirror_image():
    random = rng(2)
    bodies, actions = random.uniform(-2, 2, (300, 8)), random.uniform(-1.5, 1.5, (300, 8))
    for task, mirrored in ((TwoWayArm(), TwoWayArm()), (TwoWayArm(blocked=(0.4, 0.3)), TwoWayArm(blocked=(-0.4, 0.3)))):
        (moved, rewards), (other, same) = (
            jax.vmap(task.move)(bodies, actions),
            jax.vmap(mirrored.move)(-bodies, -actions),
        )
        np.testing.assert_allclose(moved, -other, atol=1e-6)
        np.testing.assert_allclose(rewards, same, atol=1e-6)


@pytest.mark.parametrize("blocked", [-1, 0, 1])
def test_an_obstacle_closes_its_side(blocked):
    """Both halves turn at once, in 14 steps; the elbow, at (.43, .25) in the end, is where the obstacle is."""
    task = TwoWayArm(blocked=(blocked * 0.43, 0.25) if blocked else None)
    for side in (-1, 1):
        _, (rewards, _) = run(task, np.zeros(8), np.tile(bent(side) / 14 / 0.15, (14, 1)))
        assert (rewards[-1] > 0.99) == (side != blocked)


# pictures


@pytest.mark.parametrize("name", [*TASKS, "pendulum/pixels"])
def test_pictures_follow_the_task(name):
    env = make(f"jax:{name}", 2, 0, render=True)
    assert isinstance(env, Drawn) and not env.spec.jittable
    with pytest.raises(UserError, match="before the first reset"):
        env.frame()
    state, obs = env.reset(jr.key(0))
    plain = make(f"jax:{name}", 2, 0)
    np.testing.assert_allclose(obs, plain.reset(jr.key(0))[1], atol=1e-6)
    first, action = env.frame(), np.ones((2, env.spec.action_dim), np.float32)
    assert first.shape == (320, 320, 3) and first.dtype == np.uint8
    assert colours(first) >= {BLUE}
    for _ in range(8):
        state, step = env.step(state, action)
    assert isinstance(step.reward, np.ndarray)
    assert not np.array_equal(first, env.frame()), "it has moved"


def colours(frame):
    return {f"#{r:02X}{g:02X}{b:02X}" for r, g, b in np.unique(frame.reshape(-1, 3), axis=0)}


@pytest.mark.parametrize("task", [MultiGoal(blocked=0), TwoWayArm(blocked=(0.4, 0.3))])
def test_goals_and_obstacles_are_shown(task):
    env = Drawn(task, task, 1.4)
    env.reset(jr.key(0))
    assert colours(env.frame()) >= {BLUE, ORANGE, BLACK}
