"""What the probe environments teach each agent, and that a time limit is not an end."""

from dataclasses import dataclass, replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.train.loop_helpers import CRITIC, QUICK, WARM, begin, learner_of, run_epoch

from contraflow.agents.online.common import NOISE_IN_BOX
from contraflow.agents.online.dacer import DACER
from contraflow.agents.online.pmd import PMD, Candidates
from contraflow.agents.online.rfm import RFM, SMALL, Choice, PosteriorTarget
from contraflow.agents.online.sac import SAC
from contraflow.agents.online.sir import SIR
from contraflow.agents.online.td3 import TD3
from contraflow.core.optim import Optim
from contraflow.data.samplers import Uniform
from contraflow.envs.probe import PROBES, mistaken_value
from contraflow.flow.model import Ddim, FlowSpec
from contraflow.flow.posterior.control import Fixed
from contraflow.flow.posterior.importance import Reverse
from contraflow.flow.posterior.local import Local
from contraflow.flow.posterior.proposal import TruncatedNoise
from contraflow.flow.solver import Euler
from contraflow.nets.mlp import MLPSpec
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.best_of import First, Softmax
from contraflow.rl.critics import Critics
from contraflow.rl.temperature import Constant
from contraflow.training.evaluate import evaluate
from contraflow.training.sources.replay import Interact


def study(agent, env, iterations):
    """The trained state after a warm-up of 20 iterations."""
    carry = begin(agent, env, jr.key(0), 4096)
    carry, _, _ = run_epoch(WARM, agent, env, carry, jr.key(1), 20)
    learning = Interact(False, 2, 64, Uniform(agent.gamma))
    carry, _, _ = run_epoch(learning, agent, env, carry, jr.key(2), iterations)
    return learner_of(carry).agent


@dataclass(frozen=True)
class Mistaken:
    """An adapter with the classical bug: it reports a time limit as an end."""

    env: Any

    @property
    def spec(self):
        return self.env.spec

    def reset(self, key):
        return self.env.reset(key)

    def step(self, state, action):
        state, step = self.env.step(state, action)
        return state, eqx.tree_at(lambda s: s.terminated, step, step.terminated | step.truncated)


def values(state, obs, action=0.0):
    return np.asarray(jax.vmap(lambda o: state.critic.value(o, jnp.full(1, action)))(obs))


def test_truncation_is_not_an_end():
    env, gamma = PROBES["truncation"](4), 0.7
    agent = replace(QUICK, critic=replace(CRITIC, gamma=gamma, width=16))
    obs = jnp.arange(5.0)[:, None] / 5
    right, wrong = (study(agent, e, 500) for e in (env, Mistaken(env)))
    np.testing.assert_allclose(values(right, obs), 1 / (1 - gamma), atol=0.25)
    mistaken = np.asarray(jax.vmap(lambda o: mistaken_value(o, gamma))(obs))
    np.testing.assert_allclose(values(wrong, obs), mistaken, atol=0.4)
    assert mistaken[-1] == 1  # so the two cannot be confused: 3.33 against 1


FAST, QUICKER = Optim(1e-3, max_grad_norm=10.0), Optim(3e-3, max_grad_norm=10.0)
LEARNING = Critics(width=32, tau=0.02, gamma=0.8, optim=QUICKER)
PICKS = Choice(explore=Softmax(8), backup=Softmax(8))
LATENT = replace(SMALL, network=ResidualMLP(32, 2, 128))
BOX = replace(NOISE_IN_BOX, network=ResidualMLP(32, 2, 128))
STEPS = FlowSpec(network=ResidualMLP(32, 2, 32))
MLP = MLPSpec(32, 2)
LEARNERS = {
    "rfm": RFM(LATENT, choose=PICKS, temperature=Constant(0.02), critic=LEARNING, optim=FAST),
    "qne": RFM(
        replace(BOX, solver=Euler(5)), PosteriorTarget(Reverse(16, TruncatedNoise(), Fixed(0.0)), "buffer"), PICKS,
        Constant(0.02), critic=LEARNING, optim=FAST,
    ),
    # Its target is the slope of Q / lambda at every noise level: steep where lambda is small.
    "qsm": RFM(BOX, PosteriorTarget(Local(), "buffer"), PICKS, Constant(0.1), critic=LEARNING, optim=QUICKER),
    "pmd": PMD(
        replace(STEPS, solver=Ddim(5)), candidates=Candidates(own=16, noise=0.1), temperature=Constant(0.02), tau=0.02,
        critic=LEARNING, optim=FAST,
    ),
    "dacer": DACER(replace(STEPS, solver=Ddim(3)), draws=4, optim=Optim(1e-3), critic=LEARNING),
    "td3": TD3(actor=MLP, optim=Optim(1e-3), critic=LEARNING),
    "sac": SAC(
        actor=MLP, optim=Optim(1e-3), alpha_optim=Optim(1e-2), init_alpha=0.1,
        critic=replace(LEARNING, optim=Optim(3e-3)),
    ),
    "sir": SIR(critic=LEARNING),
}  # fmt: skip


@pytest.mark.learn
@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("name", LEARNERS)
def test_probes_are_learned(name, probe):
    """Values within .1 (.05 of the larger ones) and actions within .15 of the known ones."""
    agent, env = LEARNERS[name], PROBES[probe](4)
    state = study(agent, env, 1500)
    obs = {
        "obs": jnp.array([[-1.0], [1.0]]),
        "two-step": jnp.array([[0.0], [1.0]]),
        "obs-action": jnp.linspace(-0.7, 0.7, 8)[:, None],
        "truncation": jnp.arange(5.0)[:, None] / 5,
    }.get(probe, jnp.zeros((1, 1)))
    best, policy = jax.vmap(env.best_action)(obs), agent.policy(state)
    got = jax.vmap(state.critic.value)(obs, best)
    np.testing.assert_allclose(got, jax.vmap(lambda o: env.value(o, agent.critic.gamma))(obs), rtol=0.05, atol=0.1)
    if probe in ("action", "obs-action"):
        act = jax.vmap(lambda o, k: policy(o, k))(obs, jr.split(jr.key(9), obs.shape[0]))
        np.testing.assert_allclose(act, best, atol=0.15)
    returns = evaluate(policy, env, jr.key(10), 20)
    assert returns.shape == (20,) and np.isfinite(returns).all()


@pytest.mark.learn
def test_a_flow_policy_learns_where_to_go():
    """The quick one of the above: reward 1 - (a - 1/2)^2."""
    agent = replace(
        LEARNERS["rfm"],
        flow=replace(SMALL, network=ResidualMLP(16, 1, 8)),
        choose=replace(PICKS, explore=First()),
        optim=QUICKER,
        critic=replace(LEARNING, width=16, depth=1, optim=Optim(1e-2, max_grad_norm=10.0)),
        temperature=Constant(0.05),
    )
    env = PROBES["action"](4)
    state = study(agent, env, 400)
    policy = agent.policy(state)
    actions = jax.jit(jax.vmap(lambda k: policy(jnp.zeros(1), k, False)))(jr.split(jr.key(5), 500))
    # exp(-(a - .5)^2 / .05) is about N(.5, .16^2); the policy began near mean 0 and standard deviation .6.
    np.testing.assert_allclose(np.mean(actions), 0.5, atol=0.1)
    np.testing.assert_allclose(np.std(actions), 0.158, atol=0.08)
    np.testing.assert_allclose(values(state, jnp.zeros((1, 1)), 0.5), 1, atol=0.1)
