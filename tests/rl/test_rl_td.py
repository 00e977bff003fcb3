"""Temporal differences, the critic's step, Polyak averaging, Adam with clipping: against hand-written NumPy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from contraflow.nets.critic import QEnsemble
from contraflow.rl.optim import clipped_adam, descend
from contraflow.rl.td import fit_critic, polyak, td_target
from contraflow.types import Transition

B = 6


def batch(key=0, terminated=None, truncated=None, span=1):
    k = jr.split(jr.key(key), 4)
    none = jnp.zeros(B, bool)
    return Transition(
        jr.normal(k[0], (B, 3)), jr.uniform(k[1], (B, 2), minval=-1.0), jr.normal(k[2], (B,)), jr.normal(k[3], (B, 3)),
        none if terminated is None else terminated, none if truncated is None else truncated, jnp.full(B, span),
    )  # fmt: skip


def test_td_target_is_masked_by_termination_only():
    terminated = jnp.array([True, False, True, False, False, True])
    truncated = jnp.array([False, True, True, False, True, False])
    data, value = batch(0, terminated, truncated), jnp.arange(1.0, 7.0)
    want = np.asarray(data.reward) + 0.9 * np.array([0, 2, 0, 4, 5, 0])
    np.testing.assert_allclose(td_target(data, value, 0.9), want, rtol=1e-6)
    longer = td_target(batch(0, terminated, truncated, 3), value, 0.9)
    np.testing.assert_allclose(longer - data.reward, 0.81 * (want - data.reward), atol=1e-5)
    # The value of what follows the end may be anything, even infinite: it must not count.
    assert np.isfinite(td_target(data, jnp.where(terminated, jnp.inf, value), 0.9)).all()


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def sgd(max_norm):
    """Adam's first step does not depend on the scale of a gradient, so clipping shows in plain descent only."""
    return optax.chain(optax.clip_by_global_norm(max_norm), optax.sgd(0.1))


def test_fit_critic_is_a_clipped_step_for_every_member_alone():
    data, y = batch(1), jnp.linspace(-1.0, 1.0, B)
    critic = jax.jit(lambda k: QEnsemble(2, 3, 2, 4, 1, key=k))(jr.key(2))
    # Member 1 is made a thousand times larger: under one joint norm its gradient would silence member 0.
    scale = jnp.array([1.0, 1000.0])[:, None, None]
    critic = eqx.tree_at(lambda q: q.members.last.weight, critic, critic.members.last.weight * scale)
    tx = sgd(1.0)
    new, _, loss, norm = jax.jit(lambda q: fit_critic(tx, q, jax.vmap(tx.init)(q.members), data, y))(critic)
    losses, norms = [], []
    squares = jax.jit(jax.value_and_grad(lambda q: jnp.mean((jax.vmap(q)(data.obs, data.action) - y) ** 2)))
    for i in range(2):
        member = jax.tree.map(lambda leaf, i=i: leaf[i], critic.members)
        value, grad = squares(member)
        length = np.sqrt(sum((g**2).sum() for g in leaves(grad)))
        losses.append(float(value))
        norms.append(length)
        for before, g, after in zip(leaves(member), leaves(grad), leaves(new.members), strict=True):
            np.testing.assert_allclose(after[i], before - 0.1 * g / max(length, 1.0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-4)
    np.testing.assert_allclose(norm, np.mean(norms), rtol=1e-4)
    assert norms[0] > 0.1 and norms[1] > 100


def test_polyak():
    new = polyak({"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([3.0, -2.0])}, 0.25)
    np.testing.assert_allclose(new["a"], [2.5, -1.0], rtol=1e-6)


@pytest.mark.parametrize("max_norm", [0.5, None])
def test_descend_is_adam(max_norm):
    """Two steps on a quadratic against Adam as in its paper, epsilon included."""
    tx, x = clipped_adam(0.1, max_norm), {"x": jnp.array([3.0, -4.0])}
    state = tx.init(x)
    y, m, v = np.array([3.0, -4.0]), np.zeros(2), np.zeros(2)
    for i in (1, 2):
        x, state, loss, norm = descend(tx, lambda x, i=i: 0.5 * i * jnp.sum(x["x"] ** 2), x, state)
        g = i * y
        np.testing.assert_allclose([loss, norm], [0.5 * i * (y @ y), np.linalg.norm(g)], rtol=1e-5)
        g = g if max_norm is None else g * min(1.0, max_norm / np.linalg.norm(g))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        y = y - 0.1 * (m / (1 - 0.9**i)) / (np.sqrt(v / (1 - 0.999**i)) + 1e-8)
        np.testing.assert_allclose(x["x"], y, rtol=1e-5)
