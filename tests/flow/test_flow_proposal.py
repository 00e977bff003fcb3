"""Proposals: densities are normalised, samples follow them, and importance weights are unbiased."""

from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import integrate, stats
from tests.closeness import assert_close

from contraflow.flow.path import VE, VP, Cosine, Linear
from contraflow.flow.posterior.control import Fixed
from contraflow.flow.posterior.importance import Reverse
from contraflow.flow.posterior.proposal import Mixture, Noise, Particles, Ramp, TruncatedNoise, UniformAction
from contraflow.flow.targets import Gaussian, Separable, log_normal


def rising(t):
    """Shares of three parts as a function of t."""
    return jnp.stack([t, 0.5 * (1.0 - t), 0.5 * (1.0 - t)])


PROPOSALS = {
    "noise": Noise(),
    "truncated": TruncatedNoise(1.0),
    "uniform": UniformAction(),
    "particles": Particles(0.5),
    "cut": Particles(0.5, bound=1.0),
    "mixture": Mixture(),
    "tuple": Mixture((Noise(), UniformAction(), Particles(0.5)), (0.5, 0.2, 0.3)),
    "function": Mixture((Noise(), UniformAction(), Particles(0.5)), rising),
    "zero": Mixture((Noise(), UniformAction()), (0.0, 1.0)),
    "one": Mixture((Noise(), UniformAction()), (1.0, 0.0)),
}
QUICK = ("noise", "truncated", "cut", "uniform", "tuple")
IN_BOX = ("truncated", "cut")
NAMED = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in PROPOSALS]
proposals = pytest.mark.parametrize("name", NAMED)
SUPPORT = jnp.array([[-1.0], [-0.3], [0.4], [1.6]])


@partial(jax.jit, static_argnums=(0, 1))
def log_probs(proposal, path, u, x_t, t, support):
    return jax.vmap(lambda v: proposal.log_prob(v, path, x_t, t, support))(u)


@partial(jax.jit, static_argnums=(0, 1, 5))
def sample(proposal, path, key, x_t, t, n, support):
    return proposal.sample(key, path, x_t, t, n, support)


@proposals
def test_density_is_normalised_and_sampled(name):
    """Integral 1 by quadrature; Kolmogorov-Smirnov at the level 1e-4."""
    proposal, n = PROPOSALS[name], 10_000
    for i, (path, t, x) in enumerate([(Linear(), 0.15, 0.3), (Linear(), 0.85, -0.7), (Cosine(), 0.5, 1.1)]):
        t, x_t = jnp.asarray(t), jnp.array([x])
        bound = 1.0 if name in IN_BOX else 60.0
        u = np.linspace(-bound, bound, 80_001)
        q = np.exp(np.asarray(log_probs(proposal, path, jnp.asarray(u)[:, None], x_t, t, SUPPORT), np.float64))
        cdf = integrate.cumulative_trapezoid(q, u, initial=0.0)
        assert_close(cdf[-1], 1.0, 2e-4)  # single precision at 80 001 points
        drawn = np.asarray(sample(proposal, path, jr.key(i), x_t, t, n, SUPPORT))[:, 0]
        distance = stats.ks_1samp(drawn, lambda v, u=u, cdf=cdf: np.interp(v, u, cdf)).statistic
        assert distance < 2.23 / np.sqrt(n)


def test_particles_in_the_plane():
    support = jnp.array([[-1.0, 0.5], [0.3, -0.8], [1.2, 1.0]])
    x_t, t = jnp.array([0.2, 0.3]), jnp.asarray(0.4)
    grid = jnp.linspace(-5.0, 5.0, 401)
    points = jnp.stack(jnp.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 2)
    q = np.exp(np.asarray(log_probs(Particles(0.4), Linear(), points, x_t, t, support), np.float64))
    cell = float(grid[1] - grid[0]) ** 2
    assert_close(q.sum() * cell, 1.0, 1e-4)
    # It is the kernel density times the likelihood, whatever route the formula takes.
    kernel = np.mean([stats.multivariate_normal(m, 0.16 * np.eye(2)).pdf(points) for m in np.asarray(support)], 0)
    product = kernel * stats.norm(0.4 * np.asarray(points), 0.6).pdf(np.asarray(x_t)).prod(1)
    assert_close(q, product / (product.sum() * cell), 1e-4)
    drawn, n = np.asarray(sample(Particles(0.4), Linear(), jr.key(0), x_t, t, 20_000, support)), 20_000
    mean = q @ np.asarray(points) * cell
    covariance = (np.asarray(points) - mean).T @ (q[:, None] * (np.asarray(points) - mean)) * cell
    assert np.all(np.abs(drawn.mean(0) - mean) < 4 * np.sqrt(np.diag(covariance) / n))
    # Four standard errors of 20 000 squares.
    assert_close(np.cov(drawn.T), covariance, 4 * np.sqrt(2 / n))


