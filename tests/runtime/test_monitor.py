"""Monitors: entropies with closed forms, coverage of thresholds, and a policy that is watched end to end."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from contraflow.core.types import EnvSpec, UserError
from contraflow.envs import make
from contraflow.policy.artifact import save_policy
from contraflow.runtime.monitor import (
    Monitor,
    Novelty,
    alarms,
    calibrate,
    chunk_entropy,
    load_watch,
    order_statistic,
    trace,
    window_sums,
)


def test_entropy_counts_full_cells():
    """0 bits in one cell, log2 k in k cells that are equally full, 1 bit for two tight modes however far apart."""
    cell = jnp.array([0.1, 0.1])
    assert float(chunk_entropy(jnp.full((8, 3, 2), 0.3), cell)) == 0
    for k in (2, 4, 8):
        spread = jnp.repeat(jnp.arange(k) * 0.25, 8 // k)[:, None, None] * jnp.ones((1, 3, 2))
        np.testing.assert_allclose(chunk_entropy(spread, cell), math.log2(k), rtol=1e-6)
    for far in (0.5, 1.9):
        modes = jnp.where(jnp.arange(8)[:, None, None] < 4, 0.0, far) * jnp.ones((1, 3, 2))
        np.testing.assert_allclose(chunk_entropy(modes, cell), 1.0, rtol=1e-6)
    scattered = jr.uniform(jr.key(0), (8, 3, 2), minval=-1.0)
    assert float(chunk_entropy(scattered, cell)) <= 3.0 + 1e-6


def test_windows_sum_the_last_scores():
    scores = np.arange(1.0, 7.0)[:, None]
    np.testing.assert_allclose(window_sums(scores, 3)[:, 0], [1, 3, 6, 9, 12, 15])
    np.testing.assert_allclose(window_sums(scores, 9)[:, 0], np.cumsum(scores))


@pytest.mark.parametrize("m", [9, 10, 25])
def test_the_order_statistic_covers(m):
    """The false-alarm rate is floor((M + 1) delta) / (M + 1) for continuous scores, within four standard errors."""
    rng, n, delta = np.random.default_rng(m), 20_000, 0.1
    scores = rng.exponential(size=(n, m + 1))
    rate = np.mean([row[-1] > order_statistic(row[:-1], delta) for row in scores])
    right = math.floor((m + 1) * delta + 1e-9) / (m + 1)
    assert abs(rate - right) < 4 * math.sqrt(right / n) and rate < delta + 4 * math.sqrt(delta / n)
    assert order_statistic(np.ones(8), 0.1) == math.inf  # nine are needed


def band(curves, delta):
    """Returns the upper bound [T] of a functional conformal band: a new curve leaves it with probability at most delta.

    The first half of the curves gives the mean and the modulation c_t, the largest deviation of those that stay within
    their (1 - delta) quantile. The other half gives the width, an order statistic of max_t (y_t - mean_t) / c_t. Public
    copies of the released code take mean - y here, which bounds the wrong side.
    """
    first, second = curves[::2], curves[1::2]
    mean = first.mean(0)
    deviation = np.abs(first - mean)
    inside = deviation.max(1) <= np.quantile(deviation.max(1), 1 - delta)
    scale = deviation[inside].max(0) + 1e-6
    return mean + scale * order_statistic(((second - mean) / scale).max(1), delta)


def test_the_band_bounds_the_upper_side():
    """Of skewed curves at most a share delta leave it. The sign of the public copies, mean - y, gives far more."""
    rng, n, delta = np.random.default_rng(0), 400, 0.1

    def wrong(curves):
        first, second = curves[::2], curves[1::2]
        mean = first.mean(0)
        deviation = np.abs(first - mean)
        scale = deviation[deviation.max(1) <= np.quantile(deviation.max(1), 1 - delta)].max(0) + 1e-6
        return mean + scale * np.quantile(((mean - second) / scale).max(1), 1 - delta)

    rates = {"right": [], "wrong": []}
    for _ in range(n):
        curves = rng.exponential(size=(51, 20))
        new = rng.exponential(size=20)
        rates["right"].append((new > band(curves, delta)).any())
        rates["wrong"].append((new > wrong(curves)).any())
    assert np.mean(rates["right"]) < delta + 4 * math.sqrt(delta * (1 - delta) / n)
    assert np.mean(rates["wrong"]) > 0.5


def test_novelty_is_small_where_it_was_fitted():
    obs = jr.normal(jr.key(0), (2000, 3))
    novelty = jax.vmap(Novelty.fit(obs, jr.key(1), steps=1500))
    usual, far = novelty(jr.normal(jr.key(2), (500, 3))), novelty(4.0 + jr.normal(jr.key(3), (500, 3)))
    assert float(jnp.median(far)) > 5 * float(jnp.median(usual))


class Wavering(eqx.Module):
    """Acts by the observation, undecided far from the origin."""

    size: int = eqx.field(static=True, default=1)

    def __call__(self, obs, key, greedy=True):
        noise = jr.normal(key, (self.size,)) * jnp.where(jnp.abs(obs).max() > 0.9, 1.0, 0.005)
        return jnp.clip(obs[: self.size] * 0.1 + noise, -1.0, 1.0)


undecided = Wavering()


def episodes(shift, n, seed, length=12):
    """n episodes of an environment that shows uniform numbers in [-.6, .6], plus a shift from the middle on."""

    class World:
        spec = EnvSpec(2, 1, n, length, True)

        def reset(self, key):
            obs = jr.uniform(key, (n, 2), minval=-0.6, maxval=0.6)
            return (key, jnp.zeros((), int)), obs

        def step(self, state, action):
            from contraflow.core.types import Step

            key, age = state
            age = age + 1
            key = jr.fold_in(key, age)
            obs = jr.uniform(key, (n, 2), minval=-0.6, maxval=0.6) + jnp.where(age >= length // 2, shift, 0.0)
            end = jnp.full(n, age >= length)
            return (key, age), Step(obs, obs, jnp.ones(n), ~end & end, end, end | ~end)

    return trace(undecided, World.spec, World(), jr.key(seed), draws=16)


def test_a_watch_keeps_its_rate_and_sees_a_shift():
    watch = calibrate(episodes(0.0, 60, 0), 2, jr.key(1), delta=0.1, window=3)
    false, _ = alarms(watch, episodes(0.0, 300, 2))
    assert false.mean() < 0.1 + 4 * math.sqrt(0.09 / 300) + 0.1  # the threshold itself comes from 30 episodes
    seen, when = alarms(watch, episodes(1.0, 100, 3))
    assert seen.mean() > 0.95 and np.mean(when >= 6) > 0.8  # before it happens, alarms are false ones


def test_a_monitor_agrees_with_the_recorded_alarms():
    watch = calibrate(episodes(0.0, 60, 0), 2, jr.key(1), delta=0.1, window=3)
    monitor, shifted = Monitor(watch, undecided), episodes(1.0, 1, 5)
    first = [monitor(obs[0]).alarm for obs in shifted.obs]
    assert first.index(True) >= 6
    monitor.reset()
    assert not monitor(jnp.zeros(2)).alarm


def test_too_few_episodes_are_refused():
    with pytest.raises(UserError, match="need 18 good episodes, there are 10"):
        calibrate(episodes(0.0, 10, 0), 2, jr.key(0), delta=0.1)
    with pytest.raises(UserError, match="vectors"):
        calibrate(episodes(0.0, 30, 0), (), jr.key(0))


def test_an_environment_is_traced_to_the_end_of_each_episode():
    env = make("jax:multi-goal", 4)
    found = trace(Wavering(2), env.spec, env, jr.key(0), draws=2)
    assert found.running[0].all() and found.obs.shape[:2] == found.running.shape
    assert len(found.obs) <= env.spec.episode_length


def test_a_watch_is_read_back(tmp_path):
    """The scores of the copy are those of the original, bit for bit."""
    watch = calibrate(episodes(0.0, 60, 0), 2, jr.key(1), delta=0.1, window=3)
    save_policy(tmp_path / "monitor", watch, EnvSpec(2, 1, 1, None, False), "probe:action")
    one, two = (Monitor(w, undecided)(jnp.ones(2)) for w in (watch, load_watch(tmp_path)))
    assert one == two
    with pytest.raises(UserError, match="run `contraflow monitor"):
        load_watch(tmp_path / "monitor")
