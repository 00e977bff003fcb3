"""Paths: definitions against formulas written out in NumPy, derivatives, and every conversion there and back."""

from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.closeness import assert_close

from contraflow.flow.path import VE, VP, AbstractPath, Cosine, Linear, Polynomial
from contraflow.flow.solver import RK4
from contraflow.flow.targets import Gaussian

PATHS = {
    "linear": Linear(),
    "polynomial2": Polynomial(2.0),
    "polynomial3": Polynomial(3.0),
    "cosine": Cosine(),
    "vp": VP(),
    "ve": VE(),
}
paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def decay(t):
    return (1 - t) ** 2 * (20 - 0.1) / 2 + (1 - t) * 0.1


FORMULAS = {
    "linear": (lambda t: t, lambda t: 1 - t),
    "polynomial2": (lambda t: t**2, lambda t: 1 - t**2),
    "polynomial3": (lambda t: t**3, lambda t: 1 - t**3),
    "cosine": (lambda t: np.sin(np.pi * t / 2), lambda t: np.cos(np.pi * t / 2)),
    "vp": (lambda t: np.exp(-decay(t) / 2), lambda t: np.sqrt(1 - np.exp(-decay(t)))),
    "ve": (lambda t: np.ones_like(t), lambda t: 10 * (0.01 / 10) ** t),
}


@pytest.mark.parametrize("name", PATHS)
def test_definition_and_derivatives(name):
    alpha, beta = FORMULAS[name]
    path, h, times = PATHS[name], 1e-6, np.linspace(0.02, 0.98, 25)
    with jax.enable_x64(True):
        for ours, theirs, slope in ((path.alpha, alpha, path.d_alpha), (path.beta, beta, path.d_beta)):
            np.testing.assert_allclose(jax.vmap(ours)(jnp.asarray(times)), theirs(times), rtol=1e-12)
            difference = (theirs(times + h) - theirs(times - h)) / (2 * h)
            # Values are good to 1e-16, their differences over h to 1e-10.
            assert_close(jax.vmap(slope)(jnp.asarray(times)), difference, 1e-8)


@pytest.mark.parametrize(
    ("name", "ends"),
    # alpha_0, beta_0, alpha_1, beta_1
    {
        "linear": (0, 1, 1, 0),
        "polynomial2": (0, 1, 1, 0),
        "polynomial3": (0, 1, 1, 0),
        "cosine": (0, 1, 1, 0),
        "vp": (0.00657, 0.99998, 1, 0),
        "ve": (1, 10, 1, 0.01),
    }.items(),
)
def test_ends(name, ends):
    path = PATHS[name]
    zero, one = jnp.zeros(()), jnp.ones(())
    got = [path.alpha(zero), path.beta(zero), path.alpha(one), path.beta(one)]
    # Three digits are written above; an end that should be 0 is the rounding of 1.
    np.testing.assert_allclose(got, ends, rtol=1e-3, atol=1e-6)
    assert path.source_scale == pytest.approx(float(path.beta(zero)), rel=1e-4)


@paths
def test_perturb_has_the_stated_mean_and_spread(path):
    t, x1 = jnp.asarray(0.3), jnp.array([2.0, -1.0])
    x0 = jr.normal(jr.key(0), (20_000, 2))
    x_t = jax.vmap(path.perturb, (0, None, None))(x0, x1, t)
    error = path.beta(t) / np.sqrt(20_000)
    assert jnp.all(jnp.abs(x_t.mean(0) - path.alpha(t) * x1) < 4 * error)
    assert jnp.all(jnp.abs(x_t.std(0) - path.beta(t)) < 4 * error / np.sqrt(2))


@partial(jax.jit, static_argnums=0)
def conversions(path, x0, x1, t):
    """From one pair (x0, x1) all four guises are known independently; each is converted to all the others."""
    x_t = path.perturb(x0, x1, t)
    truth = {
        "velocity": path.d_alpha(t) * x1 + path.d_beta(t) * x0,
        "x1": x1,
        "x0": x0,
        "score": -(x_t - path.alpha(t) * x1) / path.beta(t) ** 2,
    }
    to_velocity = {"x1": path.velocity, "x0": path.velocity_from_x0, "score": path.velocity_from_score}
    from_velocity = {"x1": path.x1_from_velocity, "x0": path.x0_from_velocity, "score": path.score_from_velocity}
    results = {"x1 -> x0": (path.x0_from_x1(x1, x_t, t), x0), "x0 -> x1": (path.x1_from_x0(x0, x_t, t), x1)}
    for source, value in truth.items():
        v = to_velocity[source](value, x_t, t) if source in to_velocity else value
        for kind, expected in truth.items():
            got = from_velocity[kind](v, x_t, t) if kind in from_velocity else v
            results[f"{source} -> velocity -> {kind}"] = (got, expected)
    return results


