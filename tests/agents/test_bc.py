"""Imitation: the loss against one computed by hand, masks, and what one network evaluation can do."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from contraflow.agents.offline.bc import BC
from contraflow.core.types import Chunks, EnvSpec
from contraflow.flow.coupling import Weighted
from contraflow.flow.fewstep import Matching, MeanFlow, Shortcut, SplitMeanFlow
from contraflow.flow.path import VP
from contraflow.rl.flow_policy import FlowPolicy

SPEC = EnvSpec(3, 4, 1, None, False, horizon=2, execute=2)
SMALL = FlowPolicy(width=16, depth=1, embedding=8, steps=4)
OBJECTIVES = [Matching(), Shortcut(), MeanFlow(power=1.0), SplitMeanFlow()]


def batch(key, n=8):
    k1, k2 = jr.split(key)
    valid = jnp.ones((n, 4)).at[: n // 2, 2:].set(0.0)
    return Chunks(jr.normal(k1, (n, 3)), jr.uniform(k2, (n, 4), minval=-1.0), valid)


class Record(FlowPolicy):
    """A policy that remembers what its network was asked."""

    asked: list = []  # noqa: RUF012

    def output(self, net, x, t, r, obs):
        jax.debug.callback(lambda *a: self.asked.append([np.asarray(v) for v in a]), x, t, r, obs)
        return super().output(net, x, t, r, obs)


@pytest.mark.parametrize("predict", ["velocity", pytest.param("noise", marks=pytest.mark.slow)])
def test_the_loss_by_hand(predict: str):
    """x_t is on the path of the action, the target belongs to it, and masked numbers do not count."""
    path = VP() if predict == "noise" else SMALL.path
    policy = Record(width=16, depth=1, embedding=8, path=path, predict=predict)
    agent = BC(policy)
    state = jax.jit(lambda k: agent.init(k, SPEC))(jr.key(0))
    data = batch(jr.key(1))
    Record.asked.clear()
    _, metrics = jax.jit(agent.update)(state, data, jr.key(2))
    jax.effects_barrier()
    rows = {tuple(np.round(obs, 5)): (x, t) for x, t, _, obs in Record.asked}
    assert len(rows) == 8

    @jax.jit
    def square(obs, action, valid, x, t):
        x0 = path.x0_from_x1(action, x, t)
        target = x0 if predict == "noise" else path.velocity(action, x, t)
        error = FlowPolicy.output(policy, state.net, x, t, t, obs) - target
        return jnp.sum(valid * error**2) / valid.sum(), jnp.mean(x0)

    squares = []
    for obs, action, valid in zip(data.obs, data.action, data.valid, strict=True):
        x, t = (jnp.asarray(v) for v in rows[tuple(np.round(np.asarray(obs), 5))])
        value, x0 = square(obs, action, valid, x, t)
        squares.append(value)
        assert abs(float(x0)) < 3
    np.testing.assert_allclose(metrics["matching_loss"], jnp.mean(jnp.stack(squares)), rtol=1e-3)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_one_update(objective):
    agent = BC(SMALL, objective=objective, coupling=Weighted(), dispersion=0.1)
    state = jax.jit(lambda k: agent.init(k, SPEC))(jr.key(0))
    new, metrics = jax.jit(agent.update)(state, batch(jr.key(1)), jr.key(2))
    assert new.step == 1 and all(np.isfinite(float(x)) for x in metrics.values())
    assert ("tie_loss" in metrics) == objective.averaged
    # The average catches up: (1 + 0) / (10 + 0) of the old at the first update.
    for old, net, average in zip(*(jax.tree.leaves(x) for x in (state.net, new.net, new.average)), strict=True):
        np.testing.assert_allclose(average, 0.1 * old + 0.9 * net, atol=1e-6)
    action = jax.jit(lambda s: agent.act(s, jnp.ones(3), jr.key(3), False))(new)
    assert action.shape == (4,) and jnp.abs(action).max() <= 1


@pytest.mark.slow
def test_a_transformer_learns_too():
    agent = BC(replace(SMALL, network="transformer"))
    state = jax.jit(lambda k: agent.init(k, SPEC))(jr.key(0))
    update, losses = jax.jit(agent.update), []
    for i in range(60):
        state, metrics = update(state, batch(jr.key(1)), jr.key(i))
        losses.append(float(metrics["matching_loss"]))
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    with pytest.raises(ValueError, match="multiple of 4"):
        FlowPolicy(network="transformer", width=18)


def modes(key, n):
    """Two modes at +-(.5, .5), deviation .1."""
    k1, k2 = jr.split(key)
    sign = jnp.where(jr.bernoulli(k1, 0.5, (n, 1)), 0.5, -0.5)
    return jnp.concatenate([sign, sign], 1) + 0.1 * jr.normal(k2, (n, 2))


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_one_evaluation(objective):
    """Flow matching in one step gives the mean of the data; the others give the data."""
    agent = BC(FlowPolicy(width=64, depth=2, embedding=16), objective=objective, lr=1e-3, ema=0.99)
    state = agent.init(jr.key(0), EnvSpec(1, 2, 1, None, False))

    @jax.jit
    def train(state, key):
        def step(state, key):
            k_data, k_update = jr.split(key)
            x = modes(k_data, 256)
            return agent.update(state, Chunks(jnp.zeros((256, 1)), x, jnp.ones_like(x)), k_update)[0], None

        return jax.lax.scan(step, state, jr.split(key, 3000))[0]

    state = train(state, jr.key(1))
    x0 = jr.normal(jr.key(2), (2000, 2))
    shares = []
    for steps in (1, 10):
        x = jax.vmap(lambda z, n=steps: agent.policy(state.average, z, jnp.zeros(1), n))(x0)
        shares.append(float(jnp.mean((jnp.abs(jnp.abs(x) - 0.5) < 0.3).all(1) & (x[:, 0] * x[:, 1] > 0))))
    assert shares[1] > 0.85
    assert shares[0] > 0.75 if objective.averaged else shares[0] < 0.1
