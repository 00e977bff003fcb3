"""The store: rows, ends, chunks and moments of trajectories with known answers, and what is said about them."""

from dataclasses import replace

import jax.random as jr
import numpy as np
import pytest
from tests.data.data_helpers import LENGTHS, analytic, changed, flat, trajectories

from contraflow import EnvSpec, UserError
from contraflow.core.bounds import check_fit
from contraflow.data.datasets.dataset import GUESSED, Dataset, build, join
from contraflow.data.datasets.inspect import problems, summary
from contraflow.data.datasets.readers import from_arrays
from contraflow.data.rows import Rows
from contraflow.data.samplers import Chunk, Uniform


def test_rows_of_known_trajectories():
    data = analytic()
    assert len(data) == 8 and data.notes == ()
    np.testing.assert_array_equal(data.obs[:, 0], [0, 1, 2, 10, 20, 21, 22, 23])
    np.testing.assert_array_equal(data.next_obs[:, 0], [1, 2, 3, 11, 21, 22, 23, 24])
    np.testing.assert_array_equal(data.reward, [1, 2, 3, 1, 1, 2, 3, 4])
    np.testing.assert_array_equal(np.flatnonzero(data.end), [2, 3, 7])
    np.testing.assert_array_equal(np.flatnonzero(data.terminated), [3])
    assert data.known.all() and data.with_successor() is data
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


def test_the_sizes_that_a_policy_learns_from():
    assert analytic().spec(3, 2) == EnvSpec(2, 3, 1, None, False, horizon=3, execute=2, low=(-2.0,), high=(4.0,))
    for horizon in (0, 5):
        with pytest.raises(UserError, match=r"has [05] steps, the longest has 4: choose a horizon from 1 to 4"):
            analytic().spec(horizon)


def test_ends_and_successors():
    data = analytic()
    np.testing.assert_array_equal(data.terminated[[3, 7]], [True, False])
    np.testing.assert_array_equal(data.end[[3, 7]], [True, True])
    np.testing.assert_array_equal(data.next_obs[[3, 7], 0], [11, 24])


# successors that are not known


def without_successors() -> Dataset:
    return join([part | {"obs": part["obs"][:-1]} for part in trajectories()], name="short", low=-2, high=4)


def test_a_step_without_successor_is_kept_and_marked():
    data = without_successors()
    np.testing.assert_array_equal(data.obs, analytic().obs)
    np.testing.assert_array_equal(data.action, analytic().action)
    np.testing.assert_array_equal(data.end, analytic().end)
    np.testing.assert_array_equal(np.flatnonzero(~data.known), [2, 7])
    np.testing.assert_array_equal(data.next_obs[data.known & ~data.terminated, 0], [1, 2, 21, 22, 23])
    (note,) = data.notes
    assert note == "2 steps have no recorded successor: imitation uses them, what learns values does not"


def test_what_learns_values_gets_the_rows_with_a_successor():
    data = without_successors().with_successor()
    np.testing.assert_array_equal(data.obs[:, 0], [0, 1, 10, 20, 21, 22])
    np.testing.assert_array_equal(np.flatnonzero(data.end), [1, 2, 5])
    assert data.terminated.tolist() == [False, False, True, False, False, False] and data.known.all()
    np.testing.assert_array_equal(data.next_obs[~data.terminated, 0], [1, 2, 21, 22, 23])
    inner = build(changed(known=np.arange(8) != 5), name="hole").with_successor()
    np.testing.assert_array_equal(np.flatnonzero(inner.end), [2, 3, 4, 6])
    alone = {"obs": np.zeros((1, 2)), "action": np.zeros((1, 1)), "reward": [0.0], "terminated": [False]}
    with pytest.raises(UserError, match="records no successor of any step: imitate it"):
        join([alone, alone], name="single").with_successor()


def test_the_last_action_of_a_demonstration_is_imitated():
    """60 demonstrations of five steps that close the gripper at the last; nothing says what comes after it."""
    t = np.tile(np.arange(5.0), 60)
    arrays = {"obs": t, "action": np.where(t == 4, 1.0, -1.0), "terminated": np.zeros(300), "truncated": t == 4}
    data = from_arrays(arrays)
    assert len(data) == 300 and (data.action[:, 0] == 1).sum() == 60
    rows = Rows.of(data, successor=False)
    batch = Chunk(2, 1.0)(rows, jr.key(0), 500)
    np.testing.assert_array_equal(batch.action[:, 0], np.where(batch.obs[:, 0] == 4, 1, -1))
    assert set(np.unique(batch.obs)) == {0, 1, 2, 3, 4}
    assert set(np.unique(Uniform(0.9)(Rows.of(data), jr.key(0), 500).next_obs)) == {1, 2, 3, 4}


def test_a_file_that_is_cut_off_invents_no_successor():
    arrays = {key: value[:6] for key, value in flat("next_obs", "low", "high").items()}
    data = from_arrays(arrays)
    assert data.end[-1] and not data.known[-1] and "the last trajectory is cut off" in data.notes[0]


# bounds of actions


def test_bounds_that_are_not_stated():
    data = analytic(low=None, high=None)
    assert (data.low[0], data.high[0]) == (-2, 4) and data.notes == (GUESSED,) and not data.stated
    still = [part | {"action": np.full((len(part["action"]), 1), 7.0)} for part in trajectories()]
    data = join(still, name="still")
    np.testing.assert_array_equal(data.action, 0)
    np.testing.assert_array_equal(data.raw_action, 7)
    for none in (np.inf, 3.4028235e38):
        data = analytic(low=-none, high=none)
        assert (data.low[0], data.high[0]) == (-2, 4) and not data.stated


