"""`Gibbs` in a box: the action itself as latent, pi = exp(Q / lambda) on [-1, 1]^d and no Jacobian."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jaxtyping import Array, Float
from scipy import stats
from tests.closeness import assert_close
from tests.flow.invariance import residuals

from contraflow.flow.path import VE, Cosine, Linear
from contraflow.flow.posterior.gibbs import Gibbs
from contraflow.flow.posterior.strata import BoxStrata
from contraflow.flow.targets import log_sech2

SLOW = pytest.mark.slow
GRID = jnp.linspace(-1.0, 1.0, 201)


class InBox(eqx.Module):
    """log pi(u) = sum_j slope_j u_j + tie sum_j u_j u_(j+1) + height sum_j exp(-(|u_j| - .6)^2 / .02) on the box, NaN
    outside: nobody may ask there."""

    slope: Float[Array, " d"]
    tie: float = 0.0
    height: float = 0.0

    def __call__(self, u):
        pairs = self.tie * jnp.sum(u[1:] * u[:-1])
        value = self.slope @ u + pairs + self.height * jnp.sum(jnp.exp(-((jnp.abs(u) - 0.6) ** 2) / 0.02))
        return jnp.where(jnp.all(jnp.abs(u) <= 1.0), value, jnp.nan)

    def plane(self):
        """log pi on a grid of cells of the square, and the centres of the cells; for d = 2."""
        centres = (GRID[1:] + GRID[:-1]) / 2
        points = jnp.stack(jnp.meshgrid(centres, centres, indexing="ij"), -1).reshape(-1, 2)
        return jax.vmap(self)(points), points

    def sample(self, key, n):
        """Uniform within cells of the grid; for d = 2."""
        k_cell, k_place = jr.split(key)
        log_pi, points = self.plane()
        width = GRID[1] - GRID[0]
        cell = jnp.searchsorted(jnp.cumsum(jax.nn.softmax(log_pi)), jr.uniform(k_cell, (n,)), method="sort")
        return points[jnp.minimum(cell, len(points) - 1)] + width * (jr.uniform(k_place, (n, 2)) - 0.5)


TIED = InBox(jnp.array([0.5, -1.0]), tie=3.0, height=1.0)
CASES = [(Linear(), t, x) for t in (0.01, 0.3, 0.7, 0.99) for x in (-2.5, -0.4, 0.2, 1.2)]
CASES += [(VE(0.01, 2.0), 0.4, 1.0), (Cosine(), 0.2, -0.7)]


@pytest.mark.parametrize(("path", "t", "x"), CASES)
def test_quantile_and_rank_are_inverse_and_scipys(path, t, x):
    strata = BoxStrata.fit(path, jnp.asarray(x), jnp.asarray(t), 1.0)
    rank = (jnp.arange(200) + 0.5) / 200
    u, log_ratio = jax.vmap(strata.quantile)(rank)
    back, _ = jax.vmap(strata.rank)(u)
    mean, std = float(strata.mean), float(strata.std)
    oracle = stats.truncnorm((-1 - mean) / std, (1 - mean) / std, mean, std)
    # Ranks come from logarithms of probabilities, which differ by the width of the box in deviations where that is
    # small, and are as large as half the squared distance of the box where it is far.
    accuracy = 1e-6 * max(1.0, std, ((abs(mean) - 1.0) / std) ** 2 if abs(mean) > 1.0 else 0.0)
    assert_close(back, rank, accuracy)
    from_below = np.asarray(rank if mean >= 0 else 1 - rank, np.float64)
    assert_close(u, oracle.ppf(from_below), 1e-5 * max(1.0, std), scale=1.0)
    np.testing.assert_array_equal(log_ratio, 0.0)
    ends, _ = jax.vmap(strata.rank)(jnp.array([-1.0, 1.0]))
    assert_close(jnp.sort(ends), [0.0, 1.0], accuracy)
    assert jnp.abs(jax.vmap(strata.quantile)(jnp.array([0.0, 1.0]))[0]).max() <= 1.0


@partial(jax.jit, static_argnums=(0, 2))
def means(estimator, target, path, x_t, t, start, keys):
    return jax.vmap(lambda k: estimator(k, path, target, x_t, t, start[None]).mean)(keys)


def assert_unbiased(drawn, exact, rounding: float = 1e-4):
    """Within four standard errors; `rounding` is of the box."""
    error = np.asarray(drawn.std(0)) / np.sqrt(drawn.shape[0])
    assert np.all(np.abs(np.asarray(drawn.mean(0)) - exact) < 4 * error + rounding)
    assert error.max() < 0.01


@pytest.mark.parametrize(("path", "t"), [(Linear(), 0.02), (Linear(), 0.5), (Cosine(), 0.8), (Linear(), 0.98)])
def test_exponential_of_a_linear_value(path, t):
    """exp(c u) N(x_t; alpha u, beta^2) on the box is a Gaussian of mean m + c s^2 cut to it: scipy knows its mean. The
    start lies outside, where a policy that is not right yet may end; 20 sweeps have forgotten it."""
    slope = np.array([2.0, -5.0, 0.0])
    a, b = (float(f(jnp.asarray(t))) for f in (path.alpha, path.beta))
    x_t = a * np.array([0.9, -0.3, 0.1]) + b * np.array([-0.8, 0.5, 1.5])
    mean, std = x_t / a + slope * (b / a) ** 2, b / a
    exact = stats.truncnorm((-1 - mean) / std, (1 - mean) / std, mean, std).mean()
    start, keys = jnp.array([1.3, -0.2, 0.5]), jr.split(jr.key(0), 2000)
    drawn = means(
        Gibbs(8, sweeps=40, bound=1.0), InBox(jnp.asarray(slope)), path, jnp.asarray(x_t), jnp.asarray(t), start, keys
    )
    assert_unbiased(drawn, exact)
    assert jnp.abs(drawn).max() <= 1.0


@pytest.mark.parametrize("t", [0.05, 0.5, 0.9])
def test_two_modes_and_another_box_by_quadrature(t):
    """The weights are those of pi alone; a box of half the side changes the answer accordingly."""
    target, x_t = InBox(jnp.array([0.8]), height=4.0), jnp.array([0.1 * t + 0.7 * (1 - t)])
    for bound in (1.0, 0.5):
        u = np.linspace(-bound, bound, 4001)
        log_w = (
            0.8 * u + 4.0 * np.exp(-((np.abs(u) - 0.6) ** 2) / 0.02) - 0.5 * ((float(x_t[0]) - t * u) / (1 - t)) ** 2
        )
        w = np.exp(log_w - log_w.max())
        drawn = means(
            Gibbs(6, sweeps=40, bound=bound),
            target,
            Linear(),
            x_t,
            jnp.asarray(t),
            jnp.array([-0.4]),
            jr.split(jr.key(1), 2000),
        )
        assert_unbiased(drawn, np.sum(w * u) / np.sum(w))


@pytest.mark.parametrize(
    ("t", "endpoints", "sweeps"),
    [(0.6, 1, 3), (0.3, 4, 1), pytest.param(0.15, 1, 1, marks=SLOW), pytest.param(0.9, 4, 2, marks=SLOW)],
)
def test_a_draw_of_the_posterior_stays_one(t, endpoints, sweeps):
    """Coordinates that hang together, few candidates, one sweep and several."""
    estimator = Gibbs(3, sweeps, bound=1.0)
    assert residuals(estimator, TIED, jr.key(4), 40_000 // endpoints, jnp.asarray(t), endpoints).max() < 4.0


def test_a_long_chain_has_the_posterior_of_coordinates_that_hang_together():
    """From a corner, with one candidate beside the state: the kernel's own distribution, by quadrature."""
    x_t, t = jnp.array([0.3, -0.2]), jnp.asarray(0.4)
    log_pi, points = TIED.plane()
    w = jax.nn.softmax(log_pi - 0.5 * jnp.sum((x_t[None] - t * points) ** 2, 1) / (1 - t) ** 2)
    estimator = Gibbs(2, sweeps=200, bound=1.0)
    drawn = means(estimator, TIED, Linear(), x_t, t, jnp.array([1.0, -1.0]), jr.split(jr.key(2), 500))
    assert_unbiased(drawn, np.asarray(w @ points), rounding=1e-3)


def ignorant(strata, u):
    """Every start is taken to lie in the first stratum."""
    return jnp.zeros_like(u), jnp.zeros_like(u)


def squashed(strata, rank, right=BoxStrata.quantile):
    """The Jacobian of a tanh, which the box has not."""
    u, _ = right(strata, rank)
    return u, log_sech2(u)


@pytest.mark.parametrize(("name", "wrong"), [("rank", ignorant), pytest.param("quantile", squashed, marks=SLOW)])
def test_planted_bugs_are_seen(name, wrong, monkeypatch):
    monkeypatch.setattr(BoxStrata, name, wrong)
    # A function of its own, so that no program compiled before is used.
    run = jax.jit(lambda key: residuals.__wrapped__(Gibbs(3, bound=1.0), TIED, key, 40_000, jnp.asarray(0.6)))
    assert run(jr.key(4)).max() > 8.0
