"""What the probe environments teach each agent, and that a time limit is not an end."""

from dataclasses import dataclass, replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.train.loop_helpers import CRITIC, QUICK, WARM, begin

from contraflow.agents import DACER, PMD, TD3
from contraflow.agents.online.rfm import RFM
from contraflow.agents.online.sac import SAC
from contraflow.agents.online.sir import SIR
from contraflow.envs.probe import PROBES
from contraflow.flow.posterior.control import Fixed
from contraflow.flow.posterior.importance import Reverse
from contraflow.flow.posterior.local import Local
from contraflow.flow.posterior.proposal import TruncatedNoise
from contraflow.flow.solver import Euler
from contraflow.policy.select import Softmax
from contraflow.rl.critics import Critics
from contraflow.rl.flow_policy import FlowPolicy
from contraflow.rl.temperature import Constant
from contraflow.train.evaluate import evaluate
from contraflow.train.loop import epoch
from contraflow.train.offpolicy import OffPolicy


def study(agent, env, iterations):
    """The trained state after a warm-up of 20 iterations."""
    carry = begin(agent, env, jr.key(0), 4096)
    carry, _, _ = epoch(WARM, agent, env, carry, jr.key(1), 20)
    carry, _, _ = epoch(OffPolicy(False, 2, 64), agent, env, carry, jr.key(2), iterations)
    return carry.learner.agent


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
    mistaken = np.asarray(jax.vmap(lambda o: env.mistaken_value(o, gamma))(obs))
    np.testing.assert_allclose(values(wrong, obs), mistaken, atol=0.4)
    assert mistaken[-1] == 1  # so the two cannot be confused: 3.33 against 1


LEARNING = Critics(width=32, lr=3e-3, tau=0.02, gamma=0.8)
HELD: dict[str, Any] = {"explore": Softmax(8), "backup": Softmax(8), "temperature": Constant(0.02)}
LEARNERS = {
    "rfm": RFM(width=32, critic=LEARNING, **HELD),
    "qne": RFM(
        width=32, solver=Euler(5), estimator=Reverse(16, TruncatedNoise(), Fixed(0.0)), actor_lr=1e-3, critic=LEARNING,
        bounds="box", predict="noise", endpoint="buffer", **HELD,
    ),
    # Its target is the slope of Q / lambda at every noise level: steep where lambda is small.
    "qsm": RFM(
        width=32, solver=Euler(20), estimator=Local(), actor_lr=3e-3, critic=LEARNING, bounds="box", predict="noise",
        endpoint="buffer", **HELD | {"temperature": Constant(0.1)},
    ),
    "pmd": PMD(
        policy=FlowPolicy(steps=5, width=32, depth=2), candidates=16, temperature=Constant(0.02), follow=0.02,
        noise=0.1, actor_lr=1e-3, critic=LEARNING,
    ),
    "dacer": DACER(policy=FlowPolicy(steps=3, width=32, depth=2), draws=4, actor_lr=1e-3, critic=LEARNING),
    "td3": TD3(width=32, actor_lr=1e-3, critic=LEARNING),
    "sac": SAC(width=32, actor_lr=1e-3, alpha_lr=1e-2, init_alpha=0.1, critic=replace(LEARNING, max_grad_norm=None)),
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
    best = jax.vmap(env.best_action)(obs)
    got = jax.vmap(state.critic.value)(obs, best)
    np.testing.assert_allclose(got, jax.vmap(lambda o: env.value(o, agent.critic.gamma))(obs), rtol=0.05, atol=0.1)
    if probe in ("action", "obs-action"):
        act = jax.vmap(lambda o, k: agent.act(state, o, k, False))(obs, jr.split(jr.key(9), obs.shape[0]))
        np.testing.assert_allclose(act, best, atol=0.15)
    returns = evaluate(agent, state, env, jr.key(10), 20)
    assert returns.shape == (20,) and np.isfinite(returns).all()


@pytest.mark.learn
def test_a_flow_policy_learns_where_to_go():
    """The quick one of the above: reward 1 - (a - 1/2)^2."""
    agent = replace(
        LEARNERS["rfm"],
        width=16,
        depth=1,
        embedding=8,
        actor_lr=3e-3,
        critic=replace(LEARNING, width=16, depth=1, lr=1e-2),
        temperature=Constant(0.05),
    )
    env = PROBES["action"](4)
    state = study(agent, env, 400)
    plain = replace(agent, explore=Softmax(1))
    actions = jax.jit(jax.vmap(lambda k: plain.act(state, jnp.zeros(1), k, True)))(jr.split(jr.key(5), 500))
    # exp(-(a - .5)^2 / .05) is about N(.5, .16^2); the policy began near mean 0 and standard deviation .6.
    np.testing.assert_allclose(np.mean(actions), 0.5, atol=0.1)
    np.testing.assert_allclose(np.std(actions), 0.158, atol=0.08)
    np.testing.assert_allclose(values(state, jnp.zeros((1, 1)), 0.5), 1, atol=0.1)
