"""Edits beside a frozen policy: the best edit in closed form, its limits, and a person's corrections."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.agents.agent_helpers import Frozen, Shift

from contraflow.agents import presets
from contraflow.agents.online.residual import RLT, Residual
from contraflow.core.optim import Optim
from contraflow.core.types import Batch, EnvSpec
from contraflow.flow.model import Flow, FlowSpec
from contraflow.nets.critic import QEnsemble
from contraflow.nets.mlp import MLPSpec
from contraflow.nets.velocity import ResidualMLP
from contraflow.rl.critics import Critics

SPEC = EnvSpec(1, 2, 1, None, False)
M, S = 0.1, 0.3
C = jnp.array([0.3, -0.6])
NET = FlowSpec(clock=1.0, network=ResidualMLP(8, 1))
SMALL = Residual(
    NET, critic=Frozen(**vars(Critics(width=8, depth=1))), actor=MLPSpec(32, 2), optim=Optim(1e-2, 1200), noise=0.0
)


class Parabola(QEnsemble):
    """Two critics of actions, -2 |a - c|^2."""

    def outputs(self, obs, action):
        return jnp.full((2, 1), -2.0 * jnp.sum((action - C) ** 2))


def rows(n: int = 64, human=None) -> Batch:
    """Half at state 0 and half at state 1; a person may have acted in the second half, by (.5, .5)."""
    obs = (jnp.arange(n) >= n // 2).astype(jnp.float32)[:, None]
    action = jnp.full((n, 2), 0.5)
    marks = None if human is None else jnp.broadcast_to(human * obs, (n, 2))
    return Batch(obs, action, obs[:, 0], obs[:, 0], obs, jnp.ones((n, 2)), human=marks)


def start(agent, s=S):
    """The frozen policy is a_0 = m + s z."""
    state = jax.jit(lambda key: agent.init(key, SPEC))(jr.key(0))
    return replace(state, base=Flow(Shift(2, M, s), NET), critic=Parabola(2, 1, 2, 8, 1, key=jr.key(1)))


@partial(jax.jit, static_argnums=0)
def after(agent, state, batch, bc, key):
    """1200 updates."""

    def one(state, key):
        return agent.update(state, batch, key)[0], None

    return jax.lax.scan(one, state, jr.split(key, 1200))[0]


def edits(agent, state, x: float, obs: float = 0.0):
    """The edited action of a_0 = (x, x)."""
    action, policy = jnp.full(2, x), agent.policy(state)
    return policy.edited(jnp.array([obs]), action, action)


@pytest.mark.parametrize("bc", [0.0, 4.0])
def test_the_edit_climbs_to_the_best_action_within_reach(bc):
    """min 2 |a - c|^2 + bc |a - a_0|^2 / 2 at (2 c + bc a_0 / 2) / (2 + bc / 2), within .25 of a_0."""
    agent = replace(SMALL, scale=0.25, bc=bc)
    state = after(agent, start(agent), rows(), bc, jr.key(2))
    for x in (-0.2, 0.1, 0.4):
        free = (2 * C + bc * x / 2) / (2 + bc / 2)
        np.testing.assert_allclose(edits(agent, state, x), jnp.clip(free, x - 0.25, x + 0.25), atol=0.05)  # 32 units


def test_a_large_weight_leaves_the_frozen_policy_and_a_person_overrules_it():
    """bc -> infinity: a_0 where nobody took over, and where a person did, what the person did."""
    agent = replace(RLT, **{name: getattr(SMALL, name) for name in ("flow", "critic", "actor", "optim")}, bc=1e4)
    state = after(agent, start(agent), rows(human=1.0), 0, jr.key(3))
    for x in (-0.2, 0.3):
        np.testing.assert_allclose(edits(agent, state, x, 0.0), x, atol=0.08)  # half of the rows do not see x
        np.testing.assert_allclose(edits(agent, state, x, 1.0), 0.5, atol=0.08)


def test_without_edits_and_at_the_start_it_is_the_frozen_policy():
    """Scale 0 for any actor, and any scale for the first one: bit for bit."""
    for agent in (replace(SMALL, scale=0.0), SMALL, RLT):
        state = replace(agent, critic=SMALL.critic).init(jr.key(0), SPEC)
        if agent.scale == 0:
            state = replace(state, actor=jax.tree.map(lambda x: x + 1.0, state.actor))
        policy = agent.policy(state)
        k_policy, _ = jr.split(jr.key(5))
        got, right = policy(jnp.ones(1), jr.key(5)), policy.policy(jnp.ones(1), k_policy)
        np.testing.assert_array_equal(got, right)


def test_the_frozen_policy_never_changes():
    agent = replace(SMALL, critic=Critics(width=8, depth=1))
    state = jax.jit(lambda key: agent.init(key, SPEC))(jr.key(0))
    new, _ = jax.jit(agent.update)(state, rows(16), jr.key(1))
    jax.tree.map(np.testing.assert_array_equal, new.base, state.base)
    assert not np.allclose(new.actor.last.bias, state.actor.last.bias)


def test_settings_out_of_range_are_refused():
    for wrong in ({"scale": 3.0}, {"drop": -0.1}, {"bc": -1.0}, {"noise": -1.0}):
        with pytest.raises(ValueError, match="scale must lie"):
            Residual(**wrong)
    assert presets()["rlt"].agent == RLT
