"""DiffusionNFT and MeanFlowNFT against the optimum for a fixed old flow, on a Gaussian."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.agents.align.matching_helpers import (
    Given,
    Moved,
    flattened,
    flow_of,
    gaussian,
    gradient,
    groups,
    normals,
    one_group,
    start,
    variance,
)

from contraflow.agents.align.nft import NFT, implied
from contraflow.core.optim import Optim
from contraflow.flow.model import Flow, FlowSpec
from contraflow.nets.velocity import ResidualMLP

X1 = normals(4096)
TIMES = 32


def pull(x, t):
    """E[x1 (u - v_old) | x_t] where x1 ~ N(0, 1): the variance (1 - t)^2 / var of x1 given x_t, over 1 - t."""
    return (1 - t) / variance(t)


def features(x, t):
    return [pull(x, t), pull(x, t) * x, 1.0 + 0.0 * x, t + 0.0 * x]


def slope(agent, theta, reward, features=features, **more):
    """The gradient at a flow moved by theta from the old one."""
    old = flow_of(Moved(jnp.zeros(len(theta)), features), **more)
    state = start(flow_of(Moved(jnp.asarray(theta), features), **more), Optim(), old=old)
    return gradient(agent, state, one_group(X1, reward), jr.key(0))[0].net.theta


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_optimum_for_linear_rewards(beta):
    """R = .5 + .1 x1: v_old + .2 E[x1 (u - v_old) | x_t] / beta. 4096 x 32 draws leave 1 % of the first gradient."""
    agent = NFT(beta=beta, advantage=Given(clip=5.0), normalise=False, anchor=0.0, times=TIMES)
    zero, best = (slope(agent, [theta, 0.0, 0.0, 0.0], X1) for theta in (0.0, 0.2 / beta))
    assert jnp.abs(best).max() < 0.03 * jnp.abs(zero).max()
    past = slope(agent, [0.3 / beta, 0.0, 0.0, 0.0], X1)
    assert past[0] > 0.3 * jnp.abs(zero[0])  # and the loss rises beyond


def test_optimum_at_a_point():
    """R = sigmoid(2 x1) at x_t = 1, t = .6: a flow that may only move there, against a quadrature over x1."""
    beta, at, when = 0.3, 1.0, 0.6
    bump = lambda x, t: [jnp.where((jnp.abs(x - at) < 0.1) & (jnp.abs(t - when) < 0.05), 1.0, 0.0)]
    good = jax.nn.sigmoid(2 * X1)
    agent = NFT(beta=beta, advantage=Given(clip=1.0), normalise=False, anchor=0.0, times=256)
    one, two = (slope(agent, [theta], 2 * good - 1, bump)[0] for theta in (0.0, 1.0))
    found = -one / (two - one)
    x1 = jnp.linspace(-6.0, 6.0, 2001)
    weight = jax.nn.softmax(-0.5 * x1**2 - 0.5 * ((at - when * x1) / (1 - when)) ** 2)
    u = (x1 - at) / (1 - when)
    right = jnp.sum(weight * (2 * jax.nn.sigmoid(2 * x1) - 1) * (u - jnp.sum(weight * u))) / beta
    assert jnp.isclose(jnp.sum(weight * u), gaussian(at, when), rtol=1e-4)
    np.testing.assert_allclose(found, right, rtol=0.06)  # some 6000 of a million draws fall there


def test_indifference_leaves_the_old_flow():
    """R = .5 everywhere: no gradient at v_old, and one towards it elsewhere."""
    agent = NFT(advantage=Given(), normalise=False, anchor=0.0, times=4)
    assert jnp.abs(slope(agent, [0.0] * 4, 0.0 * X1)).max() < 1e-6
    assert (slope(agent, [0.0, 0.0, 1.0, 0.0], 0.0 * X1) * jnp.array([0, 0, 1, 0]) >= 0).all()
    assert slope(agent, [0.0, 0.0, 1.0, 0.0], 0.0 * X1)[2] > 1.0


def test_the_normalised_error_is_scale_free():
    """Samples ten times as large: ten times the loss, not a hundred times, as errors are squares over sizes."""
    agent = NFT(times=2, anchor=0.0)
    e = [float(agent._error(s * jnp.ones(2), s * jnp.array([0.0, 3.0]), jnp.asarray(0.5))) for s in (1.0, 10.0)]
    np.testing.assert_allclose(e, [0.5 * 2.5 / 1.5, 5 * 2.5 / 1.5], rtol=1e-5)


class Jumps(Flow):
    """The flow to N(0, 1) by the exact average velocity, plus theta times what its exact change has."""

    theta: jax.Array | None = None

    def average(self, x, t, r, cond):
        ratio = jnp.sqrt(variance(r) / variance(t))
        close = r - t < 1e-3
        jump = (ratio - 1) / jnp.where(close, 1.0, r - t) * x
        return jnp.where(close, gaussian(x, t), jump) + self.theta * ratio * pull(x, t)


AVERAGED = FlowSpec(averaged=True)


def exact(theta):
    net = Moved(jnp.zeros(1), features)
    return Jumps(net, AVERAGED, None, jnp.asarray(theta))


def test_the_implied_velocity_is_that_of_the_flow():
    """m - (r - t) dm/dt = v for the average velocities of the flow to N(0, 1); first differences in float32."""
    flow = exact(0.0)
    for x, t, r in ((0.7, 0.1, 0.9), (-1.3, 0.5, 1.0), (0.4, 0.0, 0.3), (2.0, 0.6, 0.6)):
        x, t, r = jnp.array([x]), jnp.asarray(t), jnp.asarray(r)
        v = gaussian(x, t)
        np.testing.assert_allclose(implied(flow, flow, jnp.zeros(1), x, t, r, v), v, rtol=1e-4, atol=1e-5)


def test_optimum_of_average_velocities():
    """The derivative of the old average along u: the optimum moves m by sigma_r / sigma_t times what it moves v, as
    d m / d x = (sigma_r / sigma_t - 1) / (r - t)."""
    agent = NFT(AVERAGED, 0.3, Given(clip=5.0), normalise=False, anchor=0.0, times=TIMES, instant=0.0)
    slopes = []
    for theta in (0.0, 0.2 / 0.3):
        state = start(exact(theta), Optim(), old=exact(0.0))
        slopes.append(float(gradient(agent, state, one_group(X1, X1), jr.key(0))[0].theta))
    assert abs(slopes[1]) < 0.03 * abs(slopes[0])


def test_steps_of_no_length_are_nft():
    """r = t everywhere: bit for bit the gradient of NFT on the same network, up to the order of sums."""
    spec = FlowSpec(network=ResidualMLP(8, 1, 4), averaged=True)
    state, scored = start(spec.init(jr.key(0), 2, 3), Optim()), groups(jr.key(1))
    plain, averaged, jumps = (
        flattened(gradient(agent, state, scored, jr.key(2))[0])
        for agent in (NFT(beta=0.4), NFT(spec, 0.4, instant=1.0), NFT(spec, 0.4, instant=0.0))
    )
    size = float(jnp.abs(plain).max())
    np.testing.assert_allclose(averaged, plain, atol=1e-5 * size, rtol=0)
    assert jnp.abs(jumps - plain).max() > 0.01 * size
