"""Aggregates over runs and tasks, with stratified bootstrap intervals (Agarwal et al. 2021, arXiv 2108.13264).

Scores are [runs, tasks]. A resample draws runs with replacement, separately for each task. The definitions are those of
rliable, which the tests compare them with. rliable itself is not used: its bootstrap (1.2.0) draws from NumPy's global
generator whatever its seed, so intervals would depend on the order of the agents.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

REPS = 5_000
LEVEL = 0.95
TASKS = (1, 2, 4, 8)
COVERAGE = {2: (48, 66, 73, 81), 3: (74, 85, 86, 89), 5: (91, 90, 93, 92), 10: (94, 94, 93, 93), 20: (94, 94, 95, 94)}
"""Measured coverage, in percent, of the interval of an IQM, by runs and number of `TASKS`, from 1500 experiments each
with Gaussian scores (a standard error of about one). rliable's intervals are the same."""
Scores = NDArray[np.float64]


def coverage() -> list[list[str]]:
    """Returns `COVERAGE` as rows of text."""
    return [[str(runs), *map(str, shares)] for runs, shares in COVERAGE.items()]


@dataclass(frozen=True)
class Estimate:
    """A number, or an array of numbers, with its interval (95 % by default; nan for a single run)."""

    value: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def iqm(scores: Scores) -> NDArray[np.float64]:
    """Returns the interquartile mean, over the middle half of all runs and tasks. [..., runs, tasks] -> [...]."""
    flat = np.sort(scores.reshape(*scores.shape[:-2], -1), axis=-1)
    cut = flat.shape[-1] // 4
    return np.asarray(flat[..., cut : flat.shape[-1] - cut].mean(-1))


def profile(scores: Scores, levels: Scores) -> NDArray[np.float64]:
    """Returns the share of runs with a score above each level. [..., runs, tasks], [n] -> [..., n]."""
    return np.stack([(scores > level).mean((-2, -1)) for level in levels], axis=-1)


def improvement(x: Scores, y: Scores) -> NDArray[np.float64]:
    """Returns P(a run of X beats one of Y), ties half, averaged over tasks. [..., runs, tasks] each -> [...]."""
    a, b = x[..., :, None, :], y[..., None, :, :]
    return np.asarray(((a > b) + 0.5 * (a == b)).mean((-3, -2, -1)))


def iqm_difference(x: Scores, y: Scores) -> NDArray[np.float64]:
    """Returns the IQM of X minus the IQM of Y."""
    return np.asarray(iqm(x) - iqm(y))


def estimate(statistic: Callable[..., Any], *samples: Scores, reps: int = REPS, level: float = LEVEL) -> Estimate:
    """Returns the statistic of the samples [runs, tasks] with its percentile interval at `level` in (0, 1).

    Each sample is resampled separately, `reps` times. The draws depend only on the shapes, so neither the order nor the
    choice of the other agents changes an interval. Source: 2108.13264.
    """
    value = np.asarray(statistic(*samples))
    if min(len(sample) for sample in samples) < 2:
        return Estimate(value, np.full_like(value, np.nan), np.full_like(value, np.nan))
    rng = np.random.default_rng([len(samples), *(n for sample in samples for n in sample.shape)])
    draws = []
    for _ in range(-(-reps // 500)):  # in batches, to bound the memory
        rows = [rng.integers(len(sample), size=(500, *sample.shape)) for sample in samples]
        draws.append(statistic(*(np.take_along_axis(x[None], r, axis=1) for x, r in zip(samples, rows, strict=True))))
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(draws)[:reps], (tail, 1 - tail), axis=0)
    return Estimate(value, np.asarray(low), np.asarray(high))
