"""TD3 on a bandit with a known Q: where it goes, how it explores, when its actor moves, what its targets are."""

from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.agents.agent_helpers import bandit

from contraflow.agents.online.td3 import TD3
from contraflow.core.optim import Optim
from contraflow.core.types import EnvSpec
from contraflow.nets.critic import QEnsemble
from contraflow.nets.mlp import MLPSpec
from contraflow.rl.critics import Critics

SPEC = EnvSpec(1, 1, 1, 1, True)
CRITIC = Critics(width=8, depth=1, tau=0.1, optim=Optim(1e-2, max_grad_norm=10.0))
AGENT = TD3(actor=MLPSpec(8, 1), optim=Optim(1e-2), critic=CRITIC)


class Parabola(QEnsemble):
    """Members -(a - .4)^2 and that + 1, whatever their parameters: the lower one counts."""

    def outputs(self, obs, action):
        q = -jnp.sum((action - 0.4) ** 2)
        return jnp.stack([q, q + 1.0])[:, None]


def start(agent):
    state = agent.init(jr.key(0), SPEC)
    critic, target = (Parabola(2, 1, 1, 8, 1, key=jr.key(i)) for i in (1, 2))
    opt = jax.vmap(agent.critic.optim.tx.init)(critic.members)
    return eqx.tree_at(lambda s: (s.critic, s.target, s.critic_opt), state, (critic, target, opt))


@partial(jax.jit, static_argnums=0)
def after(agent, state, keys):
    return jax.lax.scan(lambda s, k: agent.update(s, bandit(16), k), state, keys)[0]


def test_it_finds_the_best_action():
    state = after(AGENT, start(AGENT), jr.split(jr.key(1), 600))
    policy = AGENT.policy(state)
    np.testing.assert_allclose(policy(jnp.zeros(1), jr.key(0)), [0.4], rtol=0.025)  # Adam at 1e-2 wanders by that much
    act = jax.jit(jax.vmap(lambda k: policy(jnp.zeros(1), k, False)))
    np.testing.assert_allclose(act(jr.split(jr.key(2), 2000)).std(), 0.1, rtol=0.1)


def test_the_actor_waits():
    agent = replace(AGENT, delay=3)
    state = start(agent)
    update = jax.jit(agent.update)
    moved = []
    for i in range(6):
        new, _ = update(state, bandit(4), jr.key(i))
        moved.append(not np.array_equal(new.actor.last.bias, state.actor.last.bias))
        if moved[-1]:
            slow = 0.9 * state.slow.last.bias + 0.1 * new.actor.last.bias
            np.testing.assert_allclose(new.slow.last.bias, slow, rtol=1e-5, atol=1e-7)
        state = new
    assert moved == [False, False, True] * 2


def test_targets_are_smoothed_and_made_by_the_slow_copy():
    """a' = clip(a + clip(N(0, .2^2), -.5, .5)) with a = tanh of the slow actor, here 0: E Q = -(.4^2 + .2^2)."""
    state = start(AGENT)
    slow = eqx.tree_at(lambda a: (a.last.weight, a.last.bias), state.slow, replace_fn=jnp.zeros_like)
    elsewhere = eqx.tree_at(lambda a: a.last.bias, state.actor, jnp.ones(1))
    state = eqx.tree_at(lambda s: (s.slow, s.actor), state, (slow, elsewhere))
    _, metrics = jax.jit(AGENT.update)(state, bandit(4000, discount=0.99), jr.key(1))
    np.testing.assert_allclose(metrics["q"], -0.99 * (0.16 + 0.04), rtol=0.05)  # seven errors of a mean of 4000
    still = replace(AGENT, smoothing=0.0)
    np.testing.assert_allclose(
        jax.jit(still.update)(state, bandit(4, discount=0.99), jr.key(1))[1]["q"], -0.99 * 0.16, rtol=1e-4
    )


def test_only_what_can_be_is_accepted():
    for bad in ({"delay": 0}, {"noise": -0.1}, {"smoothing": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            TD3(**bad)
