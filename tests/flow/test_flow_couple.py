"""Couplings: what they keep, what they shorten, and the bias of weights."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np

from contraflow.flow.coupling import Assigned, Independent, Weighted


def batch(n: int = 40):
    return jr.normal(jr.key(0), (n, 2)), 2 + jr.normal(jr.key(1), (n, 2))


def test_assignment_is_the_best_permutation():
    x0, x1 = batch(6)
    new, weight = Assigned()(x0, x1, jnp.zeros((6, 1)))
    from itertools import permutations

    costs = [float(jnp.sum((x0[jnp.array(p)] - x1) ** 2)) for p in permutations(range(6))]
    np.testing.assert_allclose(jnp.sum((new - x1) ** 2), min(costs), rtol=1e-5)
    assert (weight == 1).all()


def test_assignment_stays_within_a_condition():
    x0, x1 = batch()
    group = jnp.arange(40)[:, None] % 3
    new, _ = Assigned()(x0, x1, group.astype(jnp.float32))
    for g in range(3):
        rows = group[:, 0] == g
        np.testing.assert_allclose(np.sort(new[rows], 0), np.sort(x0[rows], 0))
        assert jnp.sum((new[rows] - x1[rows]) ** 2) < jnp.sum((x0[rows] - x1[rows]) ** 2)
    alone, _ = Assigned()(x0, x1, jnp.arange(40.0)[:, None])
    np.testing.assert_array_equal(alone, x0)
    assert Independent()(x0, x1, x1)[0] is x0


def test_weights_shrink_a_gaussian_as_derived():
    """With |x0 - x1|^2 / eps in place of the norm, pairs of N(0, 1) and N(2, .5^2) at eps = 4 have E[x1] = 1.8462; the
    norm pulls the same way, and less as eps grows."""
    x0, x1 = jr.normal(jr.key(0), (200_000, 1)), 2 + 0.5 * jr.normal(jr.key(1), (200_000, 1))
    square = jnp.exp(-((x0 - x1)[:, 0] ** 2) / 4)
    np.testing.assert_allclose(jnp.sum(square * x1[:, 0]) / square.sum(), 1.8462, atol=0.005)
    means = []
    for eps in (0.5, 2.0, 20.0):
        _, weight = Weighted(eps)(x0, x1, x1)
        np.testing.assert_allclose(weight.mean(), 1.0, rtol=1e-4)
        means.append(float(jnp.mean(weight * x1[:, 0])))
    assert means[0] < means[1] < means[2] < 2.0 and means[2] > 1.98
