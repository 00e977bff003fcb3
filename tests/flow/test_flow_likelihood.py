"""log p(x1) by change of variables: closed forms, unbiasedness of the trace estimate, gradients, round trips."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import stats
from scipy.linalg import expm
from tests.closeness import assert_close

from contraflow.flow.likelihood import Exact, Hutchinson, denoising_log_density, log_likelihood
from contraflow.flow.path import Cosine, Linear
from contraflow.flow.solver import RK4

A = np.array([[-0.5, 0.8, 0.1], [0.1, 0.4, -0.6], [0.3, 0.2, -0.2]])
SHIFT = np.array([0.3, -0.2, 0.1])
X1 = jnp.array([1.0, -0.5, 0.8])


def linear(x, t):
    return jnp.asarray(A, x.dtype) @ x + jnp.asarray(SHIFT, x.dtype)


def nonlinear(x, t, theta=0.7):
    # The divergence depends on x and theta: with it held fixed, gradients would be wrong.
    return jnp.tanh(theta * x + 0.5 * x[::-1] + t) - 0.3 * x


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_exact_for_a_linear_field(scale):
    t0, t1 = 0.2, 1.1
    flow = expm(A * (t0 - t1))
    x0 = flow @ np.asarray(X1) - np.linalg.solve(A, (np.eye(3) - flow) @ SHIFT)
    expected = stats.norm(0, scale).logpdf(x0).sum() - np.trace(A) * (t1 - t0)
    got, back = log_likelihood(linear, X1, t0, t1, RK4(16), source_scale=scale)
    assert_close(back, x0, 1e-5)
    assert_close(got, expected, 1e-5)


def test_exact_for_a_gaussian():
    """The exact velocity field of N(m, s^2) has log-likelihood log N(m, s^2), at every point."""
    mean, std = 1.3, 0.4

    def field(x, t):
        return mean + (t * std**2 - (1 - t)) / ((t * std) ** 2 + (1 - t) ** 2) * (x - t * mean)

    x = jnp.array([[0.1, 1.3], [2.0, 1.0]])
    got = jax.vmap(lambda x: log_likelihood(field, x, 0.0, 1.0, RK4(64))[0])(x)
    assert_close(got, stats.norm(mean, std).logpdf(np.asarray(x)).sum(1), 5e-5)  # of 64 steps


@pytest.mark.parametrize("path", [Linear(), Cosine()])
def test_denoising_density_of_a_gaussian(path):
    """Exact denoiser, at points and on average; the middle of the curve at 40 levels, noises averaged out."""
    mean, std = 0.7, 0.4

    def x0_mean(x, t):
        a, b = path.alpha(t), path.beta(t)
        return b * (x - a * mean) / (b**2 + (a * std) ** 2)

    x = jnp.array([[0.1, 1.3], [0.7, 0.7]])
    estimate = lambda x, k: denoising_log_density(x0_mean, path, x, 1e-3, 1 - 1e-3, 40, 8, k)
    draws = jax.jit(jax.vmap(jax.vmap(estimate, (None, 0)), (0, None)))(x, jr.split(jr.key(0), 1000))
    exact = stats.norm(mean, std).logpdf(np.asarray(x)).sum(1)
    # Four standard errors, and what the ends that are cut off hold: .02 of a log-density of order 1.
    assert_close(draws.mean(1), exact, 4 * float(draws.std() / 1000**0.5) + 0.02, scale=1.0)


def test_density_integrates_to_one():
    u = jnp.linspace(-8.0, 8.0, 801)
    log_p = jax.jit(jax.vmap(lambda x: log_likelihood(nonlinear, x[None], 0.0, 1.0, RK4(16))[0]))(u)
    assert_close(jnp.exp(log_p).sum() * (u[1] - u[0]), 1.0, 1e-4)


def test_hutchinson_is_unbiased():
    t0, t1, n = 0.2, 1.1, 4000
    exact = log_likelihood(linear, X1, t0, t1, RK4(4), Exact())[0]

    def draws(probes):
        one = lambda k: log_likelihood(linear, X1, t0, t1, RK4(4), Hutchinson(probes), key=k)[0]
        return np.asarray(jax.jit(jax.vmap(one))(jr.split(jr.key(0), n)))

    single, four = draws(1), draws(4)
    assert single.std() > 0.1
    assert abs(single.mean() - exact) < 4 * single.std() / np.sqrt(n)
    assert abs(four.mean() - exact) < 4 * four.std() / np.sqrt(n)
    np.testing.assert_allclose(four.std(), single.std() / 2, rtol=0.1)
    # e' A e takes few values; a linear field keeps the same probe all along, so the estimate is -(t1 - t0) e' A e.
    signs = np.stack(np.meshgrid([-1, 1], [-1, 1], [-1, 1]), -1).reshape(-1, 3)
    values = np.unique(np.round(np.einsum("si,ij,sj->s", signs, A - np.diag(np.diag(A)), signs), 6))
    assert np.abs((float(exact) - single)[:, None] / (t1 - t0) - values).min(1).max() < 1e-4 * np.abs(values).max()


def test_gradients_against_finite_differences():
    with jax.enable_x64(True):
        x1 = jnp.array([0.4, -0.9])

        @jax.jit
        def f(x, theta):
            return log_likelihood(lambda x, t: nonlinear(x, t, theta), x, 0.1, 0.9, RK4(6))[0]

        theta, h = jnp.asarray(0.7), 1e-5
        by_x, by_theta = jax.grad(f, (0, 1))(x1, theta)
        np.testing.assert_allclose(by_theta, (f(x1, theta + h) - f(x1, theta - h)) / (2 * h), rtol=1e-6)
        for i in range(2):
            step = h * jnp.eye(2)[i]
            np.testing.assert_allclose(by_x[i], (f(x1 + step, theta) - f(x1 - step, theta)) / (2 * h), rtol=1e-6)


def test_inversion_then_sampling_returns():
    x1 = jnp.array([0.4, -0.9])
    _, x0 = log_likelihood(nonlinear, x1, 0.05, 0.95, RK4(16))
    assert jnp.abs(x0 - x1).max() > 0.1
    assert_close(RK4(16)(nonlinear, x0, 0.05, 0.95), x1, 1e-5)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="pass key"):
        log_likelihood(linear, X1, 0.0, 1.0, RK4(2), Hutchinson())
    with pytest.raises(ValueError, match="at least one probe"):
        Hutchinson(0)
