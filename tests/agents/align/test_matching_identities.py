"""What the methods have in common: one gradient at first, and what bounds a step in second order."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from tests.agents.align.matching_helpers import (
    Given,
    Moved,
    drawn,
    flattened,
    flow_of,
    gaussian,
    gradient,
    groups,
    one_group,
    small,
    start,
    variance,
)

from contraflow.agents.align.awm import AWM
from contraflow.agents.align.base import flat, repeated
from contraflow.agents.align.nft import NFT
from contraflow.agents.align.rwr import RWR
from contraflow.agents.onpolicy.fpo import FPO, Draw, MatchedFlow
from contraflow.core.optim import Optim
from contraflow.flow.plan import FlowSDE, Plan, generate
from contraflow.rl.group import GroupAdvantage
from contraflow.rl.ppo import Samples

TIMES = 3
UNEVEN = jnp.array([[1.0, -1.0, -1.0, 1.0], [-1.0, 1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0]])


def fpo(state, scored, key):
    """The gradient of FPO's surrogate with the pairs of an update."""
    advantage = GroupAdvantage()(scored.reward, (1.0,)).reshape(-1)
    rows = repeated(scored.cond, scored.reward.shape[1]), flat(scored.draws.end), advantage
    (cond, x1, advantage), (_, t, u) = drawn(state.flow, rows, key, TIMES)
    actor = MatchedFlow(state.flow, TIMES, "velocity", "mean")
    noise = x1[:, None] - u
    losses = jax.vmap(actor.losses)(cond, x1, t, noise)
    one = jnp.ones_like(advantage)
    data = Samples(cond, Draw(x1, t, noise, losses), advantage, one, one)
    agent = FPO(state.flow.spec, TIMES, "velocity", "mean")
    return jax.grad(lambda actor: agent._surrogate(actor, data, jr.key(0))[0])(actor).flow


def test_first_gradients_are_one_vector():
    """E[A grad |v - u|^2] for all, with the same samples, times and noises: AWM divides A by its bound, 5; centred
    weights of RWR, whose rewards are +-1 here, are A tanh(1) up to the 1e-4 in the deviation. Rounding: 1e-5 of the
    largest entry, and more where two gradients are subtracted."""
    state, scored, key = start(small(jr.key(0)), Optim()), groups(jr.key(1), reward=UNEVEN), jr.key(2)
    of = lambda agent, scored: flattened(gradient(agent, state, scored, key)[0])
    right = flattened(fpo(state, scored, key))
    big = float(jnp.abs(right).max())
    assert big > 0.01
    awm = of(AWM(weight="velocity", times=TIMES), scored)
    nft = [of(NFT(normalise=False, times=TIMES, beta=beta), scored) for beta in (1.0, 0.2)]
    even = of(RWR(times=TIMES), groups(jr.key(1), reward=0.0 * UNEVEN))
    rwr = (of(RWR(times=TIMES), scored) - even) / jnp.tanh(1.0)
    for found, tolerance in ((5 * awm, 1e-5), (nft[0], 1e-5), (nft[1], 2e-5), (rwr, 3e-4)):
        np.testing.assert_allclose(found, right, atol=tolerance * big, rtol=0)


def test_first_gradients_are_one_vector_for_any_rewards():
    state, scored, key = start(small(jr.key(3)), Optim()), groups(jr.key(4)), jr.key(5)
    of = lambda agent: flattened(gradient(agent, state, scored, key)[0])
    right = flattened(fpo(state, scored, key))
    for found in (5 * of(AWM(weight="velocity", times=TIMES)), of(NFT(normalise=False, times=TIMES))):
        np.testing.assert_allclose(found, right, atol=1e-5 * float(jnp.abs(right).max()), rtol=0)


def test_time_weights_are_the_only_difference():
    """With t / (1 - t) the first gradient of AWM is another vector, so the test above can fail."""
    state, scored, key = start(small(jr.key(3)), Optim()), groups(jr.key(4)), jr.key(5)
    one, two = (flattened(gradient(AWM(weight=w, times=TIMES), state, scored, key)[0]) for w in ("velocity", "elbo"))
    cosine = one @ two / (jnp.linalg.norm(one) * jnp.linalg.norm(two))
    assert cosine < 0.999


def curvature(agent, advantage):
    """The second derivative of the loss along a shift of the velocity, for samples with one advantage."""
    scored = one_group(jnp.linspace(-1.0, 1.0, 256), jnp.full(256, advantage))
    old = flow_of(Moved(jnp.zeros(1), lambda x, t: [1.0 + 0.0 * x]))
    moved = flow_of(Moved(jnp.ones(1), old.net.features))
    slopes = [gradient(agent, start(f, Optim(), old=old), scored, jr.key(0))[0].net.theta[0] for f in (old, moved)]
    return float(slopes[1] - slopes[0])


def test_second_order():
    """NFT: 2 beta, whatever the advantages, once its scale is taken out. AWM: 2 (A + trust). The loss is a quadratic
    function of the shift, so differences are exact up to rounding."""
    nft = [NFT(beta=b, advantage=Given(clip=1.0), normalise=False, anchor=0.0) for b in (0.3, 1.0)]
    awm = [AWM(advantage=Given(clip=1.0), weight="velocity", anchor=0.0, trust=trust) for trust in (0.0, 1.0)]
    for advantage in (-1.0, -0.4, 0.0, 1.0):
        found = [curvature(agent, advantage) for agent in (*nft, *awm)]
        np.testing.assert_allclose(found, [0.6, 2.0, 2 * advantage, 2 * (advantage + 1)], atol=2e-4)


def test_policy_gradients_have_the_same_expectation_and_more_variance():
    """On memoryless noise, a = sqrt 2, the noise of a step given x_t and x1 has the mean 2 sqrt(h) (u - v) / sigma. For
    A = x1 ~ N(0, 1), E[A (u - v)] = (1 - t) / var; 100 steps and 20 000 chains leave some per cent."""
    plan, n = Plan(100, FlowSDE(2**0.5)), 20_000
    k_x0, k_noise = jr.split(jr.key(0))
    end, steps = jax.jit(lambda x, key: generate(plan, gaussian, x, jnp.asarray(0), key))(
        jr.normal(k_x0, (n, 1)), k_noise
    )
    advantage = np.asarray(end[:, 0] - jnp.mean(end))
    means = []
    for k in range(30, 70):
        t, sigma = k * plan.h, np.sqrt(2 * (100 - k) / k)
        x, noise = steps.x[:, k, 0], (steps.new - steps.mean)[:, k, 0] / steps.std[:, k]
        u, scale = (end[:, 0] - x) / (1 - t), 2 * np.sqrt(plan.h) / sigma
        policy, match = advantage * noise, advantage * scale * (u - gaussian(x, t))
        means.append([np.mean(policy), np.mean(match), scale * (1 - t) / variance(t)])
        assert np.var(policy) > 5 * np.var(match)
    policy, match, right = np.mean(means, 0)  # .007 / sqrt(40) of noise in the first
    np.testing.assert_allclose([policy, match], right, rtol=0.06)
