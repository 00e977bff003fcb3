"""ReBRAC against cloning and the closed form of a quadratic value."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.agents.agent_helpers import Frozen, with_slope

from contraflow.agents.offline.rebrac import REBRAC
from contraflow.core.optim import Optim
from contraflow.core.types import Batch, EnvSpec
from contraflow.nets.critic import QEnsemble
from contraflow.nets.mlp import MLPSpec
from contraflow.rl.critics import Critics

SPEC = EnvSpec(1, 2, 1, None, False)
CRITIC = Critics(width=8, depth=1, tau=0.1, optim=Optim(1e-2))
SMALL = replace(REBRAC, actor=MLPSpec(8, 1), critic=CRITIC, optim=Optim(1e-2, decay_steps=1500), delay=1)
FROZEN = replace(SMALL, critic=Frozen(**vars(CRITIC)))


class Parabola(QEnsemble):
    """Members -2 |a - c|^2, c = (.6, -.4), and that + 1, whatever their parameters: the lower one counts."""

    def outputs(self, obs, action):
        q = -2.0 * jnp.sum((action - jnp.array([0.6, -0.4])) ** 2)
        return jnp.stack([q, q + 1.0])[:, None]


def start(agent):
    return jax.jit(lambda key: agent.init(key, SPEC))(jr.key(0))


def data(key, n=64, mask=None):
    """Actions N((-.2, .5), .1^2) at one state, the next ones N(0, .3^2)."""
    k = jr.split(key, 3)
    action = jnp.array([[-0.2, 0.5]]) + 0.1 * jr.normal(k[0], (n, 2))
    zeros, ones = jnp.zeros((n, 1)), jnp.ones((n, 2))
    reward, after = jr.normal(k[1], (n,)), 0.3 * jr.normal(k[2], (n, 2))
    return Batch(zeros, action, reward, jnp.full(n, 0.9), zeros, ones if mask is None else mask, after, ones)


@partial(jax.jit, static_argnums=0)
def after(agent, state):
    def one(state, key):
        return agent.update(state, data(jr.fold_in(key, 1)), key)[0], None

    return jax.lax.scan(one, state, jr.split(jr.key(1), 1500))[0]


@pytest.mark.parametrize("penalty", [0.0, 1.0, 6.0, 1e4])
def test_the_actor_weighs_the_data_against_a_quadratic_value(penalty):
    """w |a - a_data|^2 + k |a - c|^2 is least at (w m + k c) / (w + k), m the mean of the data, k = 2: at c without a
    penalty, and cloning as it grows."""
    agent = replace(FROZEN, actor_penalty=penalty, normalise_q=False)
    state = start(agent)
    state = after(agent, replace(state, critic=Parabola(2, 1, 2, 8, 1, key=jr.key(1))))
    wanted = (penalty * np.array([-0.2, 0.5]) + 2 * np.array([0.6, -0.4])) / (penalty + 2)
    got = agent.policy(state)(jnp.zeros(1), jr.key(0))
    np.testing.assert_allclose(got, wanted, atol=0.01)  # Adam at 1e-3 in the end, batches of 64


@pytest.mark.parametrize("normalise", [True, False])
def test_the_size_of_rewards_does_not_matter_where_q_is_normalised(normalise):
    agent, moved, batch = replace(FROZEN, normalise_q=normalise), [], replace(data(jr.key(1)), obs=jnp.ones((64, 1)))
    for scale in (1.0, 1000.0):
        state = with_slope(start(agent), scale * jnp.ones(2))
        moved.append(float(jax.jit(agent.update)(state, batch, jr.key(2))[1]["actor_grad_norm"]))
    assert (abs(moved[1] / moved[0] - 1) < 1e-3) == normalise


def test_targets_pay_for_the_distance_from_what_the_data_do_next():
    """y = r + discount (g . a' - w sum_j m_j (a'_j - a'_data,j)^2), with unknown next actions free of charge."""
    agent = replace(SMALL, critic_penalty=0.7, smoothing=0.0)
    state = with_slope(start(agent), jnp.array([0.5, -1.0]))
    batch = data(jr.key(1))
    known = jnp.ones((64, 2)).at[:10].set(0.0).at[20:30, 1].set(0.0)
    batch = replace(batch, next_mask=known, next_obs=jnp.ones((64, 1)))
    _, metrics = jax.jit(agent.update)(state, batch, jr.key(2))
    action = jnp.tanh(state.slow(jnp.ones(1)))[None]
    assert jnp.abs(action).min() > 0.01
    q = action @ jnp.array([0.5, -1.0]) - 0.7 * jnp.sum(known * (action - batch.next_action) ** 2, -1)
    np.testing.assert_allclose(metrics["q"], jnp.mean(batch.reward + 0.9 * q), rtol=1e-3)  # of the plane's lift, 10
    _, free = jax.jit(agent.update)(state, replace(batch, next_action=None, next_mask=None), jr.key(2))
    wanted = jnp.mean(batch.reward) + 0.9 * (action[0] @ jnp.array([0.5, -1.0]))
    np.testing.assert_allclose(free["q"], wanted, rtol=1e-3)


def test_masked_actions_are_not_cloned():
    agent = replace(FROZEN, actor_penalty=1.0)
    state = with_slope(start(agent), jnp.zeros(2))
    new, _ = jax.jit(agent.update)(state, data(jr.key(1), mask=jnp.ones((64, 2)).at[:, 1].set(0.0)), jr.key(2))
    moved = new.actor.last.bias - state.actor.last.bias
    assert moved[1] == 0 and jnp.abs(moved[0]) > 1e-3


def test_only_what_can_be_is_accepted():
    for bad in ({"delay": 0}, {"actor_penalty": -1.0}, {"critic_penalty": -0.1}, {"smoothing": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            replace(REBRAC, **bad)
