"""Rewards to learn from that are not the environment's own: of the data, and of the environment; returns stay."""

from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.cli_helpers import TINY, Constant, Guess, assert_refused, cli
from tests.train.success_helpers import AT, LENGTH, goal, twice_the_age
from tests.train.test_sources import rows_of

from contraflow import Dataset, OfflineToOnline, Run, UserError, resume, train
from contraflow.envs.chunk import Chunked
from contraflow.envs.probe import TwoStep
from contraflow.envs.reward import Rewarded, sparse
from contraflow.training.evaluate import evaluate
from contraflow.training.log import read_evaluations

GOAL, AGE = "tests.train.success_helpers:goal", "tests.train.success_helpers:twice_the_age"


@dataclass(frozen=True)
class Watcher(Guess):
    """Tells the mean reward of its batches."""

    gamma: float = 0.9

    def update(self, state, batch, key):
        state, metrics = super().update(state, batch, key)
        return state, metrics | {"recorded": batch.reward.mean(), "discount": batch.discount.mean()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four episodes of Goal with actions of .5: the observation is the number of the step, the reward the action."""
    age = np.tile(np.arange(LENGTH, dtype=np.float32), 4)[:, None]
    file = tmp_path_factory.mktemp("data") / "goal.npz"
    np.savez(
        file, obs=age, next_obs=age + 1, action=np.full((24, 1), 0.5), reward=np.full(24, 0.5, np.float32),
        terminated=np.zeros(24, bool), end=age[:, 0] == LENGTH - 1, low=np.array([-1.0]), high=np.array([1.0]),
    )  # fmt: skip
    return file


@pytest.fixture
def run(data: Path) -> Run:
    source = OfflineToOnline(str(data), GOAL, offline_steps=20, mix=0.0, num_envs=2, batch_size=64, buffer_size=64)
    return replace(TINY, agent=Watcher(), source=source)


def roll(env, action: float):
    """Six steps with one action: their rewards, and the environment's own."""
    state, _ = env.reset(jr.key(0))
    steps = []
    for _ in range(LENGTH):
        state, step = env.step(state, np.full((2, 1), action, np.float32))
        steps.append(step)
    return np.array([step.reward[0] for step in steps]), np.array([step.undiscounted[0] for step in steps])


def test_an_environment_with_other_rewards():
    age = np.arange(LENGTH)
    own = np.full(LENGTH, 0.5, np.float32)
    cases = [(None, 2.0, own + 2), (sparse, 0.0, (age == AT) - 1.0), (sparse, 1.0, age == AT)]
    for rule, shift, wanted in [*cases, (twice_the_age, 1.0, 2 * age + 1.5)]:
        learned, returned = roll(Rewarded(goal(2, 0), rule, shift), 0.5)
        np.testing.assert_allclose(learned, wanted)
        np.testing.assert_array_equal(returned, own)
    # it goes on after the end of an episode: the age is that of the next one
    env = Rewarded(goal(2, 0), twice_the_age)
    state, _ = env.reset(jr.key(0))
    rewards = []
    for _ in range(LENGTH + 2):
        state, step = env.step(state, np.zeros((2, 1)))
        rewards.append(step.reward[1])
    np.testing.assert_array_equal(rewards, [*range(0, 2 * LENGTH, 2), 0, 2])


def test_chunks_sum_what_is_learned_from_and_what_is_returned():
    """gamma .5: 1 + 1/2 (1 + 2) + 1/4 (1 + 4) of the rule against 3 x .5 of the environment."""
    env = Chunked(Rewarded(goal(2, 0), twice_the_age, 0.5), 3, 3, gamma=0.5)
    state, _ = env.reset(jr.key(0))
    _, step = env.step(state, np.full((2, 3), 0.5))
    np.testing.assert_allclose(step.reward, 1 + 0.5 * 3 + 0.25 * 5)
    np.testing.assert_allclose(step.undiscounted, 1.5)
    chunk = Constant(jnp.arctanh(jnp.full(3, 0.5)))
    np.testing.assert_allclose(evaluate(chunk, env, jr.key(1), 2), LENGTH * 0.5, rtol=1e-5)


def test_in_jax_too():
    """The returns of the probe are its own; what is learned from is shifted."""
    env, plain = Rewarded(TwoStep(2), None, 3.0), TwoStep(2)
    policy = Constant(jnp.zeros(1))
    np.testing.assert_array_equal(evaluate(policy, env, jr.key(0), 4), evaluate(policy, plain, jr.key(0), 4))
    state, _ = env.reset(jr.key(0))
    other, _ = plain.reset(jr.key(0))
    reward = env.step(state, jnp.zeros((2, 1)))[1].reward
    np.testing.assert_allclose(reward, plain.step(other, jnp.zeros((2, 1)))[1].reward + 3)


@pytest.mark.parametrize(("reward", "shift"), [("dense", 2.0), (AGE, 0.0), (AGE, -1.0)])
def test_both_parts_of_a_run_learn_from_the_same(run: Run, reward: str, shift: float, tmp_path: Path):
    """All observations of an episode are as frequent in data and replay, so the means agree but for the actions."""
    run = replace(run, source=replace(run.source, reward=reward, reward_shift=shift), steps=140)
    train(run, tmp_path / "run", quiet=True, trust="tests")
    rows = rows_of(tmp_path / "run")
    base = LENGTH - 1 if reward == AGE else 0
    assert rows[20]["recorded"] == pytest.approx(base + 0.5 + shift, abs=0.8 if base else 1e-5)
    late = rows[140]["recorded"] - rows[140]["return"] / LENGTH  # less the action, of which the return is made
    assert late == pytest.approx(base + shift, abs=1.0)
    returns = [row["return_mean"] for row in read_evaluations(tmp_path / "run")]
    assert all(abs(value) <= LENGTH for value in returns), "the environment's own"
    resume(tmp_path / "run", steps=160, quiet=True, trust="all")


def test_sparse_rewards_of_a_task(tmp_path: Path):
    """The task of a maze follows from the environment, or from --task; where it is done the reward is 0, else -1."""
    gymnasium = pytest.importorskip("gymnasium")
    pytest.importorskip("ogbench")
    env = gymnasium.make("pointmaze-medium-singletask-task1-v0").unwrapped
    env.reset()
    obs = np.asarray(env.cur_goal_xy) + np.array([[d, 0] for d in (3.0, 1.2, 0.5, 2.0)])
    arrays = {"observations": obs, "actions": np.zeros((4, 2)), "terminals": np.array([0, 0, 0, 1]), "qpos": obs}
    np.savez(tmp_path / "walk.npz", **arrays)
    for id, task in (
        ("ogbench:pointmaze-medium-stitch-singletask-task1-v0", None),
        ("", "pointmaze-medium-singletask-task1-v0"),
    ):
        run = replace(TINY, agent=Watcher(), source=Dataset(str(tmp_path / "walk.npz"), id, task=task, reward="sparse"))
        run = run.resolve("")
        assert run.env == id or run.env == "ogbench:pointmaze-medium-singletask-task1-v0"
        with closing(run.source.open(run, "")) as opened:
            assert opened.data is not None
            assert opened.data.reward.tolist() == [-1, -1, 0] and opened.data.terminated.tolist() == [
                False,
                False,
                True,
            ]
            assert opened.data.notes[-1] == "rewards are sparse: -1 to 0"
        shifted = replace(run, source=replace(run.source, reward_shift=1.0))
        with closing(shifted.source.open(shifted, "")) as opened:
            assert opened.data is not None and opened.data.reward.tolist() == [0, 0, 1]


def test_mistakes(run: Run, data: Path, tmp_path: Path):
    for reward, words in (
        ("sparse", "--reward sparse needs to know of success"),
        ("tests.train.success_helpers:wrong_shape", r"returned shape \(24, 1\) for 24 rows"),
        ("tests.train.success_helpers:nothing", "cannot import"),
    ):
        with pytest.raises(UserError, match=words):
            train(replace(run, source=replace(run.source, reward=reward)), tmp_path / "run", trust="tests", quiet=True)
        assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"pass --trust tests.train.success_helpers"):
        train(replace(run, source=Dataset(str(data), reward=AGE)), tmp_path / "run", quiet=True)
    flags = ["train", "fql", "--data", str(data), "--out", str(tmp_path / "run")]
    assert_refused([*flags, "--reward", "thick"], "--reward is dense, sparse or module:function, got thick")
    code, out, _ = cli("train", "fql", "--help-all")
    assert code == 0 and "--reward-shift" in out
