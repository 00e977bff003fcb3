"""MetaWorld's datasets, made by the scripted policies of its package in the tasks of EnvPool."""

from pathlib import Path

import jax.random as jr
import numpy as np
import pytest

pytest.importorskip("metaworld")
pytest.importorskip("envpool")

from tests.cli_helpers import assert_refused

from contraflow.data.datasets.readers import load
from contraflow.data.make import make
from contraflow.data.make.episodes import Maker
from contraflow.data.make.metaworld import NOISE, STEPS, find
from contraflow.envs.envpool import EnvPool

HAND, GOAL = slice(0, 3), slice(36, 39)
pytestmark = pytest.mark.filterwarnings("ignore")  # of the package, as it is imported


@pytest.fixture(scope="module")
def reach() -> dict[str, np.ndarray]:
    return Maker(find("metaworld:reach-expert")).episode(0)


def test_the_script_reaches_the_goal_that_it_sees(reach):
    """Success in `reach` is a gripper within 5 cm of the goal, which is drawn anew for each episode. Its fingers are up
    to 1.5 cm from where the hand is observed."""
    far = np.linalg.norm(reach["next_obs"][:, HAND] - reach["next_obs"][:, GOAL], axis=1)
    assert reach["success"][-1] and not reach["success"][0]
    sure = abs(far - 0.05) > 0.015
    assert sure[0] and sure[-1] and ((far < 0.05) == reach["success"])[sure].all()
    _, obs = EnvPool("MetaWorld/Reach-v3", 8).reset(jr.key(0))
    assert (np.ptp(obs[:, GOAL], axis=0) > 0.05).sum() >= 2, "goals are those of their episodes"


def test_an_episode_does_not_know_what_was_made_before_it(reach):
    maker = Maker(find("metaworld:reach-expert"))
    other, again = maker.episode(1), maker.episode(0)
    assert all((again[name] == reach[name]).all() for name in reach)
    assert (other["obs"][0, GOAL] != reach["obs"][0, GOAL]).any()


def test_the_noise_of_a_set_has_another_strength_in_each_episode():
    maker = Maker(find("metaworld:drawer-open-noisy"))
    jumps = [np.median(np.abs(np.diff(maker.episode(i)["action"][:, 2]))) for i in range(3)]
    assert min(jumps) > 0 and max(jumps) < 2 * NOISE and max(jumps) > 1.2 * min(jumps)


def test_the_file_says_what_a_run_needs(tmp_path: Path):
    path = tmp_path / "set.npz"
    assert make("metaworld:button-press-expert", STEPS - 1, path)
    data = load(path)
    assert len(data) == STEPS and data.env == "envpool:MetaWorld/ButtonPress-v3" and data.stated
    assert not data.terminated.any() and data.known.all()
    np.testing.assert_array_equal(data.next_obs[:-1], data.obs[1:])


@pytest.mark.parametrize(
    ("name", "words"),
    [("metaworld:reach", "write metaworld:TASK-expert"), ("metaworld:rich-noisy", "did you mean 'reach'")],
)
def test_names_that_are_no_set_are_refused(name: str, words: str, tmp_path: Path):
    assert_refused(["data", "make", name, "--out", str(tmp_path / "set.npz")], words)
    assert not list(tmp_path.iterdir())
