"""DACER on a bandit with a known Q: the sampler collapses to the best action, noise keeps the entropy."""

from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from contraflow.agents.online.dacer import DACER, into_box
from contraflow.core.types import EnvSpec, Transition
from contraflow.flow.path import Linear
from contraflow.nets.critic import QEnsemble
from contraflow.rl.critics import Critics
from contraflow.rl.flow_policy import FlowPolicy
from contraflow.rl.temperature import Tuned

SPEC = EnvSpec(1, 1, 1, 1, True)
AGENT = DACER(
    policy=FlowPolicy(path=Linear(), steps=3, width=16, depth=1, embedding=4), actor_lr=3e-3,
    critic=Critics(width=1, depth=1, lr=1e-30), scale=Tuned(entropy=-0.9, start=1.0, rate=2e-2),
)  # fmt: skip


class Parabola(QEnsemble):
    """Q(a) = -(a - .4)^2 whatever its parameters."""

    def outputs(self, obs, action):
        return -jnp.sum((action - 0.4) ** 2) * jnp.ones((self.num, 1))


@partial(jax.jit, static_argnums=(0, 1))
def train(agent, updates):
    state = agent.init(jr.key(0), SPEC)
    critic, target = (Parabola(2, 1, 1, 1, 1, key=jr.key(i)) for i in (1, 2))
    state = eqx.tree_at(lambda s: (s.critic, s.target), state, (critic, target))
    zeros, ended = jnp.zeros((32, 1)), jnp.ones(32, bool)
    batch = Transition(zeros, zeros, zeros[:, 0], zeros, ended, ~ended, jnp.ones(32, int))
    return jax.lax.scan(lambda s, k: agent.update(s, batch, k), state, jr.split(jr.key(3), updates))


@pytest.fixture(scope="module")
def trained():
    return train(AGENT, 1500)


def test_the_sampler_collapses_to_the_best_action(trained):
    """No entropy in the gradient: whatever x_0 is, the end is the maximum of a concave Q."""
    act = jax.jit(jax.vmap(lambda k: AGENT.act(trained[0], jnp.zeros(1), k, False)))
    a = np.asarray(act(jr.split(jr.key(1), 500)))
    np.testing.assert_allclose([a.mean(), a.std()], [0.4, 0.0], atol=0.05)


def test_the_noise_keeps_the_entropy(trained):
    """N(.4, s^2) of entropy -.9 has s = exp(-.9) / sqrt(2 pi e) = .098."""
    state, metrics = trained
    np.testing.assert_allclose(metrics["entropy"][-300:].mean(), -0.9, atol=0.05)
    act = jax.jit(jax.vmap(lambda k: AGENT.act(state, jnp.zeros(1), k, True)))
    np.testing.assert_allclose(act(jr.split(jr.key(1), 2000)).std(), 0.098, atol=0.012)


def test_one_step_without_noise_is_the_deterministic_policy_gradient():
    agent = replace(AGENT, policy=replace(AGENT.policy, steps=1))
    actor = jax.jit(lambda k: agent.init(k, SPEC))(jr.key(0)).actor
    obs, key = jnp.zeros(1), jr.key(5)
    x0 = jr.normal(jr.clone(key), (1,))

    def value(actor):
        return -jnp.sum((agent._sample(actor, obs, jr.clone(key)) - 0.4) ** 2)

    def by_hand(actor):
        return jnp.clip(x0 + agent.policy.output(actor, x0, jnp.zeros(()), jnp.ones(()), obs), -1.0, 1.0)

    slope = -2 * (by_hand(actor) - 0.4)  # dQ/da
    _, pull = jax.vjp(by_hand, actor)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), jax.grad(value)(actor), pull(slope)[0]
    )


def test_only_what_can_be_is_accepted():
    for bad in ({"draws": 3}, {"noise": 0.0}, {"actor_lr": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            DACER(**bad)


def test_an_end_beyond_the_box_comes_back_and_goes_no_further():
    """The gradient reaches the actor where it leads back to the maximum, and does not where it leads out."""
    agent = replace(AGENT, policy=replace(AGENT.policy, steps=1))
    actor = jax.jit(lambda k: agent.init(k, SPEC))(jr.key(0)).actor
    actor = eqx.tree_at(lambda a: a.last.bias, actor, jnp.full(1, 50.0))

    def loss(actor, best):
        return jnp.sum((agent._sample(actor, jnp.zeros(1), jr.key(5)) - best) ** 2)

    np.testing.assert_allclose(loss(actor, 0.4), 0.36, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(loss)(actor, 0.4).last.bias, 1.2, rtol=1e-5)
    np.testing.assert_array_equal(jax.grad(loss)(actor, 1.6).last.bias, 0.0)
    end, slope = jnp.array([-2.0, -2.0, -0.5, 0.5, 2.0]), jnp.array([1.0, -1.0, -1.0, -1.0, 1.0])
    np.testing.assert_array_equal(jax.vjp(into_box, end)[1](slope)[0], [0, -1, -1, -1, 1])
