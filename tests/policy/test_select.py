"""Selectors against their stated probabilities, temperature schedules, settings that are refused."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import special, stats

from contraflow.policy.best_of import Argmax, First, Softmax
from contraflow.rl.temperature import Anneal, Constant

SCORE = jnp.array([0.3, -1.0, 1.2, 0.0])


def counts(selector, score, n=4000):
    picks = jax.vmap(lambda k: selector(k, score))(jr.split(jr.key(0), n))
    return np.bincount(np.asarray(picks), minlength=score.shape[0])


def test_softmax_has_softmax_probabilities():
    want = special.softmax(np.asarray(SCORE, float))
    assert stats.chisquare(counts(Softmax(4), SCORE), 4000 * want).pvalue > 1e-3
    # The same scores a thousand times larger: a choice of the best, without overflow.
    np.testing.assert_array_equal(counts(Softmax(4), 1000.0 * SCORE), [0, 0, 4000, 0])


def test_argmax_and_first():
    np.testing.assert_array_equal(counts(Argmax(4), SCORE, 8), [0, 0, 8, 0])
    np.testing.assert_array_equal(counts(First(), SCORE, 8), [8, 0, 0, 0])
    assert First().particles == 1


@pytest.mark.parametrize("kind", [Softmax, Argmax])
def test_a_selector_needs_a_particle(kind):
    with pytest.raises(ValueError, match="at least one"):
        kind(0)


def test_temperatures():
    steps, lam, entropy = jnp.arange(0, 401, 100), jnp.asarray(7.0), jnp.zeros(())
    assert Constant(0.3).following(lam, steps[1], entropy) == 7.0 and Constant(0.3).first() == jnp.float32(0.3)
    got = jax.vmap(lambda n: Anneal(0.1, 0.001, 200).following(lam, n, entropy))(steps)
    np.testing.assert_allclose(got, [0.1, 0.01, 0.001, 0.001, 0.001], rtol=1e-5)
    np.testing.assert_allclose(Anneal(0.1, 0.001, 200).first(), got[0], rtol=1e-6)


@pytest.mark.parametrize("make", [lambda: Constant(0.0), lambda: Anneal(0.1, 0.0), lambda: Anneal(steps=0)])
def test_temperatures_are_positive(make):
    with pytest.raises(ValueError, match="positive"):
        make()
