"""The weights of composed policies, found by evaluation (GPC, 2510.01068): a grid, or successive halving (1502.07943).

The best of several estimates is too good on average. The winner is therefore played again on fresh episodes, beside
each policy alone on the same ones, and only these scores are to be reported.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from contraflow.core.types import UserError
from contraflow.training.evaluate import margin

Weights = tuple[float, ...]
Play = Callable[[Weights, int, int], Float[np.ndarray, " n"]]
"""(weights, episodes, seed) -> a score for each episode, such as success or return. The same seed is the same episodes
for all weights."""


class Score(NamedTuple):
    """A mean over episodes, and half of its 95 % interval."""

    mean: float
    half: float
    episodes: int

    @classmethod
    def of(cls, scores: Float[np.ndarray, " n"]) -> "Score":
        """By Student's t; for successes and failures by Wilson's interval, which is not empty if all are alike."""
        n, mean = len(scores), float(scores.mean())
        if np.isin(scores, (0.0, 1.0)).all():
            z = 1.959964
            return cls(mean, float(z * np.sqrt(mean * (1 - mean) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)), n)
        return cls(mean, margin(scores), n)


class Found(NamedTuple):
    """The outcome of a search. Only `fresh` and `alone` are unbiased."""

    weights: Weights
    tried: dict[Weights, Score]
    """The search's own score of each candidate, over all episodes that it has played."""
    fresh: Score
    """That of the winner on fresh episodes."""
    alone: tuple[Score, ...]
    """Those of each policy alone, on the same fresh episodes."""
    gain: Score
    """Differences of the winner from the best policy alone, episode by episode."""


def grid(policies: int, steps: int = 10) -> list[Weights]:
    """Returns all weights that are multiples of 1 / steps and add up to 1; for two policies from (0, 1) to (1, 0)."""
    counts = itertools.product(range(steps + 1), repeat=policies)
    return [tuple(k / steps for k in each) for each in counts if sum(each) == steps]


def search_weights(
    play: Play,
    candidates: Sequence[Weights],
    episodes: int = 200,
    fresh: int = 400,
    halving: bool = False,
    seed: int = 0,
) -> Found:
    """Returns the candidate with the highest mean score, with its score on fresh episodes.

    A grid plays `episodes` with each candidate. Halving spends a round's `episodes / rounds` times all candidates on
    those left, and keeps the better half after each: in the end the last few have played more, at the same total cost.
    Candidates have episodes in common, and `fresh` episodes begin from seeds that no round used.

    Raises UserError for no candidates, and fewer episodes than two, or two for each round of halving.
    """
    if not candidates:
        raise UserError("a search needs candidate weights")
    rounds = max(1, int(np.ceil(np.log2(len(candidates))))) if halving else 1
    each = episodes // rounds
    if min(each, fresh) < 2:
        raise UserError(f"{episodes} episodes are too few for {rounds} rounds: give at least {2 * rounds}, and 2 fresh")
    played: dict[Weights, list[np.ndarray]] = {w: [] for w in candidates}
    left = list(candidates)
    for i in range(rounds):
        n = each * len(candidates) // len(left)
        for w in left:
            played[w].append(np.asarray(play(w, n, seed + i), float))
        ranked = sorted(left, key=lambda w: -np.concatenate(played[w]).mean())
        left = ranked[: -(-len(ranked) // 2)] if i + 1 < rounds else ranked[:1]
    tried = {w: Score.of(np.concatenate(scores)) for w, scores in played.items()}
    winner, size = left[0], len(left[0])
    units = [tuple(float(i == k) for i in range(size)) for k in range(size)]
    last = {w: np.asarray(play(w, fresh, seed + rounds), float) for w in dict.fromkeys([winner, *units])}
    best = max((last[unit] for unit in units), key=lambda scores: scores.mean())
    alone = tuple(Score.of(last[unit]) for unit in units)
    return Found(winner, tried, Score.of(last[winner]), alone, _difference(last[winner], best))


def _difference(one: np.ndarray, other: np.ndarray) -> Score:
    gap = one - other
    return Score(float(gap.mean()), margin(gap) if gap.std() > 0 else 0.0, len(gap))
