"""PMD on bandits with a known Q: the law of one iterate, self-distillation, and the weights of its relatives."""

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

from contraflow.agents.online.pmd import PMD, Candidates, Selection
from contraflow.core.optim import Optim
from contraflow.core.types import EnvSpec
from contraflow.flow.fewstep import MeanFlow
from contraflow.flow.model import Ddim, FlowSpec
from contraflow.nets.critic import QEnsemble
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.best_of import Argmax
from contraflow.policy.flow import FlowPolicy
from contraflow.rl.critics import Critics
from contraflow.rl.temperature import Constant, Tuned

SPEC = EnvSpec(1, 1, 1, 1, True)
SLOPE, LAM = 1.0, 1.0
AGENT = PMD(
    flow=FlowSpec(solver=Ddim(20), network=ResidualMLP(32, 2, 8)), candidates=Candidates(own=16, noise=0.0), tau=1e-30,
    temperature=Constant(LAM), critic=Critics(width=1, depth=1, optim=Optim(1e-30)), optim=Optim(3e-3),
    choose=Selection(greedy=Argmax(4)),
)  # fmt: skip


class Rising(QEnsemble):
    """Q(a) = SLOPE a whatever its parameters."""

    def outputs(self, obs, action):
        return SLOPE * action[0] * jnp.ones((self.num, 1))


class Flat(QEnsemble):
    def outputs(self, obs, action):
        return jnp.ones((self.num, 1))


def train(agent, kind, updates):
    """Before and after, with the critic `kind`; the mean of the last half of the actors."""
    state = agent.init(jr.key(0), SPEC)
    critic, target = (kind(2, 1, 1, 1, 1, key=jr.key(i)) for i in (1, 2))
    first = eqx.tree_at(lambda s: (s.critic, s.target), state, (critic, target))
    weights = 1.0 / jnp.maximum(1.0, jnp.arange(updates) - updates // 2)
    last, average, metrics = run(agent, first, jr.split(jr.key(3), updates), weights)
    return first, eqx.tree_at(lambda s: s.actor, last, average), metrics


@partial(optimised, static_argnums=0)
def run(agent, first, keys, weights):
    def step(carry, inputs):
        state, average = carry
        key, weight = inputs
        state, metrics = agent.update(state, bandit(64), key)
        return (state, jax.tree.map(lambda a, b: a + weight * (b - a), average, state.actor)), metrics

    (last, average), metrics = jax.lax.scan(step, (first, first.actor), (keys, weights))
    return last, average, metrics


def draws(actor, n=4000):
    return np.asarray(jax.jit(lambda a: FlowPolicy(a).particles(jnp.zeros(1), jr.key(9), n))(actor))[:, 0].astype(float)


def test_one_iterate_of_mirror_descent():
    """The slow copy stands still: the actor becomes pi_old(a) exp(Q(a) / lambda) / Z, whatever law pi_old is."""
    first, last, _ = train(AGENT, Rising, 1500)
    old, new = draws(first.slow), draws(last.actor)
    w = np.exp(SLOPE * old / LAM)
    w /= w.sum()
    mean = w @ old
    spread = np.sqrt(w @ (old - mean) ** 2)
    assert abs(mean - old.mean()) > 0.15  # there is something to learn
    # Sixteen candidates leave a bias towards the old law.
    np.testing.assert_allclose([new.mean(), new.std()], [mean, spread], atol=0.06)


def test_equal_values_leave_the_policy_as_it_is():
    first, last, metrics = train(AGENT, Flat, 1000)
    old, new = draws(first.slow), draws(last.actor)
    np.testing.assert_allclose([new.mean(), new.std()], [old.mean(), old.std()], atol=0.05)
    np.testing.assert_allclose(metrics["entropy"], np.log(16), rtol=1e-4)


def test_advantage_weights_seek_the_best_and_uniform_actions_keep_wide():
    """QVPO: the best of its own candidates draws the policy to the maximum; uniform actions alone to U(-1, 1)."""
    seek = replace(AGENT, candidates=Candidates(16, 0.0, weight="advantage"), tau=0.05)
    _, last, _ = train(seek, Rising, 800)
    assert draws(last.actor).mean() > 0.85
    wide = replace(AGENT, candidates=Candidates(16, 0.0, uniform=16, uniform_share=1e4))
    _, last, _ = train(wide, Rising, 1000)
    a = draws(last.actor)
    np.testing.assert_allclose([a.mean(), a.std()], [0.0, 3**-0.5], atol=0.08)


def test_temperature_is_tuned_to_the_entropy_of_the_weights():
    agent = replace(AGENT, temperature=Tuned(2.4, of="weights", start=0.05, rate=0.02), optim=Optim(1e-30))
    _, _, metrics = train(agent, Rising, 600)
    assert metrics["entropy"][0] < 2.0
    np.testing.assert_allclose(metrics["entropy"][-200:].mean(), 2.4, atol=0.1)


class Signed(QEnsemble):
    """Q(a) = b a, b the bias of the last layer."""

    def outputs(self, obs, action):
        return action[0] * self.members.last.bias

    @classmethod
    def of(cls, bias):
        return eqx.tree_at(lambda q: q.members.last.bias, cls(2, 1, 1, 1, 1, key=jr.key(1)), jnp.full((2, 1), bias))


def test_the_backup_chooses_by_the_target():
    """Of 64 actions of the slow copy the one that the target values most; the online critic would take the least."""
    agent = replace(AGENT, choose=Selection(backup=Argmax(64)))
    state = agent.init(jr.key(0), SPEC)
    state = eqx.tree_at(lambda s: (s.critic, s.target), state, (Signed.of(-1.0), Signed.of(1.0)))
    _, metrics = jax.jit(agent.update)(state, bandit(16, discount=0.5), jr.key(3))
    np.testing.assert_allclose(metrics["q"], 0.5 * draws(state.slow).max(), rtol=0.05)


def test_only_what_can_be_is_accepted():
    for bad in ({"own": 0}, {"noise": -0.1}, {"uniform": -1}, {"uniform_share": -0.1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Candidates(**bad)
    for bad in ({"tau": 0.0}, {"temperature": Tuned()}, {"objective": MeanFlow(power=1.0)}):
        with pytest.raises(ValueError, match=r"tau|temperature|power"):
            PMD(**bad)