@paths
@given(
    t=st.floats(0.02, 0.98),
    x0=st.lists(st.floats(-3, 3), min_size=2, max_size=2),
    x1=st.lists(st.floats(-3, 3), min_size=2, max_size=2),
)
def test_every_conversion_to_every_other(path, t, x0, x1):
    with jax.enable_x64(True):
        results = conversions(path, jnp.array(x0), jnp.array(x1), jnp.asarray(t))
        largest = max(float(jnp.abs(expected).max()) for _, expected in results.values())
        for name, (got, expected) in results.items():
            # Of sixteen digits the VP path loses a few near its ends; all four guises are linear in the same ends.
            assert_close(got, expected, 1e-9, scale=largest, err_msg=name)


@paths
def test_conversions_that_claim_to_be_safe_at_the_ends(path):
    x_t, v = jnp.array([0.3, -2.0]), jnp.array([1.0, 0.5])
    # beta' of the VP path diverges at t = 1, where beta = 0: there the limit is taken just before.
    for t in (jnp.zeros(()), jnp.asarray(0.9999) if isinstance(path, VP) else jnp.ones(())):
        if isinstance(path, Polynomial) and t == 0:
            continue  # alpha' = 0 as well: D = 0, the velocity tells nothing about x1
        x1, x0 = path.x1_from_velocity(v, x_t, t), path.x0_from_velocity(v, x_t, t)
        assert jnp.isfinite(x1).all()
        parts = jnp.stack([path.alpha(t) * x1, path.beta(t) * x0])
        assert_close(path.perturb(x0, x1, t), x_t, 1e-5, scale=jnp.abs(parts).max())


@paths
def test_log_snr_increases_and_inverts(path):
    t = jnp.linspace(0.02, 0.98, 41)
    log_snr = jax.vmap(path.log_snr)(t)
    expected = 2 * np.log(jax.vmap(path.alpha)(t) / jax.vmap(path.beta)(t))
    assert_close(log_snr, expected, 1e-6)
    assert jnp.all(jnp.diff(log_snr) > 0)
    # t inherits the rounding of the ratio, divided by its slope.
    assert_close(jax.vmap(path.inverse_log_snr)(log_snr), t, 5e-6)


@pytest.mark.parametrize("path", [Linear(), Cosine()], ids=["linear", "cosine"])
def test_closed_form_inverse_equals_bisection(path):
    log_snr = jnp.linspace(-8.0, 8.0, 17)
    closed = jax.vmap(path.inverse_log_snr)(log_snr)
    bisected = jax.vmap(lambda x: AbstractPath.inverse_log_snr(path, x))(log_snr)
    assert_close(closed, bisected, 5e-6)


def test_abstract_path_says_what_is_missing():
    with pytest.raises(NotImplementedError, match="alpha"):
        AbstractPath().perturb(jnp.zeros(1), jnp.zeros(1), jnp.asarray(0.5))


@paths
def test_the_source_has_the_scale_from_which_the_exact_field_ends_at_the_data(path):
    """Data N(.3, .1^2): the flow map is linear in x_0, and from source_scale N(0, I) it ends with the deviation .1. On
    the VE path, from N(0, I), it would be .01."""
    data = Gaussian(jnp.array([0.3]), 0.1)

    def field(x, t):
        return path.velocity(data.posterior_mean(path, x, t), x, t)

    ends = jax.vmap(lambda x: RK4(200)(field, x, 1e-3, 1 - 1e-3))(path.source_scale * jnp.array([[-1.0], [1.0]]))
    # The noise that the path leaves at its end belongs to it.
    wanted = jnp.hypot(0.1 * path.alpha(jnp.asarray(1 - 1e-3)), path.beta(jnp.asarray(1 - 1e-3)))
    assert_close((ends[1] - ends[0]) / 2, wanted, 0.02)
    if isinstance(path, VE):
        ends = jax.vmap(lambda x: RK4(200)(field, x, 1e-3, 1 - 1e-3))(jnp.array([[-1.0], [1.0]]))
        assert_close((ends[1] - ends[0]) / 2, 0.01, 0.02)


@pytest.mark.parametrize("bad", [(VP, -0.1, 20.0), (VP, 0.0, 20.0), (VP, 2.0, 1.0), (VE, 0.0, 1.0), (VE, 2.0, 1.0)])
def test_noise_that_no_path_has_is_refused(bad):
    kind, low, high = bad
    with pytest.raises(ValueError, match=f"{kind.__name__} needs 0 <"):
        kind(low, high)
