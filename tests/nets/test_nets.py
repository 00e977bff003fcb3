"""Networks against independent NumPy forward passes; the laws of their initialisation; the array-leaf rule."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.special import erf, expit

from contraflow.nets.critic import Critic, QEnsemble
from contraflow.nets.layers import Linear, SplitLinear, activation_function, layer_norm, time_embedding
from contraflow.nets.mlp import MLP
from contraflow.nets.velocity import Velocity

OBS, ACT, WIDTH = 3, 2, 8
X = np.array([0.3, -1.2])
O = np.array([0.5, -0.1, 2.0])


def built(make, key):
    """`make(key)` in one compiled program instead of one for every small operation."""
    return jax.jit(make)(key)


def relu(x):
    return np.maximum(x, 0)


def normalised(x):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-6)


def test_linear_is_orthogonal_with_gain_root_two():
    layer = Linear(3, 7, key=jr.key(0))
    w = np.asarray(layer.weight)
    np.testing.assert_allclose(w @ w.T, 2 * np.eye(3), atol=1e-5)
    np.testing.assert_array_equal(layer.bias, np.zeros(7))
    np.testing.assert_allclose(layer(jnp.asarray(O)), O @ w, rtol=1e-5)


def test_wide_layers_are_orthogonal_to_float_precision():
    tall, square = (np.asarray(Linear(n, 256, key=jr.key(1)).weight, float) for n in (300, 256))
    np.testing.assert_allclose(tall.T @ tall, 2 * np.eye(256), atol=5e-6)
    np.testing.assert_allclose(square @ square.T, 2 * np.eye(256), atol=5e-6)
    assert abs(np.trace(square)) < 6  # uniformly distributed: N(0, 2) in the limit


def test_split_linear_is_linear_on_the_concatenation():
    split, whole = SplitLinear((2, 3), 7, key=jr.key(1)), Linear(5, 7, key=jr.key(1))
    np.testing.assert_array_equal(np.concatenate(split.weights), whole.weight)  # the same draw, hence the same law
    assert [w.shape for w in split.weights] == [(2, 7), (3, 7)]
    both = jnp.concatenate([jnp.asarray(X), jnp.asarray(O)])
    np.testing.assert_allclose(split(jnp.asarray(X), jnp.asarray(O)), whole(both), atol=1e-6)
    with pytest.raises(ValueError, match="argument"):
        split(jnp.asarray(O), jnp.asarray(X), jnp.asarray(O))


def test_layer_norm():
    y = layer_norm(jnp.asarray(O))
    np.testing.assert_allclose(y, normalised(O), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "f"),
    [
        ("relu", relu),
        ("tanh", np.tanh),
        ("silu", lambda x: x * expit(x)),
        ("gelu", lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))),
    ],
)
def test_activations(name, f):
    x = np.linspace(-3, 3, 13)
    np.testing.assert_allclose(activation_function(name)(jnp.asarray(x)), f(x), atol=1e-6)
    if name == "gelu":  # the tanh form of the official code, close to the exact one
        np.testing.assert_allclose(f(x), 0.5 * x * (1 + erf(x / np.sqrt(2))), atol=1e-3)


@pytest.mark.parametrize("t", [0.0, 0.37, 1.0])
def test_time_embedding(t):
    w = 1000.0 ** (-np.arange(8) / 7)
    want = np.concatenate([np.sin(t * w), np.cos(t * w)])
    np.testing.assert_allclose(time_embedding(jnp.asarray(t), 16), want, atol=1e-6)  # of sines and cosines
    np.testing.assert_allclose(time_embedding(jnp.asarray(t), 2), [np.sin(t), np.cos(t)], atol=1e-6)


@pytest.mark.parametrize("size", [-2, 0, 1, 5])
def test_time_embeddings_have_an_even_size(size):
    with pytest.raises(ValueError, match=f"an even size of at least 2, got {size}"):
        time_embedding(jnp.asarray(0.3), size)


def test_velocity_forward():
    v = built(lambda k: Velocity(2, 3, WIDTH, 2, embedding=4, activation="tanh", key=k), jr.key(2))
    assert v.dim == 2
    e = np.asarray(time_embedding(jnp.asarray(0.3), 4))
    h = np.tanh(np.concatenate([X, e, O]) @ np.concatenate(v.first.weights) + v.first.bias)
    for block in v.blocks:
        h = h + np.tanh(h @ np.asarray(block.weight) + block.bias)
    want = h @ np.asarray(v.last.weight) + v.last.bias
    np.testing.assert_allclose(v(jnp.asarray(X), jnp.asarray(0.3), jnp.asarray(O)), want, rtol=1e-4, atol=1e-5)
    assert len(v.blocks) == 2


@pytest.mark.parametrize("block", ["plain", "normalised"])
def test_critic_forward(block):
    q = built(lambda k: Critic(OBS, ACT, WIDTH, 2, outputs=3, block=block, key=k), jr.key(3))
    norm = normalised if block == "normalised" else lambda h: h
    h = relu(norm(np.concatenate([X, O]) @ np.concatenate(q.first.weights) + q.first.bias))
    for layer in q.hidden:
        h = relu(norm(h @ np.asarray(layer.weight) + layer.bias))
    want = h @ np.asarray(q.last.weight) + q.last.bias
    np.testing.assert_allclose(q(jnp.asarray(O), jnp.asarray(X)), want, rtol=1e-4, atol=1e-5)
    assert len(q.hidden) == 1


def test_residual_critic_forward():
    q = built(lambda k: Critic(OBS, ACT, WIDTH, 2, block="residual", key=k), jr.key(3))
    h = np.concatenate([X, O]) @ np.concatenate(q.first.weights) + q.first.bias
    for layer in q.hidden:
        inner = relu(normalised(h) @ np.asarray(layer.wide.weight) + layer.wide.bias)
        assert inner.shape == (4 * WIDTH,)
        h = h + inner @ np.asarray(layer.back.weight) + layer.back.bias
    want = normalised(h) @ np.asarray(q.last.weight) + q.last.bias
    np.testing.assert_allclose(q(jnp.asarray(O), jnp.asarray(X)), want, rtol=1e-4, atol=1e-5)
    assert len(q.hidden) == 2


def test_mlp_forward():
    net = built(lambda k: MLP(3, 2, WIDTH, 2, key=k), jr.key(4))
    h = O
    for layer in net.hidden:
        h = relu(h @ np.asarray(layer.weight) + layer.bias)
    np.testing.assert_allclose(net(jnp.asarray(O)), h @ np.asarray(net.last.weight), rtol=1e-4, atol=1e-5)
    assert len(net.hidden) == 2


def test_ensemble_members_are_independent():
    q = built(lambda k: QEnsemble(3, OBS, ACT, WIDTH, 1, key=k), jr.key(5))
    obs, action = jnp.asarray(O), jnp.asarray(X)
    values, least = jax.jit(lambda q: (q(obs, action), q.value(obs, action)))(q)
    assert values.shape == (3,) and len(np.unique(values)) == 3
    single = [
        jax.jit(lambda q, i=i: jax.tree.map(lambda leaf: leaf[i], q.members)(obs, action)[0])(q) for i in range(3)
    ]
    np.testing.assert_allclose(values, np.stack(single), rtol=1e-5)
    np.testing.assert_allclose(least, values.min())
    # The gradient of one member's value touches that member only.
    grad = jax.jit(jax.grad(lambda q: q(obs, action)[1]))(q)
    sizes = np.array([sum(np.abs(np.asarray(leaf)[i]).sum() for leaf in jax.tree.leaves(grad)) for i in range(3)])
    assert sizes[1] > 0 and sizes[0] == sizes[2] == 0


@pytest.mark.parametrize(
    "net",
    [
        lambda k: Velocity(2, 3, WIDTH, 1, embedding=4, key=k),
        lambda k: QEnsemble(2, OBS, ACT, WIDTH, 1, key=k),
        lambda k: MLP(3, 2, WIDTH, 1, key=k),
    ],
)
def test_every_leaf_is_a_float_array_and_keys_matter(net):
    a, b = (jax.tree.leaves(built(net, jr.key(i))) for i in (0, 1))
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32 for leaf in a)
    assert any(not np.array_equal(x, y) for x, y in zip(a, b, strict=True))
