"""What RFM learns of a known Q whose best actions have two modes: both, in their shares."""

from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.agents.agent_helpers import bandit
from tests.compiled import optimised

from contraflow.agents.online.rfm import RFM, SMALL, Choice
from contraflow.core.optim import Optim
from contraflow.core.types import EnvSpec
from contraflow.nets.critic import QEnsemble
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.best_of import First
from contraflow.policy.flow import FlowPolicy
from contraflow.rl.critics import Critics
from contraflow.rl.temperature import Constant

SHARE = 1 / 3  # of the mode at (-.5, ..., -.5)


def hill(action, centre, along, across):
    """Log-density of a Gaussian with these widths along the diagonal and across it."""
    on = jnp.mean(action - centre) * jnp.sqrt(action.size)
    off = jnp.sum((action - centre) ** 2) - on**2
    return -0.5 * (on / along) ** 2 - 0.5 * off / across**2


class Ridge(QEnsemble):
    """Q / lambda is the log-density of a Gaussian in the middle, .25 wide along the diagonal and .05 across."""

    def outputs(self, obs, action):
        return hill(action, 0.0, 0.25, 0.05) * jnp.ones((self.num, 1))


class TwoModes(QEnsemble):
    """Q / lambda is the log-density of two Gaussians on the diagonal, .2 wide along it and .1 across."""

    def outputs(self, obs, action):
        def one(centre):
            return hill(action, centre, 0.2, 0.1)

        q = jnp.logaddexp(jnp.log(1 - SHARE) + one(0.5), jnp.log(SHARE) + one(-0.5))
        return q * jnp.ones((self.num, 1))


def agent(target):
    return RFM(
        flow=replace(SMALL, network=ResidualMLP(64, 2, 16)), target=target,
        choose=Choice(First(), First(), First()), temperature=Constant(1.0),
        critic=Critics(width=1, depth=1, optim=Optim(1e-30)), optim=Optim(2e-3, max_grad_norm=10.0),
    )  # fmt: skip


@partial(optimised, static_argnums=(0, 1, 2, 4))
def learn(agent, dim, updates, key, critic_class=TwoModes):
    """Actions [4000, d] of the actor averaged over the last half of the updates, and the metrics."""
    k_init, k_learn, k_act = jr.split(key, 3)
    state = agent.init(k_init, EnvSpec(1, dim, 1, 1, True))
    critic, target = (critic_class(2, 1, dim, 1, 1, key=jr.key(i)) for i in (1, 2))
    state = eqx.tree_at(lambda s: (s.critic, s.target), state, (critic, target))

    def step(carry, inputs):
        state, average = carry
        key, weight = inputs
        state, metrics = agent.update(state, bandit(128, dim), key)
        return (state, jax.tree.map(lambda a, b: a + weight * (b - a), average, state.actor)), metrics

    weights = 1.0 / jnp.maximum(1.0, jnp.arange(updates) - updates // 2)
    (_, average), metrics = jax.lax.scan(step, (state, state.actor), (jr.split(k_learn, updates), weights))
    return FlowPolicy(average).particles(jnp.zeros(1), k_act, 4000), metrics


def test_both_modes_are_kept_in_their_shares():
    with jax.debug_key_reuse(False):  # jax 0.10 takes the keys that a scan splits for used ones
        actions, metrics = learn(agent(RFM().target), 3, 1500, jr.key(0))
    assert abs(np.mean(np.asarray(actions).mean(1) < 0) - SHARE) < 0.1
    assert metrics["jumps"][-500:].mean() > 0.3


@pytest.mark.learn
@pytest.mark.parametrize("dim", [6, 12])
def test_both_modes_are_kept_in_many_dimensions(dim):
    with jax.debug_key_reuse(False):
        actions, _ = learn(agent(RFM().target), dim, 3000, jr.key(0))
    assert abs(np.mean(np.asarray(actions).mean(1) < 0) - SHARE) < 0.12


@pytest.mark.learn
def test_a_narrow_ridge_has_its_widths():
    """Within 15 % of .25 along and .05 across, in six dimensions."""
    with jax.debug_key_reuse(False):
        actions = np.asarray(learn(agent(RFM().target), 6, 3000, jr.key(0), Ridge)[0])
    along = actions.mean(1) * np.sqrt(6)
    across = np.sqrt((np.sum(actions**2, 1) - along**2).mean() / 5)
    np.testing.assert_allclose([np.sqrt(np.mean(along**2)), across], [0.25, 0.05], rtol=0.15)
