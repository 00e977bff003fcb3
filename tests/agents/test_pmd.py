"""PMD on bandits with a known Q: the law of one iterate, self-distillation, and the weights of its relatives."""

from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from contraflow.agents.online.pmd import PMD
from contraflow.core.types import EnvSpec, Transition
from contraflow.flow.path import Linear
from contraflow.nets.critic import QEnsemble
from contraflow.policy.select import Argmax
from contraflow.rl.critics import Critics
from contraflow.rl.flow_policy import FlowPolicy
from contraflow.rl.temperature import Constant, Tuned

SPEC = EnvSpec(1, 1, 1, 1, True)
SLOPE, LAM = 1.0, 1.0
AGENT = PMD(
    policy=FlowPolicy(path=Linear(), steps=20, width=32, depth=2, embedding=8), candidates=16, noise=0.0, follow=1e-30,
    temperature=Constant(LAM), critic=Critics(width=1, depth=1, lr=1e-30), actor_lr=3e-3, greedy=Argmax(4),
)  # fmt: skip


class Rising(QEnsemble):
    """Q(a) = SLOPE a whatever its parameters."""

    def outputs(self, obs, action):
        return SLOPE * action[0] * jnp.ones((self.num, 1))


class Flat(QEnsemble):
    def outputs(self, obs, action):
        return jnp.ones((self.num, 1))


def batch(n):
    zeros, ended = jnp.zeros((n, 1)), jnp.ones(n, bool)
    return Transition(zeros, zeros, zeros[:, 0], zeros, ended, ~ended, jnp.ones(n, int))


@partial(jax.jit, static_argnums=(0, 1, 2))
def train(agent, kind, updates):
    """Before and after, with the critic `kind`; the mean of the last half of the actors."""
    state = agent.init(jr.key(0), SPEC)
    critic, target = (kind(2, 1, 1, 1, 1, key=jr.key(i)) for i in (1, 2))
    first = eqx.tree_at(lambda s: (s.critic, s.target), state, (critic, target))

    def step(carry, inputs):
        state, average = carry
        key, weight = inputs
        state, metrics = agent.update(state, batch(64), key)
        return (state, jax.tree.map(lambda a, b: a + weight * (b - a), average, state.actor)), metrics

    weights = 1.0 / jnp.maximum(1.0, jnp.arange(updates) - updates // 2)
    (last, average), metrics = jax.lax.scan(step, (first, first.actor), (jr.split(jr.key(3), updates), weights))
    return first, eqx.tree_at(lambda s: s.actor, last, average), metrics


def draws(agent, actor, n=4000):
    return np.asarray(jax.jit(lambda a: agent._draw(a, jnp.zeros(1), jr.key(9), n))(actor))[:, 0].astype(float)


def test_one_iterate_of_mirror_descent():
    """The slow copy stands still: the actor becomes pi_old(a) exp(Q(a) / lambda) / Z, whatever law pi_old is."""
    first, last, _ = train(AGENT, Rising, 2500)
    old, new = draws(AGENT, first.slow), draws(AGENT, last.actor)
    w = np.exp(SLOPE * old / LAM)
    w /= w.sum()
    mean = w @ old
    spread = np.sqrt(w @ (old - mean) ** 2)
    assert abs(mean - old.mean()) > 0.15  # there is something to learn
    # Sixteen candidates leave a bias towards the old law.
    np.testing.assert_allclose([new.mean(), new.std()], [mean, spread], atol=0.06)


def test_equal_values_leave_the_policy_as_it_is():
    first, last, metrics = train(AGENT, Flat, 1200)
    old, new = draws(AGENT, first.slow), draws(AGENT, last.actor)
    np.testing.assert_allclose([new.mean(), new.std()], [old.mean(), old.std()], atol=0.05)
    np.testing.assert_allclose(metrics["entropy"], np.log(16), rtol=1e-4)


def test_advantage_weights_seek_the_best_and_uniform_actions_keep_wide():
    """QVPO: the best of its own candidates draws the policy to the maximum; uniform actions alone to U(-1, 1)."""
    seek = replace(AGENT, weight="advantage", follow=0.05)
    _, last, _ = train(seek, Rising, 1200)
    assert draws(seek, last.actor).mean() > 0.85
    wide = replace(AGENT, uniform=16, uniform_share=1e4)
    _, last, _ = train(wide, Rising, 1500)
    a = draws(wide, last.actor)
    np.testing.assert_allclose([a.mean(), a.std()], [0.0, 3**-0.5], atol=0.08)


def test_temperature_is_tuned_to_the_entropy_of_the_weights():
    agent = replace(AGENT, temperature=Tuned(2.4, of="weights", start=0.05, rate=0.02), actor_lr=1e-30)
    _, _, metrics = train(agent, Rising, 800)
    assert metrics["entropy"][0] < 2.0
    np.testing.assert_allclose(metrics["entropy"][-200:].mean(), 2.4, atol=0.1)


def test_only_what_can_be_is_accepted():
    for bad in ({"candidates": 0}, {"follow": 0.0}, {"actor_lr": -1.0}, {"noise": -0.1}, {"uniform": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            PMD(**bad)
