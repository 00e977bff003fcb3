"""The target of critics, their step, Polyak averaging, Adam with clipping: against hand-written NumPy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from contraflow.core.optim import Optim, gradient_step
from contraflow.core.types import Batch, EnvSpec
from contraflow.nets.critic import Mean, Min, SubsetMin
from contraflow.nets.heads import Categorical
from contraflow.rl.critics import Critics, polyak

B, SPEC = 6, EnvSpec(3, 2, 1, 1, True)


def batch(key=0, discount=0.99):
    rng = np.random.default_rng(key)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    discount = jnp.broadcast_to(jnp.asarray(discount, jnp.float32), (B,))
    return Batch(normal(B, 3), jnp.tanh(normal(B, 2)), normal(B), discount, normal(B, 3), jnp.ones((B, 2)))


def made(settings, key=2):
    return settings.init(jr.key(key), SPEC)


def numbers(critic, data, actions):
    """[B, m] values at the successors."""
    return np.asarray(jax.jit(jax.vmap(critic))(data.next_obs, actions), float)


def test_the_target_is_discounted_by_the_row():
    """y = r + discount (Q + bonus), the discount being that of the row: 0 at an end, gamma^span elsewhere."""
    settings = Critics(width=4, depth=1)
    discount = np.array([0.0, 0.9, 0.0, 0.9**3, 0.5, 0.0])
    data, (critic, _, _) = batch(0, discount), made(settings)
    action, bonus = jnp.tanh(jr.normal(jr.key(1), (B, 2))), jnp.linspace(-1.0, 1.0, B)
    targets, y = jax.jit(settings.td_targets)(critic, data, action, jr.key(0), bonus)
    follows = numbers(critic, data, action).min(1) + np.asarray(bonus)
    want = np.asarray(data.reward) + discount * follows
    np.testing.assert_allclose(y, want, rtol=1e-5)
    np.testing.assert_allclose(targets[:, 0], want, rtol=1e-5)
    # The value of what follows the end may be anything, even infinite: it must not count.
    endless = eqx.tree_at(lambda d: d.next_obs, data, jnp.where(data.discount[:, None] == 0, jnp.inf, data.next_obs))
    y = jax.jit(settings.td_targets)(critic, endless, action, jr.key(0), bonus)[1]
    np.testing.assert_allclose(y, want, rtol=1e-5)


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
    settings = Critics(width=4, depth=1, tau=0.25, optim=Optim(1e-3, max_grad_norm=1.0))
    data, (critic, target, opt) = batch(1, 0.0), made(settings)
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
    for bad in ({"gamma": 1.7}, {"gamma": -0.1}, {"tau": 0.0}, {"width": 0}, {"depth": 0}, {"members": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Critics(**bad)
    for bad in ({"lr": -1e-3}, {"decay_steps": 0}, {"max_grad_norm": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Optim(**bad)
    with pytest.raises(ValueError, match="raise `members`"):
        Critics(backup=SubsetMin(3))


def test_polyak():
    new = polyak({"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([3.0, -2.0])}, 0.25)
    np.testing.assert_allclose(new["a"], [2.5, -1.0], rtol=1e-6)


@pytest.mark.parametrize("max_norm", [0.5, None])
def test_a_gradient_step_is_adam(max_norm):
    """Two steps on a quadratic against Adam as in its paper, epsilon included."""
    tx, x = Optim(0.1, max_grad_norm=max_norm).tx, {"x": jnp.array([3.0, -4.0])}
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


def test_the_rate_falls_along_a_cosine():
    """From lr to a tenth of it over `decay_steps`, and no further: Adam's steps on a constant slope have its size."""
    tx, x = Optim(0.1, decay_steps=10).tx, {"x": jnp.zeros(())}
    state, seen = tx.init(x), []
    for _ in range(13):
        old = x["x"]
        x, state, *_ = gradient_step(tx, lambda x: x["x"], x, state)
        seen.append(float(old - x["x"]))
    n = np.minimum(np.arange(13), 10)
    np.testing.assert_allclose(seen, 0.1 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * n / 10))), rtol=1e-4)


def test_targets_out_of_range_are_counted():
    """A head with a range says which share of the targets it had to clip."""
    settings = Critics(width=4, depth=1, head=Categorical(5, -1.0, 1.0))
    data = eqx.tree_at(lambda d: d.reward, batch(1, 0.0), jnp.array([-2.0, -1.0, 0.0, 0.5, 1.5, 9.0]))
    *_, metrics = jax.jit(settings.learn)(*made(settings), data, data.action, jr.key(0))
    assert metrics["targets_out_of_range"] == 0.5
