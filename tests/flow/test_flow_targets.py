"""Targets: density, samples and posterior mean agree with each other and with independent quadrature in float64."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import integrate, stats
from tests.closeness import assert_close

from contraflow.flow.path import VE, VP, Cosine, Linear
from contraflow.flow.targets import (
    Gaussian,
    GaussianMixture,
    Separable,
    eight_gaussians,
    log_normal,
    log_sech2,
    two_moons,
)

LINE = {
    "gaussian": Gaussian(jnp.array([0.7]), 0.4),
    "mixture": GaussianMixture(jnp.array([[-1.0], [1.5]]), jnp.array([0.3, 0.6]), jnp.array([1.0, 3.0])),
    "separable": Separable.two_modes(1),
    "sharp": Separable.two_modes(1, temperature=0.02),
    "linear": Separable.linear(jnp.array([2.0]), 0.5),
}
PLANE = {
    "gaussian": Gaussian(jnp.array([0.7, -1.0]), 0.4),
    "eight": eight_gaussians(),
    "moons": two_moons(),
    "separable": Separable.two_modes(2),
}

densities = jax.jit(lambda target, x: jax.lax.map(target, x, batch_size=4096))
sample = jax.jit(lambda target, key, n: target.sample(key, n), static_argnums=2)
posterior_mean = jax.jit(lambda target, path, x_t, t: target.posterior_mean(path, x_t, t), static_argnums=1)


def on_line(target, u):
    return np.asarray(densities(target, jnp.asarray(u)[:, None]), np.float64)


def test_log_sech2_and_log_normal():
    u = jnp.array([-100.0, -2.0, 0.0, 0.3, 100.0])
    assert_close(log_sech2(u)[1:4], np.log(1 - np.tanh(np.array([-2.0, 0.0, 0.3])) ** 2), 1e-6)
    np.testing.assert_allclose(log_sech2(u)[jnp.array([0, 4])], -200 + 2 * np.log(2), rtol=1e-6)
    x, mean = np.array([0.5, -1.0]), np.array([1.0, 0.0])
    got = log_normal(jnp.asarray(x), jnp.asarray(mean), jnp.asarray(0.7))
    np.testing.assert_allclose(got, stats.multivariate_normal(mean, 0.49 * np.eye(2)).logpdf(x), rtol=1e-6)


def test_separable_is_the_stated_formula():
    target, u = Separable.two_modes(2, temperature=0.3, width=0.25), np.array([0.4, -1.2])
    a = np.tanh(u)
    sign = np.array([1, -1])
    bumps = np.exp(-((a - 0.6 * sign) ** 2) / (2 * 0.25**2)) + 0.8 * np.exp(-((a + 0.5 * sign) ** 2) / (2 * 0.25**2))
    np.testing.assert_allclose(target(jnp.asarray(u)), np.sum(bumps / 0.3 + np.log(1 - a**2)), rtol=1e-5)
    linear = Separable.linear(jnp.array([2.0, -1.0]), 0.5)
    np.testing.assert_allclose(linear(jnp.asarray(u)), np.sum(a * [4, -2] + np.log(1 - a**2)), rtol=1e-5)


@pytest.mark.parametrize("name", ["gaussian", "eight", "moons"])
def test_density_is_normalised(name):
    grid = jnp.linspace(-6.0, 6.0, 401)
    points = jnp.stack(jnp.meshgrid(grid, grid), -1).reshape(-1, 2)
    mass = jnp.exp(densities(PLANE[name], points)).sum() * (grid[1] - grid[0]) ** 2
    assert_close(mass, 1.0, 1e-4)  # a sum of 160 000 in single precision


def test_two_moons_is_smooth_along_its_arcs():
    """Twice as many points on the arcs must not change the density: 64 stand for a continuum."""
    x = 2.0 * jr.normal(jr.key(0), (200, 2))
    coarse, fine = densities(two_moons(points=64), x), densities(two_moons(points=128), x)
    # The tips differ a little, where the rectangle rule ends.
    assert_close(jnp.exp(coarse), jnp.exp(fine), 2e-2)


@pytest.mark.parametrize("name", LINE)
@pytest.mark.parametrize("path", [Linear(), Cosine(), VP(), VE()], ids=["linear", "cosine", "vp", "ve"])
def test_posterior_mean_by_quadrature(name, path):
    target = LINE[name]
    u = np.linspace(-14, 14, 200_001)
    log_pi = on_line(target, u)
    for t in (0.05, 0.4, 0.95):
        a, b = float(path.alpha(jnp.asarray(t))), float(path.beta(jnp.asarray(t)))
        for x1, x0 in ((0.3, -1.0), (-0.9, 2.0), (2.5, 0.5)):
            x_t = a * x1 + b * x0
            log_w = log_pi - 0.5 * ((x_t - a * u) / b) ** 2
            w = np.exp(log_w - log_w.max())
            got = posterior_mean(target, path, jnp.array([x_t]), jnp.asarray(t))
            # x_t itself is rounded to float32, and divided by alpha; targets have a width near 1.
            assert_close(got, [np.sum(w * u) / np.sum(w)], 2e-5, scale=max(1.0, abs(x_t) / a))


def test_separable_posterior_far_out():
    """An untrained field asks far from the data: the posterior leaves any fixed grid, by up to 2 (beta / alpha)^2."""
    target, u = Separable.two_modes(1), np.linspace(-120, 120, 1_200_001)
    a = np.tanh(u)
    bumps = np.exp(-((a - 0.6) ** 2) / 0.08) + 0.8 * np.exp(-((a + 0.5) ** 2) / 0.08)
    log_pi = bumps / 0.2 - 2 * (np.logaddexp(u, -u) - np.log(2))
    for t, x_t in ((0.9, 20.0), (0.5, -30.0), (0.99, -15.0), (0.3, -8.0), (0.1, 10.0)):
        log_w = log_pi - 0.5 * ((x_t - t * u) / (1 - t)) ** 2
        w = np.exp(log_w - log_w.max())
        got = posterior_mean(target, Linear(), jnp.array([x_t]), jnp.asarray(t))
        np.testing.assert_allclose(got, [np.sum(w * u) / np.sum(w)], rtol=1e-4)


@pytest.mark.parametrize("name", ["eight", "moons"])
def test_posterior_mean_in_the_plane(name):
    target = PLANE[name]
    grid = jnp.linspace(-5.0, 5.0, 501)
    points = jnp.stack(jnp.meshgrid(grid, grid), -1).reshape(-1, 2)
    log_pi = np.asarray(densities(target, points), np.float64)
    for t, x_t in ((0.2, [0.5, -0.3]), (0.8, [1.2, 0.1])):
        log_w = log_pi - 0.5 * np.sum((np.array(x_t) - t * np.asarray(points)) ** 2, 1) / (1 - t) ** 2
        w = np.exp(log_w - log_w.max())
        got = posterior_mean(target, Linear(), jnp.array(x_t), jnp.asarray(t))
        assert_close(got, w @ np.asarray(points) / w.sum(), 5e-5, scale=2.0)  # of the circle, or the moons


def test_separable_posterior_factorises():
    x_t, t = jnp.array([0.3, -0.2, 1.5, 0.0]), jnp.asarray(0.3)
    together, one = posterior_mean(Separable.two_modes(4), Linear(), x_t, t), Separable.two_modes(1)
    # Odd coordinates are mirrored.
    alone = [s * posterior_mean(one, Linear(), s * x_t[i : i + 1], t)[0] for i, s in enumerate((1.0, -1.0, 1.0, -1.0))]
    assert_close(together, alone, 1e-5)


@pytest.mark.parametrize("name", LINE)
def test_samples_follow_the_density(name):
    """Kolmogorov-Smirnov at the level 1e-4 against the integrated density; a shift by .03 of a deviation fails."""
    target, n = LINE[name], 20_000
    x = np.sort(np.asarray(sample(target, jr.key(1), n))[:, 0])
    u = np.linspace(-14, 14, 100_001)
    density = np.exp(on_line(target, u))
    cdf = integrate.cumulative_trapezoid(density, u, initial=0.0)
    distance = stats.ks_1samp(x, lambda v: np.interp(v, u, cdf / cdf[-1])).statistic
    assert distance < 2.23 / np.sqrt(n)


@pytest.mark.parametrize("name", PLANE)
def test_samples_in_the_plane(name):
    """Cell counts against the integrated density: chi-squared at the level 1e-4."""
    target, n, cells, fine = PLANE[name], 20_000, 12, 16
    x = np.asarray(sample(target, jr.key(2), n))
    assert x.shape == (n, 2)
    edges = np.linspace(-3.0, 3.0, cells + 1)
    mid = np.linspace(-3.0, 3.0, cells * fine + 1)[:-1] + 3.0 / (cells * fine)
    points = jnp.stack(jnp.meshgrid(jnp.asarray(mid), jnp.asarray(mid), indexing="ij"), -1).reshape(-1, 2)
    density = np.exp(np.asarray(densities(target, points), np.float64))
    expected = density.reshape(cells, fine, cells, fine).sum((1, 3)).ravel()
    counts = np.histogram2d(*x.T, bins=[edges, edges])[0].ravel()
    expected *= counts.sum() / expected.sum()
    big = expected > 5
    assert counts[~big].sum() < expected[~big].sum() + 6 * np.sqrt(expected[~big].sum() + 1)
    chi2 = np.sum((counts[big] - expected[big]) ** 2 / expected[big])
    assert chi2 < stats.chi2(big.sum() - 1).ppf(1 - 1e-4)


def test_separable_special_cases():
    n = 20_000
    uniform = np.tanh(np.asarray(sample(Separable.linear(jnp.zeros(2)), jr.key(3), n)))
    for column in uniform.T:
        assert stats.ks_1samp(column, stats.uniform(-1, 2).cdf).statistic < 2.23 / np.sqrt(n)
    assert abs(np.corrcoef(uniform.T)[0, 1]) < 4 / np.sqrt(n)
    slope = 4.0  # 2 / .5: E[a] = coth c - 1/c
    a = np.tanh(np.asarray(sample(LINE["linear"], jr.key(4), n)))
    assert abs(a.mean() - (1 / np.tanh(slope) - 1 / slope)) < 4 * a.std() / np.sqrt(n)


@pytest.mark.parametrize("name", ["separable", "linear"])
def test_separable_moments(name):
    u = np.linspace(-14, 14, 200_001)
    w = np.exp(on_line(LINE[name], u))
    mean = np.sum(w * u) / w.sum()
    std = np.sqrt(np.sum(w * (u - mean) ** 2) / w.sum())
    np.testing.assert_allclose(np.concatenate(LINE[name].moments()), [mean, std], rtol=1e-4)


def test_leaves_are_arrays_and_mistakes_are_named():
    for target in (*LINE.values(), *PLANE.values()):
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(target))
    with pytest.raises(ValueError, match="2 components"):
        GaussianMixture(jnp.zeros((2, 1)), jnp.ones(3))
    with pytest.raises(ValueError, match="weights"):
        GaussianMixture(jnp.zeros((2, 1)), 1.0, jnp.ones(3))