def test_one_bound_that_is_stated_counts():
    data = analytic(low=-5, high=None)
    assert (data.low[0], data.high[0]) == (-5, 4) and not data.stated
    with pytest.raises(UserError, match=r"column 0 of action is -2 in row 0, outside \[-1, 4\]"):
        analytic(low=-1, high=())
    with pytest.raises(UserError, match=r"column 0 of action is -2 in row 0, outside \[-4, -3\]"):
        analytic(high=-3, low=None)


def test_actions_outside_the_bounds():
    remedy = r"their bounds: state the true ones \(--low, --high\), or clip the actions \(--clip\)"
    with pytest.raises(UserError, match=rf"column 0 of action is -2 in row 0, outside \[-1, 4\], {remedy}"):
        analytic(low=-1)
    data = analytic(low=-1, clip=True)
    assert data.action.min() == -1 and data.notes[0].startswith("25.0% of the actions lay outside")
    assert analytic(low=-2 + 1e-5).notes == (), "rounding is nobody's mistake"


def spec(low: float, high: float, *, obs: int = 2, action: int = 1, **more) -> EnvSpec:
    return EnvSpec(obs, action, 4, None, True, low=(low,), high=(high,), **more)


@pytest.mark.parametrize("stated", [(-2, 4), (-8, 8), (None, None)])
def test_actions_are_converted_to_the_range_of_the_environment(stated):
    """Whatever the data state, the environment proper gets the recorded action."""
    low, high = stated
    data = analytic(low=low, high=high).check(spec(-3, 5), "there")
    np.testing.assert_allclose(data.raw_action[:, 0], np.linspace(-2, 4, 8), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(data.action[:, 0], (np.linspace(-2, 4, 8) - 1) / 4, rtol=1e-6, atol=1e-6)
    assert (data.low[0], data.high[0], data.stated) == (-3, 5, True)
    was = "are stated in [{}, {}]".format(*stated) if low else "have no stated bounds"
    assert data.notes == (f"actions {was}: the range of there is taken, [-3, 5]",)
    chunk = spec(-3, 5, action=5, horizon=5)
    np.testing.assert_array_equal(analytic(low=low, high=high).check(chunk).action, data.action)


def test_the_range_of_the_environment_itself():
    data = analytic()
    assert data.check(spec(-2 + 1e-7, 4)) is data
    unit = join([part | {"action": part["action"] / 4} for part in trajectories()], name="unit")
    assert unit.check(EnvSpec(2, 1, 4, None, True)).low[0] == -1, "an environment without a range has [-1, 1]"


@pytest.mark.parametrize("stated", [(-2, 4), (None, None)])
def test_actions_that_the_environment_cannot_carry_out(stated):
    low, high = stated
    data = analytic(low=low, high=high, env="gym:Known-v0")
    with pytest.raises(UserError) as refused:
        data.check(spec(-2, 2), "there")
    wanted = "is 2.28571 in row 5, outside [-2, 2], the range of there: choose the environment that it was recorded in"
    assert f"{wanted} (gym:Known-v0), or clip the actions (--clip)" in str(refused.value)
    assert data.check(spec(-2, 2), clip=True).raw_action.max() == 2
    assert data.check(spec(-2, 4 - 1e-5)).raw_action.max() == pytest.approx(4, rel=1e-5), "rounding is no mistake"


def test_a_policy_and_an_environment_of_other_ranges():
    check_fit(spec(-1, 1), spec(-1 - 1e-6, 1), "it", "there")
    check_fit(spec(-1, 1, action=1), EnvSpec(2, 3, 4, None, True, horizon=3), "it", "there")
    with pytest.raises(UserError, match=r"it was trained for actions in \[-1, 1\], there takes \[-2, 2\]: choose an"):
        check_fit(spec(-1, 1), spec(-2, 2), "it", "there")


@pytest.mark.parametrize("sizes", [(3, 1), (2, 2)])
def test_an_environment_of_other_sizes(sizes: tuple[int, int]):
    spec = EnvSpec(*sizes, 4, None, True)
    with pytest.raises(UserError, match=f"known has 2 observations and 1 actions, there has {sizes[0]} and {sizes[1]}"):
        analytic().check(spec, "there")


def test_the_digest_changes_with_any_number():
    data, seen = analytic(), {analytic().digest()}
    assert seen == {analytic(notes=["said"]).digest()}
    for key in ("obs", "action", "reward", "next_obs", "terminated", "end", "known", "low", "high"):
        array = getattr(data, key).copy()
        array.flat[0] = not array.flat[0] if array.dtype == bool else array.flat[0] + 1e-3
        seen.add(replace(data, **{key: array}).digest())
    assert len(seen) == 10
    short = {key: value[:4] for key, value in flat("low", "high").items()}
    assert build(short, name="short").digest() not in seen


@pytest.mark.parametrize(("offset", "said"), [(1e9, True), (1e3, False)])
@pytest.mark.parametrize("kind", [np.float64, np.int64])
def test_numbers_that_single_precision_cannot_tell_apart(offset: float, said: bool, kind: type):
    obs = (analytic().obs * [1, 0] + offset + 0.1).astype(kind)  # the second column is constant: nothing is lost
    notes = build(changed(obs=obs), name="far", low=-2, high=4).notes
    wanted = "float32 rounds obs, column 0 by more than 1% of what it varies: subtract a mean"
    assert notes == ((wanted,) if said else ())


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
    assert dict(summary(analytic(low=None, high=None)))["bounds"] == "[-2, 4] (not stated: the range of the data)"
