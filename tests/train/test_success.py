"""Success of episodes, from the environment to the files, the tables and the screen."""

import re
from dataclasses import replace
from pathlib import Path

import gymnasium
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tests.cli_helpers import TINY, Constant, Guess, cli, with_source
from tests.train.success_helpers import Goal, goal

from contraflow import resume, train
from contraflow.envs.chunk import Chunked
from contraflow.envs.gymnasium import Gymnasium
from contraflow.envs.probe import TwoStep
from contraflow.training.evaluate import evaluate, evaluate_one, evaluate_seeds
from contraflow.training.log import Log, read_evaluations

GOAL = "tests.train.success_helpers:goal"
YES, NO = Constant(jnp.full(1, 2.0)), Constant(jnp.full(1, -2.0))
RUN = with_source(replace(TINY, agent=Guess()), env=GOAL)


def test_success_at_any_step_counts():
    """It is told in the third of six steps and not at the end; the next episode begins without it."""
    env = goal(2, 0)
    found = evaluate_one(YES, env, jr.key(0), 5)
    assert found.success is not None and found.success.tolist() == [True] * 5
    assert evaluate_one(NO, env, jr.key(0), 5).success.tolist() == [False] * 5  # pyright: ignore
    np.testing.assert_array_equal(evaluate(YES, env, jr.key(0), 5), found.returns)
    both = evaluate_seeds([YES, NO], env, jr.split(jr.key(0)), 4)
    assert both.success.tolist() == [[True] * 4, [False] * 4]  # pyright: ignore


def test_a_success_ends_with_its_episode():
    """Every other episode succeeds, beginning with the first: what came before does not count."""

    class Now(Goal):
        count = -1

        def reset(self, **options):
            self.count += 1
            self.bar = 2.0 * ((self.count + 1) % 2)  # one reset is that of the adapter, before the first episode
            return super().reset(**options)

    found = evaluate_one(YES, Gymnasium(Now, 1), jr.key(0), 4)
    assert found.success is not None and found.success.tolist() == [True, False, True, False]


def test_a_copy_speaks_for_itself():
    """Only the second of three copies reaches its bar: a third of the episodes, in the order of the copies."""
    env = goal(3, 0)
    for copy, bar in zip(env._copies, (2.0, 0.0, 2.0), strict=True):
        copy.bar = bar
    assert evaluate_one(YES, env, jr.key(0), 6).success.tolist() == [False, True, False] * 2  # pyright: ignore


@pytest.mark.parametrize("execute", [2, 4])
def test_a_success_within_a_chunk_counts(execute: int):
    """Chunks of four, of which two or four are carried out: the third step is not the last of any chunk."""
    env = Chunked(goal(2, 0), 4, execute)
    chunk = Constant(jnp.full(4, 2.0))
    assert evaluate_one(chunk, env, jr.key(0), 4).success.tolist() == [True] * 4  # pyright: ignore
    late = Constant(jnp.array([2.0, 2.0, 2.0, 2.0]).at[2 % execute].set(-2.0))
    assert evaluate_one(late, env, jr.key(0), 4).success.tolist() == [False] * 4  # pyright: ignore


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_vector_environments(mode: AutoresetMode):
    env = Gymnasium(lambda: SyncVectorEnv([Goal, Goal], autoreset_mode=mode), 2)
    assert evaluate_one(YES, env, jr.key(0), 4).success.tolist() == [True] * 4  # pyright: ignore
    assert evaluate_one(NO, env, jr.key(0), 4).success.tolist() == [False] * 4  # pyright: ignore


class Last(Goal):
    """Success is told in the last step, under the other name."""

    def step(self, action):
        obs, reward, terminated, truncated, _ = super().step(action)
        return obs, reward, terminated, truncated, {"is_success": truncated and action[0] > 0}


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_success_in_the_step_that_resets(mode: AutoresetMode):
    env = Gymnasium(lambda: SyncVectorEnv([Last, Last], autoreset_mode=mode), 2)
    assert evaluate_one(YES, env, jr.key(0), 4).success.tolist() == [True] * 4  # pyright: ignore
    assert evaluate_one(YES, Gymnasium(Last, 2), jr.key(0), 4).success.tolist() == [True] * 4  # pyright: ignore


