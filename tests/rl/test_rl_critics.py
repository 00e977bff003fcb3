"""The target of critics, their step, Polyak averaging, Adam with clipping: against hand-written NumPy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from contraflow.core.optim import clipped_adam, gradient_step
from contraflow.core.types import EnvSpec, Transition
from contraflow.nets.critic import Mean, Min, SubsetMin
from contraflow.rl.critics import Critics, polyak

B, SPEC = 6, EnvSpec(3, 2, 1, 1, True)


def batch(key=0, terminated=None, truncated=None, span=1):
    k = jr.split(jr.key(key), 4)
    none = jnp.zeros(B, bool)
    return Transition(
        jr.normal(k[0], (B, 3)), jr.uniform(k[1], (B, 2), minval=-1.0), jr.normal(k[2], (B,)), jr.normal(k[3], (B, 3)),
        none if terminated is None else terminated, none if truncated is None else truncated, jnp.full(B, span),
    )  # fmt: skip


def made(settings, key=2):
    return jax.jit(lambda k: settings.init(k, SPEC))(jr.key(key))


def numbers(critic, data, actions):
    """[B, m] values at the successors."""
    return np.asarray(jax.jit(jax.vmap(critic))(data.next_obs, actions), float)


TERMINATED = jnp.array([True, False, True, False, False, True])
TRUNCATED = jnp.array([False, True, True, False, True, False])


@pytest.mark.parametrize("span", [1, 3])
def test_the_target_is_masked_by_termination_only(span):
    settings = Critics(width=4, depth=1, gamma=0.9)
    data, (critic, _, _) = batch(0, TERMINATED, TRUNCATED, span), made(settings)
    action, bonus = jnp.tanh(jr.normal(jr.key(1), (B, 2))), jnp.linspace(-1.0, 1.0, B)
    goals, y = jax.jit(settings.goals)(critic, data, action, jr.key(0), bonus)
    follows = numbers(critic, data, action).min(1) + np.asarray(bonus)
    want = np.asarray(data.reward) + 0.9**span * np.where(TERMINATED, 0.0, follows)
    np.testing.assert_allclose(y, want, rtol=1e-5)
    np.testing.assert_allclose(goals[:, 0], want, rtol=1e-5)
    # The value of what follows the end may be anything, even infinite: it must not count.
    endless = eqx.tree_at(lambda d: d.next_obs, data, jnp.where(TERMINATED[:, None], jnp.inf, data.next_obs))
    np.testing.assert_allclose(jax.jit(settings.goals)(critic, endless, action, jr.key(0), bonus)[1], want, rtol=1e-5)


def test_what_several_critics_are_worth():
    q = jnp.array([3.0, -1.0, 2.0, 0.0])
    value = lambda reduce, key=None: float(np.dot(*(np.asarray(x) for x in (reduce(q, key)[0], q))) + reduce(q, key)[1])
    assert value(Min()) == -1 and value(Mean()) == 1
    np.testing.assert_allclose(value(Mean(rho=0.5)), 1 - 0.5 * np.std([3, -1, 2, 0]), rtol=1e-6)
    assert value(SubsetMin(4), jr.key(0)) == -1
    drawn = [value(SubsetMin(2), jr.key(i)) for i in range(600)]
    # The least of two out of four: -1 in 3 of 6 pairs, 0 in 2, 2 in 1.
    np.testing.assert_allclose([np.mean(np.equal(drawn, x)) for x in (-1, 0, 2)], [1 / 2, 1 / 3, 1 / 6], atol=0.07)
    grad = jax.grad(lambda q: Mean(rho=1.0)(q)[1])(jnp.zeros(3))  # of equal values, where a root has no slope
    assert np.isfinite(grad).all()


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def test_every_member_takes_its_own_clipped_step():
    """Adam's first step hides the scale of a gradient, so its second moment is looked at: (1 - .999) of the square."""
    settings = Critics(width=4, depth=1, max_grad_norm=1.0, tau=0.25, gamma=0.0)
    data, (critic, target, opt) = batch(1), made(settings)
    # Member 1 is made a thousand times larger: under one joint norm its gradient would silence member 0.
    scale = jnp.array([1.0, 1000.0])[:, None, None]
    critic = eqx.tree_at(lambda q: q.members.last.weight, critic, critic.members.last.weight * scale)
    new, moved, opt, metrics = jax.jit(settings.learn)(critic, target, opt, data, data.action, jr.key(0))
    moments = jax.tree.leaves(opt, is_leaf=lambda x: hasattr(x, "nu"))
    nu = next(m.nu for m in moments if hasattr(m, "nu"))
    losses, norms = [], []
    squares = jax.jit(
        jax.value_and_grad(lambda q: jnp.mean((jax.vmap(q)(data.obs, data.action)[:, 0] - data.reward) ** 2))
    )
    for i in range(2):
        member = jax.tree.map(lambda leaf, i=i: leaf[i], critic.members)
        value, grad = squares(member)
        length = np.sqrt(sum((g**2).sum() for g in leaves(grad)))
        losses.append(float(value))
        norms.append(length)
        for g, square in zip(leaves(grad), leaves(nu), strict=True):
            np.testing.assert_allclose(square[i], 1e-3 * (g / max(length, 1.0)) ** 2, rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(metrics["critic_loss"], np.mean(losses), rtol=1e-4)
    np.testing.assert_allclose(metrics["q"], np.mean(data.reward), rtol=1e-5)
    assert norms[0] > 0.1 and norms[1] > 100
    for a, b, c in zip(leaves(target), leaves(new), leaves(moved), strict=True):
        np.testing.assert_allclose(c, a + 0.25 * (b - a), rtol=1e-5, atol=1e-6)


def test_only_what_can_be_is_accepted():
    for bad in ({"gamma": 1.7}, {"gamma": -0.1}, {"tau": 0.0}, {"width": 0}, {"lr": -1e-3}, {"members": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Critics(**bad)
    with pytest.raises(ValueError, match="raise `members`"):
        Critics(backup=SubsetMin(3))


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
        x, state, loss, norm = gradient_step(tx, lambda x, i=i: 0.5 * i * jnp.sum(x["x"] ** 2), x, state)
        g = i * y
        np.testing.assert_allclose([loss, norm], [0.5 * i * (y @ y), np.linalg.norm(g)], rtol=1e-5)
        g = g if max_norm is None else g * min(1.0, max_norm / np.linalg.norm(g))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        y = y - 0.1 * (m / (1 - 0.9**i)) / (np.sqrt(v / (1 - 0.999**i)) + 1e-8)
        np.testing.assert_allclose(x["x"], y, rtol=1e-5)
