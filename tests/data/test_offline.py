"""The store: rows, ends, chunks and moments of trajectories with known answers, and what is said about them."""

import numpy as np
import pytest
from tests.data.data_helpers import LENGTHS, analytic, changed, trajectories

from contraflow import EnvSpec, UserError
from contraflow.data.datasets.dataset import build, join
from contraflow.data.datasets.inspect import problems, summary
from contraflow.data.datasets.readers import from_arrays


def test_rows_of_known_trajectories():
    data = analytic()
    assert len(data) == 8 and data.notes == ()
    np.testing.assert_array_equal(data.obs[:, 0], [0, 1, 2, 10, 20, 21, 22, 23])
    np.testing.assert_array_equal(data.next_obs[:, 0], [1, 2, 3, 11, 21, 22, 23, 24])
    np.testing.assert_array_equal(data.reward, [1, 2, 3, 1, 1, 2, 3, 4])
    np.testing.assert_array_equal(np.flatnonzero(data.end), [2, 3, 7])
    np.testing.assert_array_equal(np.flatnonzero(data.terminated), [3])
    np.testing.assert_array_equal(data.last, [2, 2, 2, 3, 7, 7, 7, 7])
    np.testing.assert_array_equal(data.starts, [0, 3, 4])
    np.testing.assert_array_equal(data.lengths, LENGTHS)
    np.testing.assert_array_equal(data.returns, [6, 1, 10])
    np.testing.assert_allclose(data.action[:, 0], np.linspace(-1, 1, 8), atol=1e-6)
    np.testing.assert_allclose(data.raw_action[:, 0], np.linspace(-2, 4, 8), atol=1e-6)
    assert {data.obs.dtype, data.action.dtype, data.reward.dtype} == {np.dtype("float32")}


def test_moments_leave_constant_columns_alone():
    mean, std = analytic().moments()
    column = [0, 1, 2, 10, 20, 21, 22, 23]
    np.testing.assert_allclose([mean[0], std[0]], [np.mean(column), np.std(column)], rtol=1e-6)
    parts = [part | {"obs": part["obs"] * [1, 0] + [0, 1e4]} for part in trajectories()]
    mean, std = join(parts, name="flat", low=-2, high=4).moments()
    assert mean[1] == 1e4 and std[1] == 1


def test_chunks_stay_within_their_trajectory():
    rows, valid = analytic().chunk_index(3)
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(
        rows, [[0, 1, 2], [1, 2, 2], [2, 2, 2], [3, 3, 3], [4, 5, 6], [5, 6, 7], [6, 7, 7], [7, 7, 7]]
    )
    np.testing.assert_array_equal(valid.sum(1), [3, 2, 1, 1, 3, 3, 2, 1])
    assert (valid == (np.arange(3) < valid.sum(1)[:, None])).all()
    assert analytic().chunk_index(4)[1].sum() == 8 + 5 + 3 + 1
    for horizon in (0, 5):
        with pytest.raises(UserError, match=r"has [05] steps, the longest has 4: choose a horizon from 1 to 4"):
            analytic().chunk_index(horizon)


def test_ends_and_successors():
    data = analytic()
    np.testing.assert_array_equal(data.terminated[[3, 7]], [True, False])
    np.testing.assert_array_equal(data.end[[3, 7]], [True, True])
    np.testing.assert_array_equal(data.next_obs[[3, 7], 0], [11, 24])


def test_a_step_without_successor_is_left_out_unless_it_terminated():
    parts = [part | {"obs": part["obs"][:-1]} for part in trajectories()]
    data = join(parts, name="short", low=-2, high=4)
    np.testing.assert_array_equal(data.obs[:, 0], [0, 1, 10, 20, 21, 22])
    np.testing.assert_array_equal(data.next_obs[:, 0], [1, 2, 10, 21, 22, 23])
    np.testing.assert_array_equal(np.flatnonzero(data.end), [1, 2, 5])
    assert data.terminated.tolist() == [False, False, True, False, False, False]
    assert data.notes == ("the last step of 2 trajectories has no recorded successor and was left out",)


def test_bounds_that_are_not_stated():
    data = analytic(low=None, high=None)
    assert (data.low[0], data.high[0]) == (-2, 4) and "no action bounds are stated" in data.notes[0]
    still = [part | {"action": np.full((len(part["action"]), 1), 7.0)} for part in trajectories()]
    data = join(still, name="still")
    np.testing.assert_array_equal(data.action, 0)
    np.testing.assert_array_equal(data.raw_action, 7)
    assert np.isfinite(analytic(low=-np.inf, high=np.inf).action).all()


def test_actions_outside_the_bounds():
    with pytest.raises(UserError, match=r"column 0 of action is -2 in row 0, outside \[-1, 4\]: state the true low"):
        analytic(low=-1)
    data = analytic(low=-1, clip=True)
    assert data.action.min() == -1 and data.notes[0].startswith("25.0% of the actions lay outside")
    assert analytic(low=-2 + 1e-5).notes == (), "rounding is nobody's mistake"


@pytest.mark.parametrize("sizes", [(3, 1), (2, 2)])
def test_an_environment_of_other_sizes(sizes: tuple[int, int]):
    spec = EnvSpec(*sizes, 4, None, True)
    with pytest.raises(UserError, match=f"known has 2 observations and 1 actions, there has {sizes[0]} and {sizes[1]}"):
        analytic().check(spec, "there")
    analytic().check(EnvSpec(2, 5, 4, None, True, horizon=5))


# what `contraflow data info` says


def test_the_summary():
    lines = dict(summary(analytic(env="jax:pendulum")))
    assert lines["rows"] == "8" and lines["trajectories"] == "3 of 1 to 4 steps, mean 2.7"
    assert lines["returns"] == "mean 5.667  std 3.682  min 1  max 10" and lines["environment"] == "jax:pendulum"
    assert lines["ends"] == "1 terminated, 2 truncated" and lines["actions"] == "1: [-2, 4]"
    assert lines["observations"] == "2: [0, 23] [-3, 0]"
    inside = build(changed(terminated=np.arange(8) == 5), name="plays on", low=-2, high=4)
    assert dict(summary(inside))["ends"] == "0 terminated, 3 truncated; 1 terminated rows within trajectories"


def test_problems_are_found():
    assert problems(analytic(low=-20, high=40)) == []
    found = " | ".join(problems(from_arrays(changed(
        obs=np.ones((8, 2)), action=np.full((8, 1), 4.0), reward=np.zeros(8), terminated=np.zeros(8, bool)
    ))))  # fmt: skip
    wanted = [
        "observation columns that never vary: 0, 1",
        "action columns that never vary: 0",
        "100% of the action",
        "nothing terminates",
        "every reward is 0",
        "after 5 rows (the first is 0) next_obs is not",
    ]
    for words in wanted:
        assert words in found
    assert "range of the data" in problems(analytic(low=None, high=None))[0]
