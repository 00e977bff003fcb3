"""Average velocities against the flow of a Gaussian, whose steps of any size are known."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.closeness import assert_close

from contraflow.flow.fewstep import BOUND, MeanFlow, Shortcut, SplitMeanFlow, dispersion, mean_flow_target, split_target

MEAN, STD = 1.3, 0.4


def sigma(t):
    return jnp.sqrt(t**2 * STD**2 + (1 - t) ** 2)


def step(x, t, r):
    """Where the flow of N(MEAN, STD^2) on the linear path carries x from t to r."""
    return r * MEAN + sigma(r) / sigma(t) * (x - t * MEAN)


def velocity(x, t):
    return MEAN + (t * STD**2 - (1 - t)) / sigma(t) ** 2 * (x - t * MEAN)


def exact(x, t, r):
    """(x_r - x_t) / (r - t), and the velocity where they meet."""
    gap = jnp.where(r == t, 1.0, r - t)
    return jnp.where(r == t, velocity(x, t), (step(x, t, r) - x) / gap)


X = jnp.array([0.3, -1.1])
TIMES = [(0.0, 1.0), (0.1, 0.6), (0.5, 0.75), (0.3, 0.31)]


@pytest.mark.parametrize(("t", "r"), TIMES)
@pytest.mark.parametrize("share", [0.5, 0.2, 0.9])
def test_two_steps_are_one(t: float, r: float, share: float):
    t, r = jnp.asarray(t), jnp.asarray(r)
    # (x_r - x_t) / (r - t) loses digits as the step shrinks.
    assert_close(split_target(exact, X, t, r, share), exact(X, t, r), 1e-6 / float((r - t) * min(share, 1 - share)))


@pytest.mark.parametrize(("t", "r"), TIMES[:3])
def test_the_identity_of_mean_flow(t: float, r: float):
    t, r = jnp.asarray(t), jnp.asarray(r)

    def u(x, t, r):  # without the case r = t, whose derivative is not that of the limit
        return (step(x, t, r) - x) / (r - t)

    assert_close(mean_flow_target(u, velocity(X, t), X, t, r), u(X, t, r), 1e-5)


def test_a_small_share_is_mean_flow():
    """(target of SplitMeanFlow - u) / share tends to (target of MeanFlow - u) for any u with u(x, t, t) = v."""

    def u(x, t, r):
        return velocity(x, t) + (r - t) * jnp.sin(3 * x + t)

    t, r, share = jnp.asarray(0.2), jnp.asarray(0.7), 1e-2
    small = (split_target(u, X, t, r, share) - u(X, t, r)) / share
    # The next term of the limit is of the order of the share.
    assert_close(small, mean_flow_target(u, velocity(X, t), X, t, r) - u(X, t, r), 5 * share)


def test_intervals():
    for objective, whole in ((MeanFlow(), 0.0), (SplitMeanFlow(), 0.5)):
        t, r = jax.vmap(objective.interval)(jr.split(jr.key(0), 4000))
        assert (t <= r).all() and t.min() >= 0 and r.max() <= 1
        # Four standard errors of 4000 draws from [0, 1].
        assert_close(jnp.mean((t == 0) & (r == 1)), whole, 4 * 0.5 / 4000**0.5, scale=1.0)
        assert_close(jnp.mean(r - t), whole + (1 - whole) / 3, 4 * 0.5 / 4000**0.5, scale=1.0)
    shortcut = Shortcut(levels=3)
    t, r = jax.vmap(shortcut.interval)(jr.split(jr.key(1), 4000))
    sizes, counts = np.unique(r - t, return_counts=True)
    np.testing.assert_allclose(sizes, [0.25, 0.5, 1.0])
    assert_close(counts / 4000, [1 / 6, 1 / 6, 2 / 3], 4 * 0.5 / 4000**0.5, scale=1.0)
    np.testing.assert_allclose(jnp.round(t / (r - t)), t / (r - t))
    assert r.max() == 1


def test_shortcut_target_of_the_exact_field():
    """All levels are consistent, the smallest but for Euler's error of two steps of size 1/16."""
    objective = Shortcut(levels=4)
    for size in (1.0, 0.5, 0.25, 0.125):
        t, r = jnp.asarray(0.5 if size < 1 else 0.0), jnp.asarray(0.5 + size if size < 1 else 1.0)
        target = objective.target(exact, exact, velocity(X, t), X, t, r, jr.key(0))
        # (x_r - x_t) / (r - t) loses digits as the step shrinks.
        assert_close(target, exact(X, t, r), 0.15 if size == 0.125 else 1e-5 / size)
        if size == 0.125:
            gap = jnp.abs(target - exact(X, t, r)).max()
            assert gap > 1e-3 * jnp.abs(exact(X, t, r)).max()  # velocities indeed


@pytest.mark.parametrize("objective", [Shortcut(), SplitMeanFlow()])
def test_a_network_that_is_its_own_teacher_cannot_run_away(objective):
    """u = 30 x takes x_q to 16 x and the target beyond that, were they not clipped; the exact field is not."""
    t, r = jnp.asarray(0.0), jnp.asarray(1.0)
    wild = lambda x, t, r: 30 * x
    target = objective.target(wild, wild, velocity(X, t), X, t, r, jr.key(0))
    assert jnp.abs(target).max() == BOUND


def test_dispersion_pushes_neighbours_apart():
    z = jr.normal(jr.key(0), (64, 137))
    spread = jax.grad(lambda s: dispersion(s * z))(jnp.ones(()))
    assert spread < -0.1

    def released(z):
        """DM1's: distances not squared, divided by tau and clipped to 10, the farthest pairs counting most."""
        gap = z[:, None] - z[None]
        similar = -jnp.sqrt(jnp.sum(gap**2, -1) + 1e-12) / 0.5
        similar = jnp.clip(jnp.where(jnp.eye(64, dtype=bool), -1e9, similar), -10.0, 10.0)
        return -jnp.mean(jax.nn.logsumexp(-similar, axis=1))

    assert abs(float(jax.grad(lambda s: released(s * z))(jnp.ones(())))) < 1e-6 * abs(spread)  # all pairs are clipped
    assert_close(dispersion(jnp.zeros((5, 3))), 0.0, 1e-6, scale=2 * np.log(5))  # of two terms that cancel


@pytest.mark.parametrize(
    ("objective", "wrong"),
    [
        (Shortcut, {"levels": 0}),
        (Shortcut, {"share": 0.0}),
        (MeanFlow, {"power": -1.0}),
        (SplitMeanFlow, {"share": 1.0}),
    ],
)
def test_mistakes_are_named(objective, wrong):
    with pytest.raises(ValueError, match=f"{objective.__name__}: {next(iter(wrong))} must"):
        objective(**wrong)
