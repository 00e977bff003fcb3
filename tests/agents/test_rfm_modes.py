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

from contraflow.agents.online.rfm import RFM, SMALL, Choice, PosteriorTarget
from contraflow.core.optim import Optim
from contraflow.core.types import EnvSpec
from contraflow.flow.posterior.gibbs import Gibbs
from contraflow.flow.posterior.jump import ModeJump
from contraflow.flow.solver import Midpoint
from contraflow.nets.critic import QEnsemble
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.best_of import First
from contraflow.policy.flow import FlowPolicy
from contraflow.rl.critics import Critics
from contraflow.rl.temperature import Constant

SHARE = 1 / 3  # of the mode at (-.5, ..., -.5)


class TwoModes(QEnsemble):
    """Q / lambda is the log-density of two Gaussians on the diagonal, .2 wide along it and .1 across."""

    def outputs(self, obs, action):
        def one(centre):
            along = jnp.mean(action - centre) * jnp.sqrt(action.size)
            across = jnp.sum((action - centre) ** 2) - along**2
            return -0.5 * (along / 0.2) ** 2 - 0.5 * across / 0.1**2

        q = jnp.logaddexp(jnp.log(1 - SHARE) + one(0.5), jnp.log(SHARE) + one(-0.5))
        return q * jnp.ones((self.num, 1))


def agent(target):
    return RFM(
        flow=replace(SMALL, solver=Midpoint(3, 1.35), network=ResidualMLP(64, 2, 16)), target=target,
        choose=Choice(First(), First(), First()), temperature=Constant(1.0),
        critic=Critics(width=1, depth=1, optim=Optim(1e-30)), optim=Optim(2e-3, max_grad_norm=10.0),
    )  # fmt: skip


@partial(optimised, static_argnums=(0, 1, 2))
def learn(agent, dim, updates, key):
    """Actions [4000, d] of the actor averaged over the last half of the updates, and the metrics."""
    k_init, k_learn, k_act = jr.split(key, 3)
    state = agent.init(k_init, EnvSpec(1, dim, 1, 1, True))
    critic, target = (TwoModes(2, 1, dim, 1, 1, key=jr.key(i)) for i in (1, 2))
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
        actions, metrics = learn(agent(PosteriorTarget(Gibbs(4), jump=ModeJump())), 3, 1500, jr.key(0))
    assert abs(np.mean(np.asarray(actions).mean(1) < 0) - SHARE) < 0.1
    assert metrics["jumps"][-500:].mean() > 0.3


@pytest.mark.learn
@pytest.mark.parametrize("dim", [6, 12])
def test_both_modes_are_kept_in_many_dimensions(dim):
    with jax.debug_key_reuse(False):
        actions, _ = learn(agent(PosteriorTarget(Gibbs(4), jump=ModeJump())), dim, 3000, jr.key(0))
    assert abs(np.mean(np.asarray(actions).mean(1) < 0) - SHARE) < 0.12
