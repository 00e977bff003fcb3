"""Arrays and folders of other libraries, written here and read back; every mistake is one line."""

from pathlib import Path

import numpy as np
import pytest
from tests.data.data_helpers import analytic, assert_same, changed, flat, lerobot, ogbench, spoilt, trajectories

from contraflow import UserError
from contraflow.data.datasets.dataset import join
from contraflow.data.datasets.readers import from_arrays, load


def test_names_of_other_libraries():
    arrays = flat("low", "high")
    other = {
        "observations": arrays["obs"], "actions": arrays["action"], "rewards": arrays["reward"],
        "next_observations": arrays["next_obs"],
    }  # fmt: skip
    ends, cut = arrays["terminated"], arrays["end"] & ~arrays["terminated"]
    for named in ({"terminations": ends, "truncations": cut}, {"terminals": ends, "timeouts": cut}):
        assert_same(from_arrays(other | named, low=-2, high=4), analytic(), rounding=1e-6)
    short = from_arrays(flat("next_obs"))
    assert len(short) == 8 and short.end.sum() == 3 and short.known.sum() == 6 and "2 steps" in short.notes[0]
    cutoff = {key: value[:6] if key not in ("low", "high") else value for key, value in flat().items()}
    assert from_arrays(cutoff).end[-1] and "cut off" in from_arrays(cutoff).notes[0]


@pytest.mark.parametrize("without", [(), ("next_obs",)])
def test_numbers_in_a_column_of_their_own(without):
    """[n, 1], as D4RL, brax and torchrl have them, and vectors of one number as [n]."""
    wanted = from_arrays(flat(*without))
    arrays = flat(*without, "end") | {"truncated": analytic().end & ~analytic().terminated}
    tall = {key: arrays[key][:, None] for key in ("reward", "terminated", "truncated")}
    assert_same(from_arrays(arrays | tall, name="tall"), wanted)
    assert_same(from_arrays(arrays | {"action": arrays["action"][:, 0]}), wanted)
    d4rl = flat(*without, "end", "terminated") | {"terminals": tall["terminated"], "timeouts": tall["truncated"]}
    assert_same(from_arrays(d4rl), wanted)


def test_flags_of_ogbench_in_a_column_of_their_own():
    arrays = ogbench()
    tall = {key: arrays[key][:, None] for key in ("terminals", "rewards", "masks")}
    assert_same(from_arrays(arrays | tall), from_arrays(arrays))


# OGBench


@pytest.mark.parametrize(("success", "reward"), [("pre", [-1, -1, 0, -1, -1]), ("post", [-1, 0, -1, -1, 0])])
def test_both_success_timings(success, reward, tmp_path: Path):
    np.savez(tmp_path / "cube.npz", **ogbench())
    data = load(tmp_path / "cube.npz", success=success)
    np.testing.assert_array_equal(data.obs[:, 0], [0, 2, 4, 8, 10])
    np.testing.assert_array_equal(data.next_obs[:, 0], [2, 4, 6, 10, 12])
    np.testing.assert_array_equal(np.flatnonzero(data.end), [2, 4])
    np.testing.assert_array_equal(data.reward, reward)
    np.testing.assert_array_equal(data.terminated, np.array(reward) == 0)
    np.testing.assert_allclose(data.action[:, 0], np.linspace(-1, 1, 7)[[0, 1, 2, 4, 5]], atol=1e-6)
    assert (data.low[0], data.high[0]) == (-1, 1) and data.notes == ()


def test_the_form_with_next_observations():
    raw = from_arrays(ogbench())
    arrays = {
        "observations": raw.obs, "next_observations": raw.next_obs, "actions": raw.action, "rewards": raw.reward,
        "masks": 1.0 - raw.terminated, "terminals": raw.end.astype(np.float32),
    }  # fmt: skip
    assert_same(from_arrays(arrays), raw, rounding=1e-6)
    with pytest.raises(UserError, match="post needs the file without next_observations"):
        from_arrays(arrays, success="post")
    with pytest.raises(UserError, match="add OGBench's `masks` or D4RL's `timeouts`"):
        from_arrays({key: value for key, value in arrays.items() if key != "masks"})


def test_without_rewards_nothing_is_worth_anything():
    arrays = {key: value for key, value in ogbench().items() if key not in ("rewards", "masks")}
    data = from_arrays(arrays)
    assert not data.reward.any() and not data.terminated.any()
    assert data.notes == ("no rewards are recorded: all are 0", "no masks are recorded: nothing terminates")


def test_rewards_of_a_task_of_ogbench():
    """Against the distance to the goal, which the single-task maze fixes."""
    gymnasium = pytest.importorskip("gymnasium")
    pytest.importorskip("ogbench")
    id = "pointmaze-medium-singletask-task1-v0"
    env = gymnasium.make(id).unwrapped
    env.reset()
    goal = np.asarray(env.cur_goal_xy)
    obs = np.stack([goal + np.array([d, 0]) for d in (3.0, 1.2, 0.5, 2.0)])
    arrays = {"observations": obs, "actions": np.zeros((4, 2)), "terminals": [0, 0, 0, 1], "qpos": obs}
    data = from_arrays(arrays, task=id)
    np.testing.assert_array_equal(data.reward, [-1, -1, 0])
    assert data.terminated.tolist() == [False, False, True] and data.env == f"ogbench:{id}"
    np.testing.assert_array_equal(from_arrays(arrays, task=id, success="post").reward, [-1, 0, -1])
    with pytest.raises(UserError, match="is no single-task id of OGBench"):
        from_arrays(arrays, task="pointmaze-medium-v0")
    with pytest.raises(UserError, match="need the array qpos"):
        from_arrays({key: arrays[key] for key in ("observations", "actions", "terminals")}, task=id)


