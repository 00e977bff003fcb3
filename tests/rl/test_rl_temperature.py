"""The tuned temperature: its estimate of an entropy, and the way it turns."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.optimize import brentq

from contraflow.agents.online.pmd import PMD
from contraflow.agents.online.rfm import DRAWS, RFM, SMALL, Choice, PosteriorTarget
from contraflow.core.optim import Optim
from contraflow.core.types import Batch, EnvSpec
from contraflow.flow.posterior.control import Fixed
from contraflow.flow.posterior.importance import Reverse
from contraflow.flow.posterior.local import Local
from contraflow.flow.posterior.proposal import TruncatedNoise
from contraflow.flow.solver import Euler
from contraflow.flow.support import Box
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.best_of import First
from contraflow.policy.flow import FlowPolicy
from contraflow.rl.critics import Critics
from contraflow.rl.temperature import Tuned, gaussian_entropy, nearest_entropy


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


BUMP = lambda a: np.logaddexp(-0.5 * ((a - 0.5) / 0.08) ** 2, -0.5 * ((a + 0.5) / 0.08) ** 2)
VALUES = {
    "a": lambda a: a,
    "|a|": np.abs,
    "-a^2": lambda a: -(a**2),
    "-(|a| - .5)^2": lambda a: -((np.abs(a) - 0.5) ** 2),
    "cos 6a": lambda a: np.cos(6 * a),
    "two narrow modes": BUMP,
}


@pytest.mark.parametrize("name", VALUES)
def test_the_temperature_at_which_the_estimated_entropy_is_the_one_asked_for(name: str):
    """Within .85 and 1.2 of that at which exp(Q / lambda) has an entropy of -.5, by as many draws as RFM takes."""
    a = np.linspace(-1, 1, 20_001)
    u = np.random.default_rng(0).uniform(size=(4000, DRAWS, 1))

    def entropies(log_lam):
        """(by quadrature, estimated from draws)."""
        q = VALUES[name](a) / np.exp(log_lam)
        p = np.exp(q - q.max())
        p /= p.sum()
        drawn = np.interp(u, np.cumsum(p), a)
        exact = -np.sum(p * np.log(np.maximum(p, 1e-300))) + np.log(a[1] - a[0])
        return exact, float(jax.jit(jax.vmap(nearest_entropy))(drawn).mean())

    exact, found = (brentq(lambda x, i=i: entropies(x)[i] + 0.5, -7, 2, xtol=0.01) for i in (0, 1))
    assert 0.85 < np.exp(found - exact) < 1.2


def test_the_entropy_that_is_tuned_is_that_of_the_policy():
    """The mean over 300 calls, each of few rows, is that of many actions at as many observations."""
    agent = RFM(flow=replace(SMALL, network=ResidualMLP(16, 1, 4)))
    state = agent.init(jr.key(0), EnvSpec(3, 2, 1, 10, True))
    obs = jr.normal(jr.key(1), (300, 3))
    calls = jax.jit(jax.vmap(lambda o, key: agent._entropy(state, o[None], key)))(obs, jr.split(jr.key(2), 300))
    actions = jax.vmap(lambda o, key: FlowPolicy(state.actor).particles(o, key, 500))(obs, jr.split(jr.key(3), 300))
    np.testing.assert_allclose(calls.mean(), jax.vmap(nearest_entropy)(actions).mean(), atol=0.05)


def test_too_much_entropy_cools():
    tuned = Tuned(entropy=-0.5, start=0.1, rate=0.01, low=0.05, high=0.2)
    lam, after = tuned.first(), lambda entropy: tuned.following(tuned.first(), jnp.asarray(3), jnp.asarray(entropy))
    np.testing.assert_allclose(lam, 0.1, rtol=1e-6)
    np.testing.assert_allclose(after(0.5), 0.1 * np.exp(-0.01), rtol=1e-6)
    assert after(-1.0) > lam
    for entropy, limit in ((100.0, 0.05), (-200.0, 0.2)):
        np.testing.assert_allclose(after(entropy), limit, rtol=1e-6)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="low <= start"):
        Tuned(start=20.0)
    with pytest.raises(ValueError, match="entropy of weights is positive"):
        Tuned(-0.5, of="weights")
    with pytest.raises(ValueError, match="Local has no weights"):
        RFM(temperature=Tuned(1.0, of="weights"), target=PosteriorTarget(Local()))
    with pytest.raises(ValueError, match="of='weights'"):
        PMD(temperature=Tuned())
    assert RFM().temperature == Tuned(entropy=-0.5)


@pytest.mark.parametrize("size", [3.0, 10.0])
def test_it_settles_at_the_effective_size_asked_for(size: float):
    """Sixteen candidates, whose weights are Q / lambda alone in the box, under a critic that stands still."""
    estimator = Reverse(16, TruncatedNoise(), Fixed(0.0))
    still = Optim(1e-30)
    rows = jr.normal(jr.key(1), (64, 3))
    batch = Batch(rows, jnp.zeros((64, 2)), rows[:, 0], jnp.zeros(64), rows, jnp.ones((64, 2)))
    tuned = Tuned(float(np.log(size)), of="weights", rate=0.2)
    agent = RFM(
        flow=replace(SMALL, support=Box(), solver=Euler(1), network=ResidualMLP(4, 1, 4)),
        target=PosteriorTarget(estimator), choose=Choice(backup=First()), temperature=tuned, optim=still,
        critic=Critics(width=4, depth=1, optim=still),
    )  # fmt: skip

    def run(lam, key):
        state = agent.init(jr.clone(key), EnvSpec(3, 2, 1, 10, True))
        state = eqx.tree_at(lambda s: s.temperature, state, lam)
        return jax.lax.scan(lambda s, k: agent.update(s, batch, k), state, jr.split(key, 300))[1]

    metrics = jax.jit(jax.vmap(run, (0, None)))(jnp.array([1e-3, 1.0]), jr.key(2))
    last = {name: x[:, -50:].mean(1) for name, x in metrics.items()}
    np.testing.assert_allclose(last["entropy"], np.log(size), atol=0.05)
    np.testing.assert_allclose(last["temperature"][0], last["temperature"][1], rtol=0.05)
