"""Advantage Weighted Matching: the pretraining gradient, the bound on the log-density, the released weight."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.scipy.stats import norm
from tests.agents.align.matching_helpers import (
    Fitted,
    Given,
    drawn,
    flattened,
    flow_of,
    gradient,
    groups,
    one_group,
    small,
    start,
)

from contraflow.agents.align.awm import AWM
from contraflow.agents.align.base import flat, repeated
from contraflow.core.optim import Optim
from contraflow.flow.matching import matching_error, square

ONE = jnp.ones((3, 4))


def matching(flow, scored, key, times, weight):
    """The gradient of the mean of weight(t, e) e, e the matching loss of pretraining, with the draws of an update."""
    rows = repeated(scored.cond, scored.reward.shape[1]), flat(scored.draws.end)
    (cond, x1), (_, t, u) = drawn(flow, rows, key, times)

    def loss(flow):
        def one(cond, x1, t, u):
            error = square(matching_error(flow, cond, x1 - u, x1, t))
            return jax.lax.stop_gradient(weight(t, error)) * error

        return jnp.mean(jax.vmap(jax.vmap(one, (None, None, 0, 0)))(cond, x1, t, u))

    return flattened(jax.grad(loss)(flow))


def test_equal_advantages_are_pretraining():
    """A = 1 for all is the gradient of the matching loss; A = -.5 is -.5 times it."""
    flow, scored, key = small(jr.key(0)), groups(jr.key(1), reward=ONE), jr.key(2)
    agent = AWM(advantage=Given(clip=1.0), weight="velocity", times=3)
    right = matching(flow, scored, key, 3, lambda t, error: 1.0)
    for advantage in (1.0, -0.5):
        found, _ = gradient(agent, start(flow, Optim()), groups(jr.key(1), reward=advantage * ONE), key)
        np.testing.assert_allclose(flattened(found), advantage * right, atol=1e-5 * jnp.abs(right).max(), rtol=0)


def test_the_released_weight_divides_by_a_power_of_the_error():
    """4 (1 - t) e^(1/4) has the gradient of e times (1 - t) e^(-3/4)."""
    flow, scored, key = small(jr.key(0)), groups(jr.key(1), reward=ONE), jr.key(2)
    right = matching(flow, scored, key, 3, lambda t, error: (1 - t) * error**-0.75)
    found, _ = gradient(AWM(advantage=Given(clip=1.0), times=3), start(flow, Optim()), scored, key)
    np.testing.assert_allclose(flattened(found), right, atol=1e-4 * jnp.abs(right).max(), rtol=0)


def test_the_elbo_is_tight_for_gaussians():
    """With t / (1 - t), minus the loss is log p(x1) up to a constant where v is exact for p, Gaussians here. The same
    draws for both flows; 130 000 of them leave .01. The plain weight fails."""
    losses = {}
    for weight in ("elbo", "velocity"):
        agent = AWM(advantage=Given(clip=1.0), weight=weight, anchor=0.0, trust=0.0, times=32)
        for mean, std in ((0.0, 1.0), (0.5, 0.8), (-0.3, 1.2)):
            flow = flow_of(Fitted(jnp.asarray([mean]), jnp.log(jnp.asarray([std]))))
            for x1 in (-0.5, 0.2, 1.0):
                scored = one_group(jnp.full(4096, x1), jnp.ones(4096))
                losses[weight, mean, std, x1] = float(
                    gradient(agent, start(flow, Optim()), scored, jr.key(0))[1]["loss"]
                )
    apart = {"elbo": [], "velocity": []}
    for weight, mean, std, x1 in losses:
        found = losses[weight, 0.0, 1.0, x1] - losses[weight, mean, std, x1]
        apart[weight].append(abs(found - float(norm.logpdf(x1, mean, std) - norm.logpdf(x1))))
    assert max(apart["elbo"]) < 0.03 and max(apart["velocity"]) > 0.2, apart


def test_the_slow_flow_holds_the_flow_back():
    """With equal rewards only the anchors act: both pull towards their flow, with their weights."""
    flow, other = small(jr.key(0)), small(jr.key(1))
    scored, key = groups(jr.key(2), reward=ONE), jr.key(3)
    of = lambda **more: flattened(gradient(AWM(times=3, **more), start(flow, Optim(), old=other), scored, key)[0])
    trust, anchor, both = of(anchor=0.0), of(anchor=1.0, trust=0.0), of(anchor=0.5, trust=0.5)
    np.testing.assert_allclose(trust, anchor, atol=1e-5 * jnp.abs(trust).max(), rtol=0)
    np.testing.assert_allclose(both, trust, atol=1e-5 * jnp.abs(trust).max(), rtol=0)
    assert jnp.abs(trust).max() > 0.01
