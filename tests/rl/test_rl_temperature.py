"""The tuned temperature: its estimate of an entropy, and the way it turns."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from contraflow.agents import PMD, RFM
from contraflow.core.types import EnvSpec, Transition
from contraflow.flow.posterior.control import Fixed
from contraflow.flow.posterior.importance import Reverse
from contraflow.flow.posterior.local import Local
from contraflow.flow.posterior.proposal import TruncatedNoise
from contraflow.flow.solver import Euler
from contraflow.policy.select import First
from contraflow.rl.critics import Critics
from contraflow.rl.temperature import Constant, Tuned, gaussian_entropy, nearest_entropy


@pytest.mark.parametrize("n", [4, 8, 32])
def test_entropy_of_gaussian_draws(n: int):
    std = jnp.array([0.1, 0.5, 2.0])
    draws = std[None, None] * jr.normal(jr.key(0), (20_000, n, 3))
    wanted = jnp.mean(jnp.log(std)) + 0.5 * np.log(2 * np.pi * np.e)
    np.testing.assert_allclose(jax.vmap(gaussian_entropy)(draws).mean(), wanted, atol=0.01)


@pytest.mark.parametrize("n", [4, 16])
def test_entropy_told_by_neighbours(n: int):
    """Uniform, exp(c a) on [-1, 1], Gaussian, two narrow modes on opposite faces: one dimension, 20 000 sets."""
    u = jr.uniform(jr.key(0), (20_000, n, 2))
    z = jr.normal(jr.key(1), u.shape)
    side = jr.rademacher(jr.key(2), u.shape)
    told = lambda actions: float(jax.vmap(nearest_entropy)(actions).mean())
    np.testing.assert_allclose(told(u * jnp.array([[[2.0, 0.1]]])), 0.5 * np.log(2 * 0.1), atol=0.4 / n + 0.02)
    np.testing.assert_allclose(told(0.1 * z), np.log(0.1 * np.sqrt(2 * np.pi * np.e)), atol=0.08)
    for c in (4.5, 50.0):
        exact = np.log(2 * np.sinh(c) / c) + 1 - c / np.tanh(c)
        np.testing.assert_allclose(told(1 + jnp.log(u + (1 - u) * np.exp(-2 * c)) / c), exact, atol=0.04)
    narrow = 0.9 * side + 0.005 * z
    wanted = np.log(2 * 0.005 * np.sqrt(2 * np.pi * np.e))
    np.testing.assert_allclose(told(narrow), wanted, atol=0.65 if n == 4 else 0.06)
    assert jax.vmap(gaussian_entropy)(narrow).mean() > wanted + 3
    assert np.isfinite(nearest_entropy(jnp.ones((n, 2))))


def test_too_much_entropy_cools():
    tuned = Tuned(entropy=-0.5, start=0.1, rate=0.01, low=0.05, high=0.2)
    log_lam = tuned.first()
    np.testing.assert_allclose(jnp.exp(log_lam), 0.1, rtol=1e-6)
    np.testing.assert_allclose(tuned.move(log_lam, jnp.asarray(0.5)) - log_lam, -0.01, rtol=1e-4)
    assert tuned.move(log_lam, jnp.asarray(-1.0)) > log_lam
    for entropy, limit in ((100.0, 0.05), (-200.0, 0.2)):
        np.testing.assert_allclose(jnp.exp(tuned.move(log_lam, jnp.asarray(entropy))), limit, rtol=1e-5)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="low <= start"):
        Tuned(start=20.0)
    with pytest.raises(ValueError, match="at least 4 particles"):
        RFM(backup=First())
    with pytest.raises(ValueError, match="entropy of weights is positive"):
        Tuned(-0.5, of="weights")
    with pytest.raises(ValueError, match="Local has no weights"):
        RFM(temperature=Tuned(1.0, of="weights"), estimator=Local())
    with pytest.raises(ValueError, match="of='weights'"):
        PMD(temperature=Tuned())
    assert RFM().temperature == Tuned(entropy=-0.5)
    assert RFM(temperature=Constant(0.02), backup=First()).backup.particles == 1


@pytest.mark.parametrize("size", [3.0, 10.0])
def test_it_settles_at_the_effective_size_asked_for(size: float):
    """Sixteen candidates, whose weights are Q / lambda alone in the box, under a critic that stands still."""
    estimator = Reverse(16, TruncatedNoise(), Fixed(0.0))
    small = {"width": 4, "depth": 1, "embedding": 4, "actor_lr": 1e-30, "critic": Critics(width=4, depth=1, lr=1e-30)}
    ended = jnp.ones(64, bool)
    rows = jr.normal(jr.key(1), (64, 3))
    batch = Transition(rows, jnp.zeros((64, 2)), rows[:, 0], rows, ended, ~ended, jnp.ones(64, int))
    tuned = Tuned(float(np.log(size)), of="weights", rate=0.2)
    agent = RFM(bounds="box", estimator=estimator, solver=Euler(1), backup=First(), temperature=tuned, **small)

    def run(log_lam, key):
        state = agent.init(jr.clone(key), EnvSpec(3, 2, 1, 10, True))
        state = eqx.tree_at(lambda s: s.log_lam, state, log_lam)
        return jax.lax.scan(lambda s, k: agent.update(s, batch, k), state, jr.split(key, 300))[1]

    metrics = jax.jit(jax.vmap(run, (0, None)))(jnp.log(jnp.array([1e-3, 1.0])), jr.key(2))
    last = {name: x[:, -50:].mean(1) for name, x in metrics.items()}
    np.testing.assert_allclose(last["entropy"], np.log(size), atol=0.05)
    np.testing.assert_allclose(last["temperature"][0], last["temperature"][1], rtol=0.05)
