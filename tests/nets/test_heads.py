"""Heads of a critic: what they learn from draws of a known law, and a chain whose returns are known."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from tests.compiled import optimised

from contraflow.nets.heads import Categorical, Point, Quantile

HEADS = {
    "point": Point(),
    "quantile": Quantile(40, huber=1e-2),
    "c51": Categorical(41, -1.0, 3.0),
    "two-hot": Categorical(41, -1.0, 3.0, "two-hot"),
    "hl-gauss": Categorical(41, -1.0, 3.0, "hl-gauss"),
}


def fit(head, goals, steps=3000, rate=3e-2):
    """Outputs, free parameters of one state, that minimise the loss over the targets [n, k]."""
    tx = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def step(carry, _):
        out, opt = carry
        grad = jax.grad(lambda out: jnp.mean(jax.vmap(lambda y: head.loss(out, y))(goals)))(out)
        updates, opt = tx.update(grad, opt)
        return (optax.apply_updates(out, updates), opt), None

    out = jnp.zeros(head.outputs)
    return optimised(lambda: jax.lax.scan(step, (out, tx.init(out)), None, steps)[0][0])()


def ends(head, rewards):
    """Targets of steps that end an episode: the law of the reward itself."""
    law = head.mix(jnp.zeros((1, head.outputs)), jnp.ones(1))
    return jax.vmap(lambda r: head.bellman(law, r, jnp.zeros(()), jnp.zeros(())))(rewards)


@pytest.mark.parametrize("name", HEADS)
def test_the_mean_of_what_was_seen(name):
    rewards = jnp.asarray(np.random.default_rng(0).choice([0.0, 1.0, 2.5], 200, p=[0.5, 0.3, 0.2]), jnp.float32)
    head = HEADS[name]
    np.testing.assert_allclose(head.mean(fit(head, ends(head, rewards))), rewards.mean(), atol=0.03)


def test_quantiles_of_what_was_seen():
    head, rewards = HEADS["quantile"], jr.normal(jr.key(0), (400,))
    quantiles = fit(head, ends(head, rewards))
    levels = (np.arange(40) + 0.5) / 40
    np.testing.assert_allclose(quantiles, np.quantile(rewards, levels), atol=0.06)


def test_probabilities_of_what_was_seen():
    head = HEADS["c51"]
    rewards = jnp.repeat(jnp.array([0.0, 1.0, 2.5]), jnp.array([50, 30, 20]), total_repeat_length=100)
    p = np.asarray(jax.nn.softmax(fit(head, ends(head, rewards))))
    at = np.linspace(-1, 3, 41)
    for value, share in ((0.0, 0.5), (1.0, 0.3), (2.5, 0.2)):
        np.testing.assert_allclose(p[np.argmin(np.abs(at - value))], share, atol=0.01)


@pytest.mark.parametrize("name", ["quantile", "c51"])
def test_the_law_of_the_return_of_a_chain(name):
    """s0 -> s1 -> end, reward 0 then 0 or 2 with equal odds: from s0 the return is 0 or 2 gamma, half and half."""
    head, gamma = HEADS[name], 0.6
    last = fit(head, ends(head, jnp.tile(jnp.array([0.0, 2.0]), 50)))
    law = head.mix(last[None], jnp.ones(1))
    goal = head.bellman(law, jnp.zeros(()), jnp.asarray(gamma), jnp.zeros(()))
    first = fit(head, goal[None])
    np.testing.assert_allclose(head.mean(first), gamma, atol=0.03)
    if name == "quantile":
        np.testing.assert_allclose(np.sort(first)[[3, 36]], [0.0, 2 * gamma], atol=0.06)
    else:
        p, at = np.asarray(jax.nn.softmax(first)), np.linspace(-1, 3, 41)
        np.testing.assert_allclose([p[np.abs(at) < 0.06].sum(), p[np.abs(at - 1.2) < 0.06].sum()], 0.5, atol=0.02)


@pytest.mark.parametrize("name", HEADS)
def test_bellman_moves_the_mean(name):
    """By r + discount (Z + shift), as long as that stays in range; and mixing is linear in the means."""
    head = HEADS[name]
    outs = jr.normal(jr.key(1), (3, head.outputs))
    weights = jnp.array([0.5, 0.3, 0.2])
    means = jax.vmap(head.mean)(outs)
    goal = head.bellman(head.mix(outs, weights), jnp.asarray(0.4), jnp.asarray(0.5), jnp.asarray(-0.3))
    # What a network would have to say to match the target exactly.
    says = jnp.log(goal) if isinstance(head, Categorical) else goal
    np.testing.assert_allclose(head.mean(says), 0.4 + 0.5 * (weights @ means - 0.3), atol=2e-3)


def test_categorical_targets_are_laws_even_at_the_ends():
    for target in ("c51", "two-hot", "hl-gauss"):
        head = Categorical(21, 0.0, 1.0, target)
        law = head.mix(jr.normal(jr.key(0), (1, 21)), jnp.ones(1))
        for reward in (-5.0, 0.0, 0.333, 1.0, 7.0):
            p = head.bellman(law, jnp.asarray(reward), jnp.asarray(0.0), jnp.asarray(0.0))
            np.testing.assert_allclose(p.sum(), 1.0, rtol=1e-5)
            assert (p >= 0).all()
            # What a network that matches p returns. Cut off at the ends a normal law of .75 spacings would be .03 off.
            assert abs(head.mean(jnp.log(jnp.maximum(p, 1e-30))) - np.clip(reward, 0, 1)) < 2e-4
    spread = Categorical(21, 0.0, 1.0, "hl-gauss").bellman(law, jnp.asarray(0.5), jnp.asarray(0.0), jnp.asarray(0.0))
    assert np.sum(np.asarray(spread) > 0.01) >= 3  # smooth: more than two neighbours


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        (Quantile, {"outputs": 0}),
        (Quantile, {"huber": 0.0}),
        (Categorical, {"outputs": 1}),
        (Categorical, {"low": 200.0}),
        (Categorical, {"smoothing": 0.0}),
    ],
)
def test_only_what_can_be_is_accepted(kind, bad):
    with pytest.raises(ValueError, match="needs at least"):
        kind(**bad)
