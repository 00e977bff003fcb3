"""Chains of generation: their law, their density, and the noise of DDPM."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.closeness import assert_close

from contraflow.flow.kernel import log_prob, posterior_std, rollout
from contraflow.flow.path import VP, Cosine, Linear

STEPS, A, C, STD = 4, 0.7, 0.2, 0.3


def linear(x, k):
    """x_{k+1} = A x_k + C + STD noise: Gaussian at every step."""
    return A * x + C, jnp.full_like(x, STD)


def shifted(x, k):
    return A * x + C + 0.1, jnp.full_like(x, 1.1 * STD)


def draw(kernel, n):
    return jax.vmap(lambda k: rollout(kernel, jr.normal(jr.fold_in(k, 0), (2,)), STEPS, jr.fold_in(k, 1)))(
        jr.split(jr.key(0), n)
    )


def test_law_of_a_linear_chain():
    xs = draw(linear, 20_000)
    assert xs.shape == (20_000, STEPS + 1, 2)
    mean, var = 0.0, 1.0
    for k in range(STEPS + 1):
        # Four standard errors of 20 000 draws.
        assert_close(xs[:, k].mean(0), mean, 4 / 20_000**0.5, scale=var**0.5)
        assert_close(xs[:, k].var(0), var, 4 * (2 / 20_000) ** 0.5)
        mean, var = A * mean + C, A**2 * var + STD**2


def test_the_density_of_another_chain_is_normalised():
    """E_new[old / new] = 1, over all steps and over a window."""
    xs = draw(linear, 20_000)
    for learned in (range(STEPS), range(2, STEPS)):
        new, old = (jax.vmap(lambda x, k=k, l=learned: log_prob(k, x, l))(xs) for k in (linear, shifted))
        assert new.shape == (20_000, len(learned), 2)
        ratio = jnp.exp(jnp.sum(old - new, (1, 2)))
        assert_close(ratio.mean(), 1.0, 4 / 20_000**0.5, scale=ratio.std())
        assert ratio.std() > 0.3


def test_log_density_by_hand():
    """Of steps 1 and 2 of a kernel that differs from step to step; and the chain is drawn by the same."""

    def timed(x, k):
        return A * x + C * k, jnp.full_like(x, STD * (k + 1))

    xs = jnp.array([[0.0], [0.5], [0.1], [0.7]])
    got = log_prob(timed, xs, [1, 2])
    for k, density in zip((1, 2), got, strict=True):
        std = STD * (k + 1)
        gap = (xs[k + 1] - (A * xs[k] + C * k)) / std
        np.testing.assert_allclose(density, -0.5 * gap**2 - np.log(std) - 0.5 * np.log(2 * np.pi), rtol=1e-5)
    still = rollout(lambda x, k: (A * x + C * k, 0.0 * x), xs[0], 3, jr.key(1))
    np.testing.assert_allclose(still[:, 0], [0.0, 0.0, C, A * C + 2 * C], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("path", [VP(), Cosine()])
def test_ddpm_noise(path):
    """beta_tilde = (1 - abar_r) / (1 - abar_t) (1 - abar_t / abar_r), abar = alpha^2 (2006.11239, eq. 7)."""
    for t, r in ((0.3, 0.4), (0.5, 0.75), (0.9, 0.95)):
        t, r = jnp.asarray(t), jnp.asarray(r)
        at, ar = path.alpha(t) ** 2, path.alpha(r) ** 2
        np.testing.assert_allclose(posterior_std(path, t, r) ** 2, (1 - ar) / (1 - at) * (1 - at / ar), rtol=1e-4)


def test_noise_and_mean_keep_the_marginal():
    """x_r ~ N(alpha x1 + sqrt(beta^2 - std^2) x0, std^2) given x_t has the moments of the path; nothing at r = 1."""
    path, t, r = Linear(), jnp.asarray(0.4), jnp.asarray(0.6)
    assert 0 < posterior_std(path, t, r) < path.beta(r)
    assert_close(posterior_std(path, t, jnp.asarray(1.0)), 0.0, 1e-6, scale=path.beta(t))
    # Cov(x_r, x_t) of the process x_t = (alpha_t / alpha_r) x_r + noise, x1 fixed.
    std = posterior_std(path, t, r)
    want = path.alpha(t) / path.alpha(r) * path.beta(r) ** 2
    np.testing.assert_allclose(jnp.sqrt(path.beta(r) ** 2 - std**2) * path.beta(t), want, rtol=1e-5)