# LeRobot


def test_a_lerobot_folder(tmp_path: Path):
    data = load(lerobot(tmp_path / "robot"))
    plain = join([part | {"obs": part["obs"][:-1]} for part in trajectories()], name="robot")
    assert_same(data, plain, rounding=1e-6)
    assert data.name == "robot" and plain.notes == data.notes
    keypoints = [np.array([i, 0.0, 0.0]) for i in range(8)]
    data = load(lerobot(tmp_path / "more", "next.reward", "next.done", **{"observation.environment_state": keypoints}))
    np.testing.assert_array_equal(data.obs[:, 2], range(8))
    np.testing.assert_array_equal(np.flatnonzero(~data.known), [2, 3, 7])
    assert not data.terminated.any() and not data.reward.any()
    assert {note.partition(" is")[0] for note in data.notes} >= {"no next.done"} and len(data.notes) == 4


def test_lerobot_columns_of_lone_numbers(tmp_path: Path):
    """A state, an action, a reward may each be a number or a list of one."""
    wanted = load(lerobot(tmp_path / "lists", **{"observation.state": [[float(i)] for i in range(8)]}))
    numbers = {"observation.state": np.arange(8.0), "action": analytic().raw_action[:, 0]}
    listed = {"next.reward": list(analytic().reward[:, None]), "next.done": list(analytic().terminated[:, None])}
    assert_same(load(lerobot(tmp_path / "numbers", **numbers, **listed)), wanted)


# mistakes


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (spoilt("obs", 5, np.nan), "column 0 of obs is NaN in row 5: repair or leave out its trajectory"),
        (spoilt("action", 2, np.nan), "column 0 of action is NaN in row 2"),
        (spoilt("reward", 7, np.inf), "reward is infinite in row 7"),
        (spoilt("next_obs", 0, -np.inf), "column 0 of next_obs is infinite in row 0"),
        (changed(reward=np.zeros(7)), "reward has 7 rows, action has 8"),
        (changed(obs=np.zeros((9, 2))), "obs has 9 rows, action has 8"),
        (changed(next_obs=np.zeros((8, 3))), "obs has 2 columns and next_obs 3"),
        (changed(obs=np.zeros((8, 4, 4), np.uint8)), "obs has shape [8, 4, 4]; it must be rows of numbers, or images"),
        (changed(obs=np.zeros((8, 4, 4, 3), np.uint8)), "obs and next_obs have other parts or shapes"),
        (changed(action=np.zeros((8, 2, 2))), "action has shape [8, 2, 2]"),
        (changed(action=3.0), "action has shape []; it must be rows of numbers"),
        (changed(reward=np.zeros((8, 2))), "reward has shape [8, 2]; it must be one number for each step"),
        (changed(terminated=np.eye(8)), "terminated has shape [8, 8]; it must be one number for each step"),
        (changed(terminated=np.full(8, np.nan)), "terminated is NaN in row 0"),
        (changed(obs=np.full((8, 2), 1e39)), "column 0 of obs is infinite in row 0"),
        (changed(reward=np.array(["a"] * 8)), "reward holds <U1, not numbers"),
        (changed(low=[0, 0]), "the bounds have 2 and 1 numbers, actions 1"),
        (changed(low=[9]), "a lower action bound is not below the upper one"),
        (changed(end=np.zeros(8, bool)), "marks no end of a trajectory in 8 rows"),
        (flat("end"), "does not say where trajectories end: add `terminated`, and `truncated` or `end`"),
        (flat("terminated"), "does not say where trajectories end"),
        (ogbench(terminals=np.zeros(7)), "marks no end of a trajectory in 7 rows"),
        (ogbench(masks=np.zeros(3)), "masks has 3 rows, action has 7"),
        (flat("obs"), "but no obs: give a Minari folder"),
        ({}, "has no arrays, but no obs"),
        ({key: value[:0] for key, value in flat("low", "high").items()}, "is empty"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit(arrays: dict, words: str, tmp_path: Path):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError) as refused:
        load(tmp_path / "bad.npz")
    assert words in str(refused.value) and "bad" in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(UserError, match=r"bad|arrays"):
        from_arrays(arrays)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: lerobot(p, "observation.state"), "has no column observation.state (it has action, episode_index"),
        (lambda p: lerobot(p, frames=10), "holds 8 of the 10 frames that it states"),
        (lambda p: lerobot(p, action=[None, *[[0.0]] * 7]), "has empty entries in action"),
        (lambda p: lerobot(p, action=[[0.0], [0.0] * 3] * 4), "has lists of different lengths in action"),
        (lambda p: lerobot(p, action=[[None], *[[0.0]] * 7]), "has empty entries in action"),
        (lambda p: next((lerobot(p) / "data").rglob("*.parquet")).write_bytes(b"PAR1"), "is incomplete or damaged"),
        (lambda p: p.mkdir(), "is no dataset that is known"),
        (lambda p: p.write_text("obs,action"), "is no dataset that is known"),
        (lambda p: None, "there is no dataset"),
    ],
)
def test_folders_that_are_no_datasets(make, words: str, tmp_path: Path):
    make(tmp_path / "robot")
    with pytest.raises(UserError) as refused:
        load(tmp_path / "robot")
    assert words in str(refused.value) and str(tmp_path) in str(refused.value)


def test_an_array_file_that_is_none(tmp_path: Path):
    (tmp_path / "a.npz").write_bytes(b"nothing")
    np.savez(tmp_path / "b.npz", **changed(obs=np.array([None] * 8)))
    for name in ("a.npz", "b.npz"):
        with pytest.raises(UserError, match="is damaged or no array file"):
            load(tmp_path / name)
    with pytest.raises(UserError, match="is no OGBench file"):
        load(tmp_path, success="post")
