"""Aggregates against hand computation, against rliable, and against what their intervals promise."""

import warnings

import numpy as np
import pytest

from contraflow.experiments.report.statistics import (
    COVERAGE,
    TASKS,
    estimate,
    improvement,
    iqm,
    iqm_difference,
    profile,
)

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(5, 4)), RNG.normal(0.5, size=(3, 4))


def column(*values: float) -> np.ndarray:
    return np.array(values, float)[:, None]


def test_the_interquartile_mean_is_that_of_the_middle_half():
    assert iqm(column(0, 1, 2, 3, 4, 5, 6, 100)) == 3.5
    assert iqm(column(1, 2, 3)) == 2.0, "of fewer than four nothing is cut"
    assert iqm(np.array([[100.0, 0, 3, 4], [-50, 2, 5, 9]])) == 3.5, "over runs and tasks together"
    assert iqm(np.stack([X, Y[[0, 1, 2, 0, 1]]])).shape == (2,)


def test_the_probability_of_improvement():
    assert improvement(X, X) == 0.5, "of equals"
    assert improvement(X + 100, X) == 1.0 and improvement(X - 100, X) == 0.0
    assert improvement(column(1, 2), column(0, 3)) == 0.5
    assert improvement(column(1, 2, 4), column(0, 3)) == pytest.approx(4 / 6)
    assert improvement(column(1, 1), column(1, 0)) == 0.75, "ties count half"
    assert improvement(np.array([[1.0, 0]]), np.array([[0.0, 1]])) == 0.5, "the mean over tasks"


def test_profiles():
    assert profile(column(0, 1, 2, 3), np.array([-1.0, 0.5, 1.0, 3.0])).tolist() == [1, 0.75, 0.5, 0]


def test_the_same_as_rliable():
    """Its intervals are drawn by NumPy's global generator: agreement within the noise of 5 000 resamples."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library, metrics = pytest.importorskip("rliable.library"), pytest.importorskip("rliable.metrics")
        assert iqm(X) == pytest.approx(metrics.aggregate_iqm(X))
        assert improvement(X, Y) == pytest.approx(metrics.probability_of_improvement(X, Y))
        levels = np.linspace(-2, 2, 41)
        assert np.allclose(profile(X, levels), library.score_distributions(X, levels))
        _, theirs = library.get_interval_estimates({"x": X}, lambda s: np.array([metrics.aggregate_iqm(s)]), reps=4_000)
        pair = {"xy": [X, Y]}
        _, gap = library.get_interval_estimates(pair, lambda a, b: np.array([iqm_difference(a, b)]), reps=4_000)
    for ours, other in ((estimate(iqm, X), theirs["x"]), (estimate(iqm_difference, X, Y), gap["xy"])):
        assert np.allclose([ours.low, ours.high], other[:, 0], atol=0.06 * float(other[1, 0] - other[0, 0]))


@pytest.mark.parametrize("runs", [3, 10])
def test_intervals_cover_as_often_as_the_page_says(runs: int):
    """300 experiments on 2 tasks whose true IQM is 0, within four standard errors."""
    rng = np.random.default_rng(1)
    intervals = [estimate(iqm, rng.normal(size=(runs, 2)), reps=1_000) for _ in range(300)]
    covered = np.mean([e.low <= 0 <= e.high for e in intervals])
    wanted = COVERAGE[runs][TASKS.index(2)] / 100
    assert abs(covered - wanted) < 4 * (wanted * (1 - wanted) / 300) ** 0.5
    assert COVERAGE[3][1] < 90, "the more so with few"


def test_a_mean_of_many_has_the_interval_of_a_gaussian():
    scores = np.random.default_rng(2).normal(size=(4000, 1))
    for level, z in ((0.5, 0.674), (0.95, 1.96), (0.99, 2.576)):
        e = estimate(lambda s: s.mean((-2, -1)), scores, level=level)
        half = z * scores.std() / len(scores) ** 0.5
        np.testing.assert_allclose([e.low, e.high], [e.value - half, e.value + half], atol=0.1 * half)


def test_tasks_are_strata():
    """Without spread within a task there is nothing to resample, however much the tasks differ; and the runs of one
    are drawn apart from those of another: drawn together, tasks that mirror each other would leave no spread."""
    scores = np.tile(np.array([0.0, 1.0, 5.0, 9.0]), (6, 1))
    e = estimate(lambda s: s.mean((-2, -1)), scores)
    assert e.low == e.high == e.value == 3.75
    mirrored = estimate(lambda s: s.mean((-2, -1)), np.stack([np.arange(6.0), -np.arange(6.0)], 1))
    assert mirrored.value == 0 and mirrored.low < -0.5 and mirrored.high > 0.5


def test_one_run_has_no_interval():
    e = estimate(iqm, X[:1])
    assert e.value == iqm(X[:1]) and np.isnan(e.low) and np.isnan(e.high)
    assert np.isnan(estimate(improvement, X, Y[:1]).low)


def test_neither_order_nor_company_changes_an_interval():
    alone = estimate(iqm, X)
    np.random.seed(5)  # noqa: NPY002 - whatever others do to the global generator
    estimate(iqm, Y)
    assert estimate(iqm, X) == alone
    assert estimate(iqm, X[::-1]).value == alone.value


def test_the_two_sides_are_resampled_apart():
    """Resampled together, the difference of a sample to itself would be 0 in every draw."""
    e = estimate(iqm_difference, X, X)
    assert e.value == 0 and e.low < -0.2 and e.high > 0.2
