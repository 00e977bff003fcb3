"""DACER on a bandit with a known Q: the sampler collapses to the best action, noise keeps the entropy."""

from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.agents.agent_helpers import bandit

from contraflow.agents.online.dacer import DACER, into_box
from contraflow.core.optim import Optim
from contraflow.core.types import EnvSpec
from contraflow.flow.model import Ddim, FlowSpec
from contraflow.nets.critic import QEnsemble
from contraflow.nets.velocity import ResidualMLP
from contraflow.rl.critics import Critics
from contraflow.rl.temperature import Tuned

SPEC = EnvSpec(1, 1, 1, 1, True)
AGENT = DACER(
    flow=FlowSpec(solver=Ddim(3), network=ResidualMLP(16, 1, 4)), optim=Optim(3e-3),
    critic=Critics(width=1, depth=1, optim=Optim(1e-30)), scale=Tuned(entropy=-0.9, start=1.0, rate=2e-2),
)  # fmt: skip
ONE_STEP = replace(AGENT, flow=replace(AGENT.flow, solver=Ddim(1)))


class Parabola(QEnsemble):
    """Q(a) = -(a - .4)^2 whatever its parameters."""

    def outputs(self, obs, action):
        return -jnp.sum((action - 0.4) ** 2) * jnp.ones((self.num, 1))


def train(agent, updates):
    state = agent.init(jr.key(0), SPEC)
    critic, target = (Parabola(2, 1, 1, 1, 1, key=jr.key(i)) for i in (1, 2))
    state = eqx.tree_at(lambda s: (s.critic, s.target), state, (critic, target))
    return run(agent, state, jr.split(jr.key(3), updates))


@partial(jax.jit, static_argnums=0)
def run(agent, state, keys):
    return jax.lax.scan(lambda s, k: agent.update(s, bandit(32), k), state, keys)


@pytest.fixture(scope="module")
def trained():
    return train(AGENT, 1500)


def test_the_sampler_collapses_to_the_best_action(trained):
    """No entropy in the gradient: whatever x_0 is, the end is the maximum of a concave Q."""
    act = jax.jit(jax.vmap(lambda k: AGENT.policy(trained[0])(jnp.zeros(1), k)))
    a = np.asarray(act(jr.split(jr.key(1), 500)))
    np.testing.assert_allclose([a.mean(), a.std()], [0.4, 0.0], atol=0.05)


def test_the_noise_keeps_the_entropy(trained):
    """N(.4, s^2) of entropy -.9 has s = exp(-.9) / sqrt(2 pi e) = .098."""
    state, metrics = trained
    np.testing.assert_allclose(metrics["entropy"][-300:].mean(), -0.9, atol=0.05)
    act = jax.jit(jax.vmap(lambda k: AGENT.policy(state)(jnp.zeros(1), k, False)))
    np.testing.assert_allclose(
        act(jr.split(jr.key(1), 2000)).std(), 0.098, rtol=0.12
    )  # e^.05 and the spread of .01 or so of the ends


def end_of(actor, key):
    """The action that gradients pass through, and what the network would make of its noise in one step by hand."""
    x0 = actor.noise(key)
    by_hand = x0 + actor.output(x0, jnp.zeros(()), jnp.zeros(1), jnp.ones(()))
    return into_box(actor.sample(x0, jnp.zeros(1))), jnp.clip(by_hand, -1.0, 1.0)


def test_one_step_without_noise_is_the_deterministic_policy_gradient():
    actor = ONE_STEP.init(jr.key(0), SPEC).actor

    def value(actor):
        return -jnp.sum((end_of(actor, jr.key(5))[0] - 0.4) ** 2)

    end, pull = jax.vjp(lambda actor: end_of(actor, jr.key(5))[1], actor)
    slope = -2 * (end - 0.4)  # dQ/da
    for got, want in zip(jax.tree.leaves(jax.grad(value)(actor)), jax.tree.leaves(pull(slope)[0]), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(jnp.abs(want).max()))  # roundings of float32


def test_the_update_climbs_that_gradient():
    """Adam's first step has the size of the rate and the sign of the gradient, here that of Q at the ends."""
    state, _ = train(ONE_STEP, 1)
    first = ONE_STEP.init(jr.key(0), SPEC).actor
    keys = jr.split(jr.split(jr.split(jr.key(3), 1)[0], 4)[2], 32)  # as `update` splits it

    def value(actor):
        return jnp.mean(jax.vmap(lambda k: -jnp.sum((end_of(actor, k)[0] - 0.4) ** 2))(keys))

    slope = jax.grad(value)(first).net.last.bias
    np.testing.assert_allclose(state.actor.net.last.bias - first.net.last.bias, 3e-3 * jnp.sign(slope), rtol=1e-3)


def test_only_what_can_be_is_accepted():
    for bad in ({"draws": 3}, {"noise": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            DACER(**bad)


def test_an_end_beyond_the_box_comes_back_and_goes_no_further():
    """The gradient reaches the actor where it leads back to the maximum, and does not where it leads out."""
    actor = ONE_STEP.init(jr.key(0), SPEC).actor
    actor = eqx.tree_at(lambda a: a.net.last.bias, actor, jnp.full(1, 50.0))

    def loss(actor, best):
        return jnp.sum((end_of(actor, jr.key(5))[0] - best) ** 2)

    np.testing.assert_allclose(loss(actor, 0.4), 0.36, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(loss)(actor, 0.4).net.last.bias, 1.2, rtol=1e-5)
    np.testing.assert_array_equal(jax.grad(loss)(actor, 1.6).net.last.bias, 0.0)
    end, slope = jnp.array([-2.0, -2.0, -0.5, 0.5, 2.0]), jnp.array([1.0, -1.0, -1.0, -1.0, 1.0])
    np.testing.assert_array_equal(jax.vjp(into_box, end)[1](slope)[0], [0, -1, -1, -1, 1])
