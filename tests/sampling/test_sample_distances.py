import sys

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from contraflow.core.types import UserError
from contraflow.flow.targets import GaussianMixture
from contraflow.sampling.distances import (
    BANDWIDTHS,
    DISTANCES,
    distances,
    mmd2,
    modes_found,
    sinkhorn,
    sliced_wasserstein,
)


def normal(seed: int, n: int, mean=(0.0, 0.0), std: float = 1.0):
    return jax.vmap(lambda e: jnp.asarray(mean) + std * e)(jr.normal(jr.key(seed), (n, 2)))


def test_sliced_wasserstein_of_a_shift_and_of_a_scale():
    # W2^2 along e is (shift . e)^2 + (s - 1)^2, and E[(shift . e)^2] = |shift|^2 / 2 in the plane.
    x, y = normal(0, 4000), normal(1, 4000, (0.6, -0.8), 1.5)
    assert sliced_wasserstein(jr.key(2), x, y, 256) == pytest.approx(np.sqrt(0.5 + 0.25), rel=0.07)
    shift = jnp.broadcast_to(jnp.array([3.0, 4.0]), x.shape)
    assert sliced_wasserstein(jr.key(2), x, x + shift, 256) == pytest.approx(5 / np.sqrt(2), rel=0.08)


def test_sliced_wasserstein_against_explicit_sorting():
    x, y = np.asarray(normal(0, 7)), np.asarray(normal(1, 7, (1.0, 0.0)))
    directions = np.asarray(jr.normal(jr.key(3), (5, 2)))
    total = 0.0
    for e in directions:
        e = e / np.hypot(*e)
        total += np.mean((np.sort(x @ e) - np.sort(y @ e)) ** 2)
    assert sliced_wasserstein(jr.key(3), x, y, 5) == pytest.approx(np.sqrt(total / 5), rel=1e-5)


def test_sliced_wasserstein_needs_as_many_samples():
    with pytest.raises(ValueError, match="must be equal"):
        sliced_wasserstein(jr.key(0), normal(0, 5), normal(1, 6))


def test_mmd2_is_the_double_sum():
    x, y = np.asarray(normal(0, 6)), np.asarray(normal(1, 9, (0.5, 0.0)))

    def k(u, v):
        return np.mean([np.exp(-np.sum((u - v) ** 2) / (2 * h * h)) for h in BANDWIDTHS])

    xx = np.mean([k(x[i], x[j]) for i in range(6) for j in range(6) if i != j])
    yy = np.mean([k(y[i], y[j]) for i in range(9) for j in range(9) if i != j])
    xy = np.mean([k(u, v) for u in x for v in y])
    assert mmd2(jnp.asarray(x), jnp.asarray(y)) == pytest.approx(xx + yy - 2 * xy, rel=1e-4)


def test_mmd2_is_unbiased():
    values = [float(mmd2(normal(2 * i, 50), normal(2 * i + 1, 50))) for i in range(60)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(60)
    assert min(values) < 0  # an estimator without the diagonal taken off never is


def test_mmd2_of_a_shift_is_as_large_in_many_dimensions_as_in_the_plane():
    values = []
    for d in (2, 32):
        x, y = jr.normal(jr.key(0), (1500, d)), 1.0 + jr.normal(jr.key(1), (1500, d))
        values.append(float(mmd2(x, y)))
    assert 0.5 * values[0] < values[1] < 2.0 * values[0]


def test_modes_found_are_those_with_half_their_share():
    modes = GaussianMixture(jnp.array([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0], [3.0, 3.0]]), 0.1)
    y = modes.sample(jr.key(0), 4000)
    near = lambda i: y[jnp.argsort(jnp.sum((y - modes.means[i][None]) ** 2, 1))][:900]
    some = jnp.concatenate([near(0), near(1), near(2)[:100], jnp.full((2100, 2), 9.0)])
    assert modes_found(y, y, modes) == 1.0 and modes_found(some, y, modes) == 0.5
    assert modes_found(jr.uniform(jr.key(1), (4000, 2), minval=-1.0, maxval=4.0), y, modes) == 0.0


def test_sinkhorn_of_gaussians_is_near_their_squared_distance():
    # W2^2 = |shift|^2 + d (s - 1)^2 = 4 + 2 * .25
    assert sinkhorn(normal(0, 1000), normal(1, 1000, (2.0, 0.0), 1.5)) == pytest.approx(4.5, rel=0.12)
    x = normal(0, 300)
    assert abs(sinkhorn(x, x)) < 2.5e-4 * 4  # of the mean squared distance
    assert sinkhorn(x, x + jnp.full_like(x, 1.0)) == pytest.approx(2.0, rel=0.02)


def test_all_are_near_zero_for_one_law_and_grow_with_the_difference():
    x, same, near, far = normal(0, 1000), normal(1, 1000), normal(2, 1000, (0.5, 0.0)), normal(3, 1000, (1.5, 0.0))
    a, b, c = (distances(jr.key(4), x, y, 400) for y in (same, near, far))
    assert list(a) == list(DISTANCES)
    assert a["sliced_wasserstein"] < 0.1 and abs(a["mmd2"]) < 0.005 and a["sinkhorn"] < 0.1
    assert all(a[name] < b[name] < c[name] for name in DISTANCES)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, 1e9])
def test_diverged_samples_are_infinitely_far(bad: float):
    x = normal(0, 50)
    assert distances(jr.key(0), x.at[3, 1].set(bad), x) == dict.fromkeys(DISTANCES, float("inf"))


def test_without_ott_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ott", None)
    with pytest.raises(UserError, match=r'pip install "contraflow\[sample\]"'):
        sinkhorn(normal(0, 5), normal(1, 5))
