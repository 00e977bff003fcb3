"""AC-Flow: the critic against its closed form, and the reductions to reward-weighted matching and to pretraining."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from tests.agents.align.matching_helpers import (
    Fitted,
    Moved,
    flattened,
    flow_of,
    gaussian,
    gradient,
    groups,
    normals,
    one_group,
    small,
    start,
    update,
    variance,
)

from contraflow.agents.align.ac_flow import ACFlow
from contraflow.agents.align.rwr import RWR
from contraflow.core.optim import Optim
from contraflow.core.types import EnvSpec
from contraflow.flow.model import FlowSpec
from contraflow.nets.mlp import MLPSpec
from contraflow.nets.velocity import ResidualMLP

Z = normals(2048)
NET = FlowSpec(network=ResidualMLP(8, 1, 4))
READY = ACFlow(flow=NET, critic_net=MLPSpec(8, 1), warmup=0, critic_steps=1)


def value(agent, key, dim=2, cond=3):
    """A fresh critic."""
    return agent.init(key, EnvSpec(cond, dim, 1, 1, True)).extra


def test_the_critic_learns_the_mean_reward_of_what_a_noisy_sample_becomes():
    """x1 ~ N(.5, .6^2), r = -(x1 - 1)^2: E[r | x_t] = -(m - 1)^2 - var, with the posterior mean m and variance: a
    parabola in x_t. The root of the mean square error, in deviations of r, for x_t in the bulk."""
    agent = ACFlow(critic_net=MLPSpec(64, 2), warmup=10**6, critic_steps=800, critic_optim=Optim(3e-3, 800))
    flow, x1 = flow_of(Fitted(jnp.array([0.5]), jnp.log(jnp.array([0.6])))), 0.5 + 0.6 * Z
    reward = -((x1 - 1.0) ** 2)
    state, _ = update(agent, start(flow, agent.optim, value(agent, jr.key(0), 1, 1)), one_group(x1, reward), jr.key(1))
    errors, right = [], []
    for t in (0.2, 0.5, 0.8):
        var = variance(t, 0.6)
        x = t * 0.5 + jnp.sqrt(var) * jnp.linspace(-1.5, 1.5, 13)
        mean = x + (1 - t) * gaussian(x, t, 0.5, 0.6)
        exact = (-((mean - 1) ** 2) - (0.6 * (1 - t)) ** 2 / var - jnp.mean(reward)) / jnp.std(reward)
        at = lambda x, t=t: agent.value(state.extra.net, jnp.zeros(1), x[None], jnp.asarray(t))
        errors.append(jax.vmap(at)(x) - exact)
        right.append(exact)
    errors, right = np.concatenate(errors), np.concatenate(right)
    assert np.sqrt(np.mean(errors**2)) < 0.12 and np.ptp(right) > 2, (np.sqrt(np.mean(errors**2)), np.ptp(right))


def test_the_warm_up_leaves_the_flow():
    """Bit for bit, with its optimiser; the iteration after it moves both."""
    agent = replace(READY, warmup=2, minibatches=2)
    state = start(small(jr.key(0)), agent.optim, value(agent, jr.key(1)))
    for i in range(3):
        new, _ = update(agent, state, groups(jr.key(10 + i)), jr.key(20 + i))
        same = [
            np.array_equal(a, b)
            for a, b in zip(jax.tree.leaves((new.flow, new.opt)), jax.tree.leaves((state.flow, state.opt)), strict=True)
        ]
        assert all(same) if i < 2 else not all(same)
        assert not np.array_equal(new.extra.net.last.weight, state.extra.net.last.weight)
        state = new


def test_a_clip_of_zero_is_pretraining_on_the_flows_own_samples():
    """No trace of the rewards is left, and the distribution has no reason to move: the gradient is that of equal
    rewards in reward-weighted matching."""
    flow, agent = small(jr.key(0)), replace(READY, clip=0.0, anchor=0.0, times=3)
    of = lambda scored: flattened(gradient(agent, start(flow, Optim(), value(agent, jr.key(1))), scored, jr.key(2))[0])
    one, two = of(groups(jr.key(3))), of(groups(jr.key(3), reward=jnp.ones((3, 4))))
    np.testing.assert_allclose(one, two, atol=1e-6 * jnp.abs(one).max(), rtol=0)
    other = flattened(
        gradient(replace(agent, clip=1.0), start(flow, Optim(), value(agent, jr.key(1))), groups(jr.key(3)), jr.key(2))[
            0
        ]
    )
    assert jnp.abs(other - one).max() > 0.05 * jnp.abs(one).max()


def test_without_the_critic_it_is_reward_weighted_matching():
    """The same minimum: w differs from exp(r / temperature) by a constant factor, as rewards are shifted and divided by
    their deviation. On N(0, 1) with r = 2 x1 and the moments of 2048 samples, the tilt is that of z / temperature."""
    one = lambda x, t: [1.0 + 0.0 * x]
    old = flow_of(Moved(jnp.zeros(1), one))
    agent = replace(READY, baseline=False, clip=9.0, anchor=0.0, temperature=2.0, times=32)
    rwr = RWR(temperature=2.0, anchor=0.0, times=32)
    shifts = {}
    for name, method in (("ac", agent), ("rwr", rwr), ("critic", replace(agent, baseline=True))):
        extra = None if name == "rwr" else value(agent, jr.key(1), 1, 1)
        low, high = (
            float(
                gradient(
                    method,
                    start(flow_of(Moved(jnp.full(1, d), one)), Optim(), extra, old),
                    one_group(Z, 2 * Z),
                    jr.key(0),
                )[0].net.theta[0]
            )
            for d in (0.0, 1.0)
        )
        shifts[name] = -low / (high - low)
    np.testing.assert_allclose(shifts["rwr"], np.pi / 8, rtol=0.04)  # k pi / 4 with k = 1 / 2
    np.testing.assert_allclose(shifts["ac"], np.pi / 8, rtol=0.04)


def test_the_critic_leaves_the_minimum():
    """V is the same for all x1 at x_t, so the velocity of the tilted Gaussian has no gradient, whatever V is: here a
    random network, with rewards x1 and weights exp(x1 - V)."""
    agent = replace(READY, clip=9.0, anchor=0.0, times=64, critic_optim=Optim(1e-9))
    extra = value(agent, jr.key(1), 1, 1)
    extra = replace(extra, net=jax.tree.map(lambda x: 2 * x, extra.net))
    features = lambda x, t: [(1 - t) / variance(t), 1.0 + 0.0 * x, x, t + 0.0 * x]
    slopes = []
    for theta in (0.0, 1.0):  # N(1, 1): the velocity moves by 1 - t (2 t - 1) / var = (1 - t) / var
        flow = flow_of(Moved(jnp.array([theta, 0.0, 0.0, 0.0]), features))
        slopes.append(gradient(agent, start(flow, Optim(), extra), one_group(Z, Z), jr.key(0))[0].net.theta)
    assert jnp.abs(slopes[1]).max() < 0.04 * jnp.abs(slopes[0]).max()
