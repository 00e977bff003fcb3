"""PPO on noisy steps of a flow: exact ratios, the share of the gradient that one step sees, a warm-up of the critic."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.agents.agent_helpers import Shift

from contraflow.agents.onpolicy.flow_ppo import FlowPPO, PlannedFlow
from contraflow.core.optim import Optim
from contraflow.core.types import EnvSpec, Rollout
from contraflow.flow.model import Flow, FlowSpec
from contraflow.flow.plan import CPS, FlowSDE, Plan
from contraflow.flow.support import Real
from contraflow.nets.mlp import MLPSpec
from contraflow.nets.velocity import ResidualMLP
from contraflow.rl.ppo import PPOSettings

SPEC = EnvSpec(1, 2, 4, None, True)
NET = FlowSpec(network=ResidualMLP(16, 1, 8))
PLANS = [
    Plan(4, FlowSDE(0.5), window=1, place="random"),
    Plan(4, FlowSDE(0.5)),
    Plan(4, CPS(0.5), window=2, place="random"),
]
PPO = PPOSettings(epochs=1, minibatches=1, critic=MLPSpec(8, 1, "tanh"), scale_reward=False)


def start(agent):
    return jax.jit(lambda key: agent.init(key, SPEC))(jr.key(0))


def rollout(agent, state, key, reward=None):
    obs = jnp.zeros((6, 4, 1))
    k_act, k_reward = jr.split(key)
    keys = jr.split(k_act, (6, 4))
    action, steps = jax.vmap(jax.vmap(agent.policy(state).sample))(obs, keys)
    true = jnp.ones((6, 4), bool)
    reward = jr.normal(k_reward, (6, 4)) if reward is None else reward(action)
    return Rollout(obs, steps, reward, obs, true, ~true, true)


@pytest.mark.parametrize("plan", PLANS)
def test_the_ratio_is_one_for_the_policy_that_acted(plan):
    agent = FlowPPO(NET, plan, ppo=PPO)
    state = start(agent)
    _, steps = state.actor.sample(jnp.zeros(1), jr.key(1))
    np.testing.assert_allclose(state.actor.log_ratio(jnp.zeros(1), steps), 0.0, atol=1e-5)
    _, metrics = jax.jit(agent.update)(state, rollout(agent, state, jr.key(2)), jr.key(3))
    assert abs(float(metrics["kl"])) < 1e-6 and float(metrics["clip_share"]) == 0


def test_ratios_of_another_policy_average_to_one():
    """E_old[p / p_old] = 1 over 20 000 draws, within four standard errors: the density is normalised."""
    plan = Plan(4, FlowSDE(0.7), window=1, place="random")
    old, new = (PlannedFlow(Flow(Shift(2, m, 0.5), replace(NET, clock=1.0, support=Real())), plan) for m in (0.1, 0.2))
    steps = jax.vmap(lambda k: old.sample(jnp.zeros(1), k)[1])(jr.split(jr.key(0), 20_000))
    rho = jnp.exp(jax.vmap(lambda s: new.log_ratio(jnp.zeros(1), s))(steps))[:, 0]
    assert float(rho.std()) > 0.05
    assert abs(float(rho.mean()) - 1) < 4 * float(rho.std()) / 20_000**0.5


def test_one_noisy_step_sees_its_share_of_the_gradient():
    """For the reward a and the velocity c + (what leads to N(0, .5^2)), d E[a] / d c is a sum over steps of the push of
    each, damped by the steps after it. One random noisy step sees only its own: 1 / K of the sum on average."""
    field = Flow(Shift(1, 0.0, 0.5), replace(NET, clock=1.0, support=Real()))

    def score(plan, n=60_000):
        actor = PlannedFlow(field, plan)

        def sample(key):
            action, steps = actor.sample(jnp.zeros(1), key)
            # The push c moves the mean by h (1 + a^2 / 2) c.
            push = plan.h * (1 + plan.noise.a**2 / 2)
            noise = jnp.sum((steps.new - steps.mean)[:, 0] * push / steps.std**2)
            return action[0] * noise

        values = jax.jit(jax.vmap(sample))(jr.split(jr.key(0), n))
        return float(values.mean()), float(values.std()) / n**0.5

    whole, error = score(Plan(4, FlowSDE(0.7)))
    single, other = score(Plan(4, FlowSDE(0.7), window=1, place="random"))
    ratio = single / whole
    spread = 4 * (other / abs(whole) + abs(ratio) * error / abs(whole))
    assert abs(ratio - 0.25) < 0.06 + spread and whole > 5 * error  # the steps after it differ: ODE or noisy


def test_the_critic_learns_first():
    agent = FlowPPO(NET, PLANS[0], ppo=replace(PPO, warmup=2))
    state = start(agent)
    update = jax.jit(agent.update)
    for i in range(3):
        new, _ = update(state, rollout(agent, state, jr.key(i)), jr.key(i))
        same = jax.tree.map(lambda a, b: bool((a == b).all()), new.actor, state.actor)
        assert all(jax.tree.leaves(same)) == (i < 2)
        assert not np.array_equal(new.critic.last.bias, state.critic.last.bias)
        state = new


@pytest.mark.parametrize("plan", PLANS)
def test_it_climbs_a_reward(plan):
    """Thirty updates on r = -|a - .5|^2 improve the mean reward of the deployed policy."""
    agent = FlowPPO(NET, plan, ppo=replace(PPO, epochs=4, minibatches=1, actor_optim=Optim(3e-3)))
    state = start(agent)
    reward = lambda action: -jnp.sum((action - 0.5) ** 2, -1)

    def value(state):
        actions = jax.vmap(lambda k: agent.policy(state)(jnp.zeros(1), k))(jr.split(jr.key(9), 256))
        return float(reward(actions).mean())

    before = value(state)
    step = jax.jit(lambda s, k: agent.update(s, rollout(agent, s, jr.fold_in(k, 0), reward), jr.fold_in(k, 1))[0])
    for i in range(30):
        state = step(state, jr.key(i))
    assert value(state) > before + 0.2


@pytest.mark.parametrize("bad", [Plan(4, window=2, branches=(2, 2)), Plan(4, window=2, place="sweep")])
def test_plans_of_groups_are_refused(bad):
    with pytest.raises(ValueError, match="leave branches"):
        FlowPPO(plan=bad)
    with pytest.raises(ValueError, match="warmup"):
        PPOSettings(warmup=-1)