@pytest.mark.parametrize(
    ("name", "path"),
    [pytest.param(*name.values, Linear(), marks=name.marks) for name in NAMED]
    + [pytest.param("tuple", path, marks=pytest.mark.slow) for path in (VP(), VE())],
)
def test_importance_weights_are_unbiased(name, path):
    """E_q[p/q] = Z within 4 standard errors for p(u) = pi(u) N(x_t; alpha u, beta^2 I), where Z has a closed form."""
    proposal, t, x = PROPOSALS[name], jnp.asarray(0.6), np.array([0.8, 0.3])
    support = jnp.concatenate([SUPPORT, SUPPORT[::-1]], 1)
    a, b = float(path.alpha(t)), float(path.beta(t))
    mean, std = np.array([0.3, -0.2]), 0.4
    if name in IN_BOX:  # pi uniform on the box
        log_pi = lambda u: jnp.where(jnp.all(jnp.abs(u) <= 1.0), -2.0 * jnp.log(2.0), -jnp.inf)
        z = np.prod((stats.norm.cdf((x + a) / b) - stats.norm.cdf((x - a) / b)) / (2 * a))
    else:
        log_pi = Gaussian(jnp.asarray(mean), std)
        z = stats.norm(a * mean, np.sqrt(b**2 + (a * std) ** 2)).pdf(x).prod()
    x_t, repeats, n = jnp.asarray(x), 400, 50

    @jax.jit
    def estimate(key):
        u = proposal.sample(key, path, x_t, t, n, support)
        log_p = jax.vmap(lambda u: log_pi(u) + log_normal(x_t, path.alpha(t) * u, path.beta(t)))(u)
        return jnp.exp(log_p - jax.vmap(lambda u: proposal.log_prob(u, path, x_t, t, support))(u)).mean()

    z_hat = np.asarray(jax.vmap(estimate)(jr.split(jr.key(0), repeats)))
    error = z_hat.std() / np.sqrt(repeats)
    # Weights of the truncated proposal are all equal: there rounding is the only error.
    assert abs(z_hat.mean() - z) < 4 * error + 1e-5 * z
    assert error < 0.1 * z


@pytest.mark.parametrize(
    ("shares", "t", "expected"),
    [
        ((0.25, 0.75), 0.5, (0.25, 0.75)),
        ((0.0, 1.0), 0.5, (0.0, 1.0)),
        ((1.0, 0.0), 0.5, (1.0, 0.0)),
        (Ramp(0.25, 0.3, 0.9), 0.1, (0.25, 0.75)),
        (Ramp(0.25, 0.3, 0.9), 0.6, (0.625, 0.375)),
        (Ramp(0.25, 0.3, 0.9), 0.95, (1.0, 0.0)),
        (lambda t: jnp.stack([t**2, 1.0 - t**2]), 0.5, (0.25, 0.75)),
    ],
)
def test_systematic_allocation(shares, t, expected):
    """Components that cannot be confused: the noise sits near 100. Counts differ from r K by less than one."""
    n, x_t = 10, jnp.array([100.0 * t])
    mixture = Mixture((Noise(), UniformAction()), shares)
    draw = jax.jit(jax.vmap(lambda k: mixture.sample(k, Linear(), x_t, jnp.asarray(t), n, None)))
    counts = np.asarray((draw(jr.split(jr.key(0), 2000)) > 50).sum((1, 2)))
    target = expected[0] * n
    assert np.abs(counts - target).max() < 1
    assert abs(counts.mean() - target) <= 4 * counts.std() / np.sqrt(2000) + 1e-9
    if target != round(target):
        assert len(np.unique(counts)) == 2


def test_allocation_of_three_with_an_empty_one_between():
    mixture = Mixture((Noise(), UniformAction(), Particles(0.01)), (0.5, 0.0, 0.5))
    support = jnp.array([[-100.0]])
    u = sample(mixture, Linear(), jr.key(0), jnp.array([50.0]), jnp.asarray(0.5), 20, support)[:, 0]
    assert (u > 50).sum() == 10
    assert (u < -50).sum() == 10


def test_ramp_is_a_distribution():
    shares = jax.vmap(Ramp(0.1, 0.2, 0.8))(jnp.linspace(0.0, 1.0, 11))
    assert_close(shares.sum(1), 1.0, 1e-6)
    assert_close(shares[:, 0], [0.1, 0.1, 0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1, 1, 1], 1e-6)


def test_components_are_drawn_independently():
    """One key, split: neither candidates nor components may share noise."""
    u = sample(Mixture((Noise(), Noise()), (0.5, 0.5)), Linear(), jr.key(0), jnp.zeros(3), jnp.asarray(0.5), 64, None)
    assert len(np.unique(np.asarray(u))) == u.size


