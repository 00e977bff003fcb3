"""`Strata`: a normalised distribution with quantiles, close to the posterior but for the critic's part."""

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from jax.scipy.stats import norm
from tests.closeness import assert_close

from contraflow.flow.path import VE, Linear
from contraflow.flow.posterior.strata import Strata
from contraflow.flow.targets import log_sech2

CASES = [(Linear(), t, x) for t in (0.01, 0.3, 0.7, 0.99) for x in (-2.5, 0.2, 1.5)] + [(VE(0.01, 2.0), 0.4, 1.0)]


@pytest.mark.parametrize(("path", "t", "x"), CASES)
def test_quantile_and_rank_are_inverse_and_the_density_is_the_derivative(path, t, x):
    strata = Strata.fit(path, jnp.asarray(x), jnp.asarray(t))
    x_t, a, b = jnp.asarray(x), path.alpha(jnp.asarray(t)), path.beta(jnp.asarray(t))
    rank = (jnp.arange(200) + 0.5) / 200
    u, log_ratio = jax.vmap(strata.quantile)(rank)
    back, log_ratio_back = jax.vmap(strata.rank)(u)
    # Ranks are of size 1, and the factors of neighbouring cells differ by about 1.
    assert_close(back, rank, 2e-4)
    assert_close(log_ratio_back, log_ratio, 2e-2, scale=1.0)
    # Between neighbouring quantiles lies 1/200 of the probability; only where a cell ends the density jumps.
    fine = jnp.linspace(0.0, 1.0, 201)[:, None] * (u[1:] - u[:-1])[None] + u[None, :-1]
    density = jnp.exp(jax.vmap(jax.vmap(lambda u: norm.logpdf(x_t, a * u, b) - strata.rank(u)[1]))(fine))
    mass = jnp.trapezoid(density, fine, axis=0)
    assert jnp.quantile(jnp.abs(mass * 200 - 1.0), 0.9) < 0.02


@pytest.mark.parametrize(("path", "t", "x"), CASES)
def test_weights_but_for_the_critic_are_nearly_equal(path, t, x):
    """Effective share of 4000 candidates from q under sech^2(u) N(x_t; alpha u, beta^2)."""
    x_t, t = jnp.asarray(x), jnp.asarray(t)
    u, log_ratio = jax.vmap(Strata.fit(path, x_t, t).quantile)(jr.uniform(jr.key(0), (4000,)))
    w = jax.nn.softmax(log_sech2(u) + log_ratio)
    assert 1.0 / jnp.sum(w**2) / 4000 > 0.9


def test_everywhere_a_density():
    """Also far from where x_t points, in the tails of the cells at the ends."""
    strata = Strata.fit(Linear(), jnp.asarray(5.0), jnp.asarray(0.9))
    rank, log_ratio = jax.vmap(strata.rank)(jnp.linspace(-20.0, 20.0, 801))
    assert jnp.isfinite(log_ratio).all() and jnp.all(jnp.diff(rank) >= 0)
    assert rank.min() == 0.0 and rank.max() <= 1.0
    assert jnp.isfinite(jax.vmap(strata.quantile)(jnp.array([0.0, 1.0]))[0]).all()
