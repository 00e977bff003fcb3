"""Chunks carried out one action at a time, in time and over episodes."""

import numpy as np
import pytest

from contraflow.core.types import EnvSpec, UserError
from contraflow.runtime.policy import Policy
from contraflow.runtime.receding import Receding

HORIZON = 4


class Counting(Policy):
    """Plans obs + 0, 1, 2, 3 (times 10 in the second coordinate), and remembers how often it was asked."""

    def __init__(self):
        self.spec, self.calls = EnvSpec(1, 2 * HORIZON, 3, 100, False, HORIZON, 2), 0

    def __call__(self, obs, explore=False):
        self.calls += 1
        steps = np.asarray(obs) + np.arange(HORIZON)[None]
        return np.stack([steps, 10 * steps], -1).astype(np.float32)


def obs(*values):
    return np.array(values, np.float32)[:, None]


def test_two_of_four_are_carried_out():
    policy = Counting()
    act = Receding(policy, 3)
    got = [act(obs(100 * t, 0, -t)) for t in range(5)]
    assert policy.calls == 3
    np.testing.assert_array_equal([a[0, 0] for a in got], [0, 1, 200, 201, 400])
    np.testing.assert_array_equal([a[2, 1] for a in got], [0, 10, -20, -10, -40])


def test_an_episode_of_one_copy_starts_anew():
    policy = Counting()
    act = Receding(policy, 2)
    act(obs(0, 0))
    act.reset(np.array([False, True]))
    second = act(obs(50, 50))
    np.testing.assert_array_equal(second[:, 0], [1, 50])
    third = act(obs(70, 70))
    np.testing.assert_array_equal(third[:, 0], [70, 51])


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_ensembling_is_the_weighted_mean_of_all_plans(decay: float):
    """Step t was planned at t - 3 ... t; the oldest plan weighs most."""
    act = Receding(Counting(), 1, ensemble=decay)
    starts = np.array([0.0, 5.0, -3.0, 2.0, 8.0, 1.0])
    for t, start in enumerate(starts):
        got = act(obs(start))[0, 0]
        made = np.arange(max(0, t - HORIZON + 1), t + 1)
        weight = np.exp(-decay * np.arange(len(made)))
        np.testing.assert_allclose(got, np.sum(weight * (starts[made] + t - made)) / weight.sum(), rtol=1e-6)


def test_bad_use():
    with pytest.raises(UserError, match="execute 1 to 4"):
        Receding(Counting(), execute=5)
    with pytest.raises(UserError, match="3 copies"):
        Receding(Counting(), 3)(obs(1))