def test_uniform_action_is_uniform():
    u = sample(UniformAction(), Linear(), jr.key(0), jnp.zeros(2), jnp.asarray(0.5), 10_000, None)
    for a in np.tanh(np.asarray(u)).T:
        assert stats.ks_1samp(a, stats.uniform(-1, 2).cdf).statistic < 2.23 / np.sqrt(10_000)
    # The tanh Jacobian cancels: for a flat Q the ratio of target to proposal is constant.
    ratio = jax.vmap(Separable.linear(jnp.zeros(2)))(u) - log_probs(
        UniformAction(), Linear(), u, jnp.zeros(2), jnp.asarray(0.5), None
    )
    # Both densities fall like exp(-2 |u|), and cancel.
    assert_close(ratio, 2 * np.log(2), 1e-6, scale=2 * jnp.abs(u).sum(1).max())


@pytest.mark.parametrize(
    ("x", "t"), [(0.2, 0.5), (-0.9, 0.7), (3.0, 0.2), (1.8, 0.9), (-1.8, 0.9), (8.0, 0.5), (0.0, 0.02), (-2.5, 0.8)]
)
def test_truncated_noise_against_scipy(x, t):
    """Also where the box lies 10 to 30 standard deviations away from the centre."""
    proposal, n = TruncatedNoise(1.0), 10_000
    mean, std = x / t, (1 - t) / t
    oracle = stats.truncnorm((-1 - mean) / std, (1 - mean) / std, mean, std)
    x_t, t = jnp.array([x]), jnp.asarray(t)
    u = np.linspace(-1, 1, 101)[1:-1]
    got = log_probs(proposal, Linear(), jnp.asarray(u)[:, None], x_t, t, None)
    expected = oracle.logpdf(u)
    # The logarithms of the density and of the mass of the box may be as large as z^2 / 2 each, and cancel.
    largest = np.abs(stats.norm(mean, std).logpdf(np.append(u, [-1, 1]))).max()
    assert_close(got, expected, 2e-6, scale=max(1.0, largest))
    drawn = np.asarray(sample(proposal, Linear(), jr.key(0), x_t, t, n, None), np.float64)[:, 0]
    assert np.abs(drawn).max() <= 1.0
    assert stats.ks_1samp(drawn, oracle.cdf).statistic < 2.23 / np.sqrt(n)
    outside = log_probs(proposal, Linear(), jnp.array([[1.01], [-1.01]]), x_t, t, None)
    assert jnp.all(outside == -jnp.inf)


@pytest.mark.parametrize(("x", "t"), [(0.2, 0.5), (3.0, 0.2), (1.3, 0.9)])
def test_flat_target_with_truncated_noise_gives_the_truncated_mean(x, t):
    estimator, repeats = Reverse(64, TruncatedNoise(1.0), Fixed(0)), 500
    run = jax.jit(jax.vmap(lambda k: estimator(k, Linear(), lambda u: jnp.zeros(()), jnp.array([x]), jnp.asarray(t))))
    out = run(jr.split(jr.key(0), repeats))
    np.testing.assert_allclose(out.ess, 64.0, rtol=1e-3)  # equal weights
    mean, std = x / t, (1 - t) / t
    oracle = stats.truncnorm((-1 - mean) / std, (1 - mean) / std, mean, std)
    assert abs(out.mean.mean() - oracle.mean()) < 4 * oracle.std() / np.sqrt(64 * repeats)


@pytest.mark.parametrize("bound", [0.0, -1.0, np.nan, np.inf])
def test_a_bound_is_positive(bound):
    with pytest.raises(ValueError, match="bound of a truncated proposal must be positive"):
        TruncatedNoise(bound)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="2 components but 3 shares"):
        Mixture(shares=(0.2, 0.3, 0.5))
    for shares in ((0.5, 0.6), (-0.5, 1.5)):
        with pytest.raises(ValueError, match="sum to 1"):
            Mixture(shares=shares)
    with pytest.raises(ValueError, match="exactly two"):
        Mixture((Noise(), UniformAction(), Particles()), Ramp())
    with pytest.raises(ValueError, match="low"):
        Ramp(1.5)
    with pytest.raises(ValueError, match="start"):
        Ramp(0.2, 0.9, 0.3)
    with pytest.raises(ValueError, match="width"):
        Particles(0.0)
    with pytest.raises(ValueError, match="bound must be positive"):
        Particles(bound=0.0)
    with pytest.raises(ValueError, match="support"):
        Particles().log_prob(jnp.zeros(1), Linear(), jnp.zeros(1), jnp.asarray(0.5), None)
