"""OGBench's single tasks: ids, ends, and rewards that agree with those of the data."""

import sys

import jax
import numpy as np
import pytest

pytest.importorskip("ogbench")

from tests.cli_helpers import cli

from contraflow.core.ogbench import single_task
from contraflow.core.types import UserError
from contraflow.data.datasets.readers import from_arrays
from contraflow.envs import available, check, close, jittable, make
from contraflow.envs.chunk import chunked

TASK = "ogbench:pointmaze-medium-navigate-singletask-task1-v0"


def test_ids():
    ids = available()["ogbench"]
    for name in ("cube-single-play-singletask-task1-v0", "scene-noisy-singletask-v0", TASK.removeprefix("ogbench:")):
        assert name in ids
        check(f"ogbench:{name}")
    assert len(ids) == len(set(ids)) and not any("visual" in name for name in ids)
    assert not jittable(TASK)
    check("ogbench:cube-single-singletask-task1-v0")  # as Gymnasium has it
    with pytest.raises(UserError, match="did you mean ogbench:cube-single-play-singletask-v0"):
        check("ogbench:cube-single-play-v0")
    with pytest.raises(UserError, match="unknown environment"):
        check("ogbench:pointmaze-medium-navigate-singletask-task6-v0")
    code, out, _ = cli("list", "envs", "ogbench:cube-single-play")
    assert code == 0 and len(out.splitlines()) == 6


def test_single_task():
    assert single_task(TASK) == single_task("pointmaze-medium-singletask-task1-v0")
    assert single_task("ogbench:puzzle-3x3-noisy-singletask-v0") == "puzzle-3x3-singletask-v0"
    assert [single_task(name) for name in ("", "singletask", "gym:Pendulum-v1", "ogbench:cube-single-play-v0")] == [
        None
    ] * 4


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ogbench", None)
    with pytest.raises(UserError, match=r'pip install "contraflow\[ogbench\]"'):
        check(TASK)
    assert available()["ogbench"] == []


def walk(steps: int):
    """Task 1 of the medium maze with an unwrapped copy beside it that knows the way; yields (obs, action, step)."""
    env = make(TASK, 1, 0)
    maze = env._copies[0].unwrapped  # pyright: ignore
    state, obs = env.reset(jax.random.key(0))
    for _ in range(steps):
        here, target = maze.get_xy(), np.array(maze.cur_goal_xy)
        if maze.xy_to_ij(here) != maze.xy_to_ij(target):
            target = maze.get_oracle_subgoal(here, target)[0]
        way = target - here
        action = (way / max(1.0, np.linalg.norm(way))).astype(np.float32)[None]
        state, step = env.step(state, action)
        yield obs[0].copy(), action[0], step
        if step.terminated[0]:
            break
        obs = step.obs
    close(env)


def test_success_agrees_with_the_data():
    """A walk to the goal: the environment ends it in the step that starts from a state of success, reward 0; the same
    states as a file of OGBench are rewarded and ended in the same row."""
    rows = list(walk(1000))
    reward, over, success = (
        np.array([getattr(step, key)[0] for *_, step in rows]) for key in ("reward", "terminated", "success")
    )
    assert over.nonzero()[0].tolist() == success.nonzero()[0].tolist() == [len(rows) - 1] and 100 < len(rows) < 400
    assert reward.tolist() == [-1] * (len(rows) - 1) + [0]
    states = np.array([obs for obs, *_ in rows] + [rows[-1][2].next_obs[0]])
    arrays = {"observations": states, "qpos": states, "actions": np.zeros((len(states), 2), np.float32)}
    arrays["actions"][:-1] = [action for _, action, _ in rows]
    arrays["terminals"] = np.arange(len(states)) == len(states) - 1
    data = from_arrays(arrays, task=TASK)
    np.testing.assert_array_equal(data.reward, reward)
    np.testing.assert_array_equal(data.terminated, over)
    assert data.env == "ogbench:pointmaze-medium-singletask-task1-v0"


def test_an_arm_is_reset_and_stepped_without_a_word(recwarn: pytest.WarningsRecorder):
    env = make("ogbench:cube-single-play-singletask-task1-v0", 2, 0)
    assert (env.spec.obs_dim, env.spec.action_dim, env.spec.episode_length) == (28, 5, 200)
    state, obs = env.reset(jax.random.key(0))
    again = env.reset(jax.random.key(0))[1]
    np.testing.assert_array_equal(obs, again)
    for _ in range(200):
        state, step = env.step(state, np.zeros((2, 5)))
    assert step.truncated.all() and not step.terminated.any() and (step.reward == -1).all()
    assert step.success is not None and not step.success.any() and not recwarn.list
    long = chunked(env, 5, 5)
    state, obs = long.reset(jax.random.key(1))
    assert long.step(state, np.zeros((2, 25)))[1].success.tolist() == [False, False]
    close(env)
