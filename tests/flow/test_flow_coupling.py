"""Couplings: what they keep, what they shorten, and the bias of weights and of noise that crosses conditions."""

from itertools import permutations

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.closeness import assert_close

from contraflow.flow.coupling import ConditionalOT, Independent, Weighted


def batch(n: int = 40):
    return jr.normal(jr.key(0), (n, 2)), 2 + jr.normal(jr.key(1), (n, 2))


def continuous(key, n: int = 64):
    """Noise, actions near sin 2c, and conditions c, all rows different."""
    k_x0, k_x1, k_c = jr.split(key, 3)
    cond = jr.normal(k_c, (n, 1))
    return jr.normal(k_x0, (n, 2)), jnp.sin(2 * cond) + 0.3 * jr.normal(k_x1, (n, 2)), cond


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_the_best_permutation_by_brute_force(weight):
    x0, x1, cond = continuous(jr.key(2), 6)
    new, ones = ConditionalOT(weight)(x0, x1, cond)
    orders = [jnp.array(p) for p in permutations(range(6))]
    costs = [float(jnp.sum((x0[p] - x1) ** 2) + weight * jnp.sum((cond[p] - cond) ** 2)) for p in orders]
    assert_close(new, x0[orders[int(np.argmin(costs))]], 1e-6)
    assert (ones == 1).all()


def test_without_weight_the_condition_does_not_matter():
    x0, x1, cond = continuous(jr.key(3))
    free = ConditionalOT(0.0)(x0, x1, cond)[0]
    np.testing.assert_array_equal(free, ConditionalOT(0.0)(x0, x1, jnp.zeros_like(cond))[0])
    assert jnp.sum((free - x1) ** 2) < 0.5 * jnp.sum((x0 - x1) ** 2)


def test_under_a_large_weight_pairs_stay_with_their_condition():
    x0, x1, cond = continuous(jr.key(3))
    np.testing.assert_array_equal(ConditionalOT(1e6)(x0, x1, cond)[0], x0)
    assert Independent()(x0, x1, cond)[0] is x0
    x0, x1 = batch()
    group = jnp.arange(40)[:, None] % 3
    new, _ = ConditionalOT(1e4)(x0, x1, group.astype(jnp.float32))
    for g in range(3):  # rows of one condition are still paired for the best
        rows = group[:, 0] == g
        np.testing.assert_array_equal(np.sort(new[rows], 0), np.sort(x0[rows], 0))
        assert jnp.sum((new[rows] - x1[rows]) ** 2) < jnp.sum((x0[rows] - x1[rows]) ** 2)


def test_continuous_conditions_gain_length_for_a_bias_that_the_weight_bounds():
    """No two rows have one condition: `weight` trades |x1 - x0| for the share of x0 that the condition tells."""

    def measure(key, weight):
        x0, x1, cond = continuous(key)
        new, _ = ConditionalOT(weight)(x0, x1, cond)
        moved = jnp.mean(jnp.any(new != x0, 1))
        told = jnp.mean(new * jnp.sin(2 * cond)) / jnp.sqrt(jnp.mean(jnp.sin(2 * cond) ** 2))
        return jnp.linalg.norm(new - x1, axis=1).mean(), moved, told

    run = jax.jit(lambda keys, weight: jax.vmap(lambda k: measure(k, weight))(keys), static_argnums=1)
    results = [run(jr.split(jr.key(4), 50), weight) for weight in (0.0, 10.0, 100.0, 1e6)]
    length, moved, told = np.array([[float(v.mean()) for v in r] for r in results]).T
    assert np.all(np.diff(length) > 0) and length[1] < 0.9 * length[3]
    assert moved[1] > 0.5 and moved[3] < 0.05  # some conditions differ by less than 1e-3
    assert np.all(np.diff(told) < 0) and told[0] > 0.4 and told[1] < 0.5 * told[0]


@pytest.mark.parametrize("weight", [-1.0, float("inf"), float("nan")])
def test_weights_out_of_range(weight):
    with pytest.raises(ValueError, match="weight must be finite"):
        ConditionalOT(weight)


def test_weights_shrink_a_gaussian_as_derived():
    """With |x0 - x1|^2 / eps in place of the norm, pairs of N(0, 1) and N(2, .5^2) at eps = 4 have E[x1] = 1.8462; the
    norm pulls the same way, and less as eps grows."""
    x0, x1 = jr.normal(jr.key(0), (200_000, 1)), 2 + 0.5 * jr.normal(jr.key(1), (200_000, 1))
    square = jnp.exp(-((x0 - x1)[:, 0] ** 2) / 4)
    # Four standard errors of 200 000 draws of deviation .5, of which the weights leave some 4 in 10.
    assert_close(jnp.sum(square * x1[:, 0]) / square.sum(), 1.8462, 4 / 80_000**0.5, scale=0.5)
    means = []
    for eps in (0.5, 2.0, 20.0):
        _, weight = Weighted(eps)(x0, x1, x1)
        assert_close(weight.mean(), 1.0, 1e-4)
        means.append(float(jnp.mean(weight * x1[:, 0])))
    assert means[0] < means[1] < means[2] < 2.0 and means[2] > 1.98
