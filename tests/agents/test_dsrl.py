"""Steering a frozen policy by its noise: closed forms of an affine policy and a quadratic value."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.agents.agent_helpers import Frozen, Shift, bandit

from contraflow.agents.online.dsrl import DSRL
from contraflow.core.optim import Optim
from contraflow.core.types import EnvSpec
from contraflow.flow.model import Flow, FlowSpec
from contraflow.nets.critic import QEnsemble
from contraflow.nets.mlp import MLPSpec
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.flow import FlowPolicy
from contraflow.policy.start_noise import Bounded, Prior, Steered, moments
from contraflow.rl.critics import Critics

SPEC = EnvSpec(1, 2, 1, None, False)
M, S, C = 0.1, 0.3, jnp.array([0.3, -0.2])
NET = FlowSpec(clock=1.0, network=ResidualMLP(8, 1))
SMALL = DSRL(NET, critic=Critics(width=48, optim=Optim(3e-3)), actor=MLPSpec(8, 1), optim=Optim(3e-3, 1500))
FROZEN = replace(SMALL, critic=Frozen(**vars(SMALL.critic)))


class Parabola(QEnsemble):
    """Two critics of actions, -2 |a - c|^2."""

    def outputs(self, obs, action):
        return jnp.full((2, 1), -2.0 * jnp.sum((action - C) ** 2))


def start(agent, spec=SPEC):
    """The frozen policy is a = m + s w."""
    state = jax.jit(lambda key: agent.init(key, spec))(jr.key(0))
    base = Flow(Shift(spec.action_dim, M, S), NET)
    return replace(state, base=base, critic=Parabola(2, 1, 2, 8, 1, key=jr.key(1)))


@partial(jax.jit, static_argnums=(0, 2))
def after(agent, state, alpha, key):
    """1500 updates on one state with a fixed alpha."""

    def one(state, key):
        state = replace(state, log_alpha=jnp.log(jnp.asarray(alpha)))
        return agent.update(state, bandit(64, 2), key)[0], None

    return jax.lax.scan(one, state, jr.split(key, 1500))[0]


@pytest.mark.parametrize("alpha", [0.2, 2.0])
def test_the_prior_form_reaches_the_tilt_of_the_noise(alpha):
    """N(w; 0, I) exp(-2 |m + s w - c|^2 / alpha): precision 1 + 4 s^2 / alpha, mean 4 s (c - m) / (alpha + 4 s^2)."""
    state = after(FROZEN, start(FROZEN), alpha, jr.key(2))
    mean, std = moments(state.actor(jnp.zeros(1)))
    precision = 1 + 4 * S**2 / alpha
    np.testing.assert_allclose(mean, 4 * S * (C - M) / alpha / precision, atol=0.05)  # Q_w is a network of 48 units
    np.testing.assert_allclose(std, precision**-0.5, rtol=0.08)


def test_the_first_policy_of_the_prior_form_is_the_frozen_one():
    """Mean 0 and std 1 up to the small first weights, hence no relative entropy to N(0, I)."""
    state = jax.jit(lambda key: SMALL.init(key, SPEC))(jr.key(0))
    mean, std = moments(state.actor(jnp.ones(1)))
    assert float(jnp.sum(mean**2 + std**2 - 1 - 2 * jnp.log(std)) / 2) < 2e-3


def test_noise_is_valued_by_the_action_that_it_leads_to():
    """Q_w(s, w) = Q(s, f(s, w)) where w is drawn, without an action of the steered policy in the data."""
    state = after(FROZEN, start(FROZEN), 1.0, jr.key(3))
    w = jr.normal(jr.key(4), (200, 2))
    got = jax.vmap(lambda w: state.noise_critic.value(jnp.zeros(1), w))(w)
    right = -2 * jnp.sum((M + S * w - C[None]) ** 2, -1)
    assert float(jnp.std(got - right)) < 0.05 * float(jnp.std(right))


def test_actions_stay_within_reach():
    """Bounded noise reaches m +- s b; bound -> 0 leaves f(s, 0)."""
    for bound in (0.5, 1e-6):
        agent = replace(SMALL, form=Bounded(bound))
        state = start(agent)
        act = partial(agent.policy(state), jnp.zeros(1), greedy=False)
        actions = jax.vmap(act)(jr.split(jr.key(0), 200))
        assert float(jnp.abs(actions - M).max()) <= S * bound + 1e-6


def test_one_noise_for_all_actions_of_a_chunk():
    spec = replace(SPEC, action_dim=6, horizon=3, execute=3)
    agent = replace(SMALL, repeat=True)
    state = start(agent, spec)
    chunk = agent.policy(state)(jnp.zeros(1), jr.key(0)).reshape(3, 2)
    np.testing.assert_allclose(chunk, np.broadcast_to(chunk[0], (3, 2)), rtol=1e-6)
    assert state.actor.last.bias.shape == (4,)


def test_the_frozen_policy_never_changes():
    agent = SMALL
    state = jax.jit(lambda key: agent.init(key, SPEC))(jr.key(0))
    new, _ = jax.jit(agent.update)(state, bandit(16, 2, 0.9), jr.key(1))
    jax.tree.map(np.testing.assert_array_equal, new.base, state.base)
    assert not np.allclose(new.actor.last.bias, state.actor.last.bias)


def test_steering_by_given_noise_is_the_frozen_policy():
    base = FlowPolicy(Flow(Shift(2, M, S), NET))
    steered = Steered(base, MLPSpec(8, 1).init(jr.key(0), 1, 4), Prior())
    w = jnp.array([0.4, -0.7])
    np.testing.assert_array_equal(steered.act(jnp.zeros(1), w), base.from_noise(jnp.zeros(1), w))
    np.testing.assert_allclose(steered.act(jnp.zeros(1), w), M + S * w, rtol=1e-5)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="own"):
        DSRL(own=1.5)
    with pytest.raises(ValueError, match="bound"):
        Bounded(0.0)
