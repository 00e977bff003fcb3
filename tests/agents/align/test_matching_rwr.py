"""Reward-weighted matching on Gaussians: iterates, the anchored minimum, the best of a group."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.agents.align.matching_helpers import (
    Fitted,
    Moved,
    flattened,
    flow_of,
    gradient,
    groups,
    normals,
    one_group,
    small,
    start,
)

from contraflow.agents import presets
from contraflow.agents.align.rwr import RWR
from contraflow.core.optim import Optim

Z = normals(2048)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("curve", [0.0, 0.5])
def test_iterates_tilt_the_first_distribution(curve, normalise):
    """From N(.3, .8^2) with r = x - curve x^2 / 2, N iterations are p_0 exp(N r / temperature): the precision grows by
    N curve / temperature, the precision times the mean by N / temperature. No iteration is the last one. The flow has
    the velocities of all Gaussians, so matching finds the tilted one; Adam leaves 2 %."""
    temperature, agent = 2.0, RWR(temperature=2.0, unit="reward", normalise=normalise, optim=Optim(0.02, 300))
    flow = flow_of(Fitted(jnp.array([0.3]), jnp.log(jnp.array([0.8]))))

    @jax.jit
    def iterate(flow, key):
        x1 = flow.net.mean + jnp.exp(flow.net.log_std) * Z
        scored = one_group(x1, x1 - 0.5 * curve * x1**2)
        body = lambda state, key: (agent.update(state, scored, key)[0], state.flow.net)
        path = jax.lax.scan(body, start(flow, agent.optim), jr.split(key, 150))[1]
        return flow_of(jax.tree.map(lambda x: jnp.mean(x[-50:], 0), path))

    for n in (1, 2, 3):
        flow = iterate(flow, jr.key(n))
        precision = 1 / 0.8**2 + n * curve / temperature
        mean = (0.3 / 0.8**2 + n / temperature) / precision
        np.testing.assert_allclose(float(flow.net.mean[0]), mean, rtol=0.02)
        np.testing.assert_allclose(float(jnp.exp(flow.net.log_std[0])), precision**-0.5, rtol=0.02)


@pytest.mark.parametrize("anchor", [0.0, 0.5, 2.0])
def test_the_anchored_minimum(anchor):
    """A flow that may only shift the velocity of N(0, 1), with w = exp(k x1) of mean 1: E[w (u - v_ref)] = k pi / 4, so
    the shift is k pi / (4 (1 + anchor)), and the loss is a parabola. 65 536 draws leave 1 %."""
    k, one = 0.5, lambda x, t: [1.0 + 0.0 * x]
    agent, old = RWR(temperature=1 / k, unit="reward", anchor=anchor, times=32), flow_of(Moved(jnp.zeros(1), one))
    at = [
        gradient(agent, start(flow_of(Moved(jnp.full(1, d), one)), Optim(), old=old), one_group(Z, Z), jr.key(0))[0]
        for d in (0.0, 1.0)
    ]
    low, high = (float(g.net.theta[0]) for g in at)
    np.testing.assert_allclose(-low / (high - low), k * np.pi / (4 * (1 + anchor)), rtol=0.04)


def test_normalised_weights_are_those_of_the_paper_up_to_a_constant_of_the_group():
    scored = groups(jr.key(0))
    one, two = (RWR(temperature=0.7, unit="reward", normalise=n).weights(scored) for n in (True, False))
    ratio = one / two
    np.testing.assert_allclose(ratio, jnp.broadcast_to(ratio[:, :1], ratio.shape), rtol=1e-4)
    np.testing.assert_allclose(jnp.mean(one, 1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(two, jnp.exp(scored.total / 0.7), rtol=1e-5)
    scaled = [RWR(temperature=0.7).weights(replace(scored, reward=c * scored.reward + 3.0)) for c in (1.0, 50.0)]
    np.testing.assert_allclose(scaled[0], scaled[1], rtol=2e-3)  # 1e-4 is added to the deviation


def test_best_of_group_takes_the_best():
    agent, scored = presets()["best-of-group"].agent, groups(jr.key(0))
    best = jax.nn.one_hot(jnp.argmax(scored.total, 1), 4)
    np.testing.assert_allclose(agent.weights(scored), 4 * best, atol=1e-6)


def test_equal_rewards_are_matching_and_anchors_pull():
    flow, other, scored = small(jr.key(0)), small(jr.key(1)), groups(jr.key(2), reward=jnp.ones((3, 4)))
    of = partial(gradient, scored=scored, key=jr.key(3))
    plain = flattened(of(RWR(), start(flow, Optim(), old=other))[0])
    anchored = flattened(of(RWR(anchor=1.0), start(flow, Optim(), old=other))[0])
    itself = flattened(of(RWR(anchor=1.0), start(flow, Optim()))[0])
    np.testing.assert_allclose(itself, plain, atol=1e-5 * jnp.abs(plain).max(), rtol=0)
    assert jnp.abs(anchored - plain).max() > 0.05 * jnp.abs(plain).max()
