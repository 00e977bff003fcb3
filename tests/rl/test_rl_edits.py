"""Edits of given actions against what they should become."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.compiled import optimised

from contraflow.core.optim import Optim
from contraflow.core.types import EnvSpec
from contraflow.nets.mlp import MLPSpec
from contraflow.rl.edits import HIGHEST, Edits

D = 2
SPEC = EnvSpec(1, D, 1, None, False)
SMALL = Edits(0.4, entropy=-2.0, net=MLPSpec(32, 1), optim=Optim(1e-2, 2000), alpha_optim=Optim(1e-2, 2000))


def learned(edits, value, actions, updates=2000):
    """(state, metrics of each update) at actions(key) [B, a] of one observation."""

    @optimised
    def run(state):
        def one(state, key):
            k_action, k_learn = jr.split(key)
            action = actions(k_action)
            return edits.learn(state, value, jnp.zeros((action.shape[0], 1)), action, k_learn)

        return jax.lax.scan(one, state, jr.split(jr.key(1), updates))

    return run(jax.jit(lambda k: edits.init(k, SPEC))(jr.key(0)))


def drawn(state, action, n=1000):
    """Edited actions [n, a] and log-densities of the edits."""
    return jax.vmap(lambda k: state.edit.draw(jnp.zeros(1), action, k))(jr.split(jr.key(2), n))


def test_an_edit_goes_to_the_best_action_within_its_reach():
    """Q = -k |a - c|^2 / 2: the mean of the edited actions is c where that is near, and the edit c - a cut off at
    +-scale where it is not; its entropy is the one wanted."""
    curve, goal = 50.0, jnp.array([0.3, -0.2])
    value = lambda obs, a: -0.5 * curve * jnp.sum((a - goal) ** 2)
    state, metrics = learned(SMALL, value, lambda k: 0.5 * jr.normal(k, (128, D)))
    for place in ([0.2, 0.0], [0.3, -0.2], [-0.5, 0.9], [0.4, -0.9]):
        action = jnp.array(place)
        edits = drawn(state, action)[0].mean(0) - action
        # Of a far goal tanh falls short of 1, by the entropy that is wanted.
        np.testing.assert_allclose(edits, jnp.clip(goal - action, -0.4, 0.4), atol=0.15 * 0.4)
    np.testing.assert_allclose(metrics["entropy"][-200:].mean(), -2.0, atol=0.1)


def test_the_temperature_of_an_edit():
    """Near the middle of its range tanh is the identity, and the edit over its scale N(., alpha / (k scale^2)): with
    the entropy H per number alpha is k scale^2 exp(2 H) / (2 pi e)."""
    curve = 20.0
    value = lambda obs, a: -0.5 * curve * jnp.sum((a - 0.1) ** 2)
    state, _ = learned(SMALL, value, lambda k: 0.1 + 0.05 * jr.normal(k, (128, D)))
    alpha = curve * 0.4**2 * np.exp(2 * -2.0) / (2 * np.pi * np.e)
    np.testing.assert_allclose(jnp.exp(state.log_alpha), alpha, rtol=0.15)
    edited, log_prob = drawn(state, jnp.full(D, 0.1))
    np.testing.assert_allclose(edited.std(0) / 0.4, np.exp(-2.0) / np.sqrt(2 * np.pi * np.e), rtol=0.15)
    np.testing.assert_allclose(-log_prob.mean() / D, -2.0, atol=0.15)


def test_the_highest_entropy():
    """Of tanh(u), u ~ N(m, s^2): log(s sqrt(2 pi e)) + E log sech^2 u, over a grid of means and deviations."""
    z, w = np.polynomial.hermite_e.hermegauss(100)
    w = w / w.sum()
    s = np.linspace(0.5, 1.5, 201)
    of = lambda m: np.log(s * np.sqrt(2 * np.pi * np.e)) - 2 * np.log(np.cosh(m + s[:, None] * z)) @ w
    assert abs(of(0.0).max() - HIGHEST) < 1e-4 and abs(s[of(0.0).argmax()] - 0.874) < 0.01
    assert of(0.2).max() < of(0.0).max()


def test_an_entropy_out_of_reach_is_refused():
    """The published target counts in units of the action: beyond what any edit has for scales up to .306."""
    assert Edits(0.31, unit="action").target < HIGHEST
    for scale in (0.05, 0.1, 0.3):
        assert Edits(scale).target == -0.5
        with pytest.raises(ValueError, match="cannot have an entropy"):
            Edits(scale, unit="action")
    with pytest.raises(ValueError, match="cannot have an entropy"):
        Edits(entropy=0.69)
    np.testing.assert_allclose(Edits(0.5, unit="action").target, -0.5 + np.log(2))


def test_out_of_reach_alpha_would_grow_without_end():
    """What is refused: its temperature rises in every update, as nothing can have that entropy."""
    edits = object.__new__(Edits)
    vars(edits).update(vars(SMALL) | {"entropy": 0.7})
    _, metrics = learned(edits, lambda obs, a: -jnp.sum(a**2), lambda k: 0.1 * jr.normal(k, (64, D)), 300)
    assert np.all(np.diff(metrics["temperature"][:-1]) > 0) and metrics["temperature"][-1] > 5
    _, metrics = learned(replace(SMALL, entropy=-0.5), lambda obs, a: -jnp.sum(a**2), lambda k: jnp.zeros((64, D)), 300)
    assert metrics["temperature"][-1] < 1


def test_the_density_of_an_edit():
    """exp(log pi) is the density of tanh(u) in one dimension: its histogram, from 20 000 draws."""
    state = replace(Edits(0.5, net=MLPSpec(8, 1)), entropy=-0.5).init(jr.key(3), EnvSpec(1, 1, 1, None, False))
    edited, log_prob = drawn(state, jnp.zeros(1), 20_000)
    e = np.asarray(edited[:, 0]) / 0.5
    count, edges = np.histogram(e, 20, (-1, 1))
    places = np.digitize(e, edges) - 1
    for i in np.flatnonzero(count > 500):
        found, wanted = np.exp(np.asarray(log_prob))[places == i].mean(), count[i] / 20_000 / 0.1
        assert abs(found - wanted) < 5 * wanted / np.sqrt(count[i]) + 0.03 * wanted
    assert np.abs(edited).max() <= 0.5
