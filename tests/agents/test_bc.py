"""Imitation: the loss against one computed by hand, masks, and what one network evaluation can do."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from contraflow.agents.offline.bc import BC
from contraflow.core.optim import Optim
from contraflow.core.types import Batch, EnvSpec
from contraflow.flow.coupling import Weighted
from contraflow.flow.fewstep import Matching, MeanFlow, Shortcut, SplitMeanFlow
from contraflow.flow.model import Ddim, FlowSpec
from contraflow.flow.path import VP, Linear
from contraflow.nets.transformer import ChunkTransformer
from contraflow.nets.velocity import ResidualMLP, Velocity

SPEC = EnvSpec(3, 4, 1, None, False, horizon=2, execute=2)
SMALL = FlowSpec(solver=Ddim(4), network=ResidualMLP(16, 1, 8))
OBJECTIVES = [Matching(), Shortcut(), MeanFlow(power=1.0), SplitMeanFlow()]


def imitated(obs, action, mask=None):
    """Rows of demonstrations: rewards and successors are not read."""
    unread = jnp.full(len(obs), jnp.nan)
    return Batch(
        obs, action, unread, unread, jnp.full_like(obs, jnp.nan), jnp.ones_like(action) if mask is None else mask
    )


def batch(key, n=8):
    k1, k2 = jr.split(key)
    mask = jnp.ones((n, 4)).at[: n // 2, 2:].set(0.0)
    return imitated(jr.normal(k1, (n, 3)), jr.uniform(k2, (n, 4), minval=-1.0), mask)


ASKED: list[list[np.ndarray]] = []


class Recording(Velocity):
    """A network that remembers what it was asked."""

    def __call__(self, x, t, cond):
        jax.debug.callback(lambda *a: ASKED.append([np.asarray(v) for v in a]), x, t, cond)
        return self.last(self.features(x, t, cond))


@dataclass(frozen=True)
class Recorded(ResidualMLP):
    def init(self, key, dim, cond, horizon=1):
        return Recording(dim, cond, self.width, self.depth, embedding=self.embedding, key=key)


@pytest.mark.parametrize("predict", ["velocity", pytest.param("noise", marks=pytest.mark.slow)])
def test_the_loss_by_hand(predict: str):
    """x_t is on the path of the action, the target belongs to it, and masked numbers do not count."""
    path = VP() if predict == "noise" else Linear()
    agent = BC(replace(SMALL, path=path, predict=predict, network=Recorded(16, 1, 8)))
    state = agent.init(jr.key(0), SPEC)
    data = batch(jr.key(1))
    ASKED.clear()
    _, metrics = jax.jit(agent.update)(state, data, jr.key(2))
    jax.effects_barrier()
    rows = {tuple(np.round(obs, 4)): (x, t) for x, t, obs in ASKED}
    assert len(rows) == 8
    network = jax.jit(lambda x, t, obs: state.flow.net.last(state.flow.net.features(x, t, obs)))
    squares = []
    for obs, action, mask in zip(data.obs, data.action, data.mask, strict=True):
        x, seen = rows[tuple(np.round(np.asarray(obs), 4))]
        t = jnp.asarray(seen) / agent.flow.clock
        assert 0 < t < 1
        x0 = path.x0_from_x1(action, jnp.asarray(x), t)
        assert abs(float(x0.mean())) < 3
        target = x0 if predict == "noise" else path.velocity(action, jnp.asarray(x), t)
        error = network(jnp.asarray(x), jnp.asarray(seen), obs) - target
        squares.append(float(jnp.sum(mask * error**2) / mask.sum()))
    # x0 is found again by a difference over 1 - t, which loses up to three digits.
    np.testing.assert_allclose(metrics["matching_loss"], np.mean(squares), rtol=1e-3)


def test_a_given_prefix_by_hand():
    """The first d ~ U{0..2} actions are clean and at time 1, and the loss is that of the others."""
    h, n = 4, 64
    agent = BC(replace(SMALL, network=Recorded(16, 1, 8)), delay_max=2)
    state = agent.init(jr.key(0), EnvSpec(3, 2 * h, 1, None, False, horizon=h, execute=2))
    obs, action = jr.normal(jr.key(3), (n, 3)), jr.uniform(jr.key(4), (n, 2 * h), minval=-1.0)
    mask = jnp.ones((n, 2 * h)).at[: n // 2, -2:].set(0.0)
    ASKED.clear()
    _, metrics = jax.jit(agent.update)(state, imitated(obs, action, mask), jr.key(2))
    jax.effects_barrier()
    rows = {tuple(np.round(obs, 4)): (x, t) for x, t, obs in ASKED}
    assert len(rows) == n
    network = jax.jit(lambda x, t, obs: state.flow.net.last(state.flow.net.features(x, t, obs)))
    squares, lengths = [], []
    for o, a, m in zip(obs, action, mask, strict=True):
        x, seen = rows[tuple(np.round(np.asarray(o), 4))]
        t = seen / agent.flow.clock
        known = int((t == 1).sum())
        assert (t[:known] == 1).all() and (t[known:] == t[-1]).all() and 0 < t[-1] < 1
        np.testing.assert_array_equal(x[: 2 * known], a[: 2 * known])
        x0 = (x - t[-1] * a) / (1 - t[-1])
        error = (network(jnp.asarray(x), jnp.asarray(seen), o) - (a - x0))[2 * known :]
        squares.append(float(jnp.sum(m[2 * known :] * error**2) / m[2 * known :].sum()))
        lengths.append(known)
    # x0 is found again by a difference over 1 - t, which loses up to three digits.
    np.testing.assert_allclose(metrics["matching_loss"], np.mean(squares), rtol=1e-3)
    assert set(lengths) == {0, 1, 2}


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_one_update(objective):
    agent = BC(SMALL, objective=objective, coupling=Weighted(), dispersion=0.1)
    state = agent.init(jr.key(0), SPEC)
    new, metrics = jax.jit(agent.update)(state, batch(jr.key(1)), jr.key(2))
    assert new.step == 1 and all(np.isfinite(float(x)) for x in metrics.values())
    assert ("tie_loss" in metrics) == objective.averaged
    # The average catches up: (1 + 0) / (10 + 0) of the old at the first update.
    for old, net, average in zip(*(jax.tree.leaves(x) for x in (state.flow, new.flow, new.average)), strict=True):
        np.testing.assert_allclose(average, 0.1 * old + 0.9 * net, rtol=1e-5, atol=1e-7)
    action = jax.jit(lambda p: p(jnp.ones(3), jr.key(3)))(agent.policy(new))
    assert action.shape == (4,) and jnp.abs(action).max() <= 1


@pytest.mark.slow
def test_a_transformer_learns_too():
    agent = BC(replace(SMALL, network=ChunkTransformer(16, 1, 8)))
    state = agent.init(jr.key(0), SPEC)
    update, losses = jax.jit(agent.update), []
    for i in range(60):
        state, metrics = update(state, batch(jr.key(1)), jr.key(i))
        losses.append(float(metrics["matching_loss"]))
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    with pytest.raises(ValueError, match="multiple of its 4 heads"):
        ChunkTransformer(width=18)


@pytest.mark.parametrize("bad", [{"ema": 1.0}, {"ema": -0.1}, {"dispersion": -1.0}])
def test_only_what_can_be_is_accepted(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        BC(**bad)


def modes(key, n):
    """Two modes at +-(.5, .5), deviation .1."""
    k1, k2 = jr.split(key)
    sign = jnp.where(jr.bernoulli(k1, 0.5, (n, 1)), 0.5, -0.5)
    return jnp.concatenate([sign, sign], 1) + 0.1 * jr.normal(k2, (n, 2))


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_one_evaluation(objective):
    """Flow matching in one step gives the mean of the data; the others give the data."""
    agent = BC(FlowSpec(network=ResidualMLP(64, 2, 16)), objective=objective, optim=Optim(1e-3), ema=0.99)
    state = agent.init(jr.key(0), EnvSpec(1, 2, 1, None, False))

    @jax.jit
    def train(state, key):
        def step(state, key):
            k_data, k_update = jr.split(key)
            x = modes(k_data, 256)
            return agent.update(state, imitated(jnp.zeros((256, 1)), x), k_update)[0], None

        return jax.lax.scan(step, state, jr.split(key, 3000))[0]

    state = train(state, jr.key(1))
    x0 = jr.normal(jr.key(2), (2000, 2))
    shares = []
    for steps in (1, 10):
        x = jax.vmap(lambda z, n=steps: state.average.sample(z, jnp.zeros(1), steps=n))(x0)
        shares.append(float(jnp.mean((jnp.abs(jnp.abs(x) - 0.5) < 0.3).all(1) & (x[:, 0] * x[:, 1] > 0))))
    assert shares[1] > 0.85
    assert shares[0] > 0.75 if objective.averaged else shares[0] < 0.1