def test_who_says_nothing():
    assert evaluate_one(YES, TwoStep(2), jr.key(0), 2).success is None
    quiet = Gymnasium(lambda: gymnasium.make("Pendulum-v1", max_episode_steps=5), 1)
    assert evaluate_one(YES, quiet, jr.key(0), 1).success is None


def test_envpool_copies_that_wait():
    """MetaWorld's info, by the copies that were stepped: those that wait have not succeeded."""
    pytest.importorskip("envpool")
    from contraflow.envs.envpool import EnvPool

    env = EnvPool("MetaWorld/Reach-v3", 3, episode_length=5)
    state, _ = env.reset(jr.key(0))
    pool, real = env._pool, env._pool.step

    def step(action, ids=None):
        *out, info = real(action, ids) if ids is not None else real(action)
        return *out, {**info, "success": np.ones_like(info["success"])}

    env._pool = type("Pool", (), {"step": staticmethod(step), "reset": pool.reset, "close": pool.close})()
    assert env.step(state, np.zeros((3, 4)))[1].success.tolist() == [True] * 3
    assert env.step(state, np.zeros((3, 4)), np.array([True, False, True]))[1].success.tolist() == [True, False, True]
    env.close()


def test_a_run_reports_it(tmp_path: Path):
    """On the screen, in eval.csv, and by `contraflow eval`; a run elsewhere has an empty column and says nothing."""
    flags = ["--env", GOAL, "--trust", "tests", "--steps", "40", "--eval-every", "20", "--eval-episodes", "2"]
    flags += ["--num-envs", "2", "--collect", "10", "--trackers", "tensorboard"]
    code, out, err = cli("train", "tests.cli_helpers:Guess", *flags, "--out", tmp_path / "run")
    assert code == 0 and err == "", err
    told = [line for line in out.splitlines() if "evaluation return" in line]
    rows = read_evaluations(tmp_path / "run")
    assert len(rows) == 2 and all(row["success"] in (0, 0.5, 1) for row in rows)
    assert [f"  success {row['success']:.0%}" in line for row, line in zip(rows, told, strict=True)] == [True, True]
    assert "random actions" in out and len(re.findall(r"  success \d+%", out)) == 2 + 4
    code, out, _ = cli("eval", tmp_path / "run", "--episodes", "4", "--trust", "tests")
    assert code == 0 and out.splitlines()[-1].endswith(("success 0%", "success 100%"))
    train(replace(TINY, agent=Guess()), tmp_path / "other", quiet=True)
    assert (tmp_path / "other/eval.csv").read_text().splitlines()[0].endswith(",return_max,success")
    assert all(line.endswith(",") for line in (tmp_path / "other/eval.csv").read_text().splitlines()[1:])
    assert all("success" not in row for row in read_evaluations(tmp_path / "other"))


def test_old_files_stay_as_they_are(tmp_path: Path):
    """A run of an earlier version goes on with its own columns."""
    train(RUN, tmp_path / "run", quiet=True, trust="tests")
    file = tmp_path / "run/eval.csv"
    old = [line.rpartition(",")[0] for line in file.read_text().splitlines()]
    file.write_text("\n".join(old) + "\n")
    resume(tmp_path / "run", steps=60, quiet=True, trust="all")
    rows = read_evaluations(tmp_path / "run")
    assert [row["step"] for row in rows] == [20, 40, 60] and all("success" not in row for row in rows)
    assert file.read_text().splitlines()[:3] == old


def test_empty_cells(tmp_path: Path):
    log = Log(tmp_path, (), {})
    log.evaluation(1, {"return_mean": 2.0, "success": None})
    log.evaluation(2, {"return_mean": 3.0, "success": 0.25})
    assert (tmp_path / "eval.csv").read_text() == "step,return_mean,success\n1,2,\n2,3,0.25\n"
    assert read_evaluations(tmp_path) == [
        {"step": 1, "return_mean": 2}, {"step": 2, "return_mean": 3, "success": 0.25}
    ]  # fmt: skip
