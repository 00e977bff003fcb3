"""Estimators of E[x1 | x_t]: exact cases, independent re-implementations, and bias against exact answers."""

from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.closeness import assert_close

from contraflow.flow.path import Cosine, Linear
from contraflow.flow.posterior.base import SupportName
from contraflow.flow.posterior.control import Fixed, MinVariance
from contraflow.flow.posterior.data import FromData
from contraflow.flow.posterior.estimator import Estimator
from contraflow.flow.posterior.gibbs import Gibbs
from contraflow.flow.posterior.importance import Pooled, Reverse
from contraflow.flow.posterior.local import Local
from contraflow.flow.posterior.markov import Markov
from contraflow.flow.posterior.proposal import Mixture, Noise, Particles, Ramp, TruncatedNoise, UniformAction
from contraflow.flow.targets import Gaussian, GaussianMixture, Separable

PATHS = {"linear": Linear(), "cosine": Cosine()}
paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
GAUSSIAN = Gaussian(jnp.array([0.5, -1.0]), 0.7)
BIMODAL = GaussianMixture(jnp.array([[-1.0, 0.3], [0.8, -0.5]]), 0.4, jnp.array([1.0, 2.0]))
X_T, T = jnp.array([0.3, -0.4]), jnp.asarray(0.6)


@partial(jax.jit, static_argnums=(0, 1))
def estimate(estimator, path, key, log_pi, x_t, t, support=None):
    return estimator(key, path, log_pi, x_t, t, support)


@partial(jax.jit, static_argnums=(0, 1))
def repeat(estimator, path, keys, log_pi, x_t, t, support=None):
    return jax.vmap(lambda k: estimator(k, path, log_pi, x_t, t, support))(keys)


def candidates(key, path, log_pi, k, x_t=X_T, t=T):
    """What `Reverse` with prior noise sees, recomputed in float64: u, x0, score of pi, log-weights."""
    x0 = np.asarray(jr.normal(jr.clone(key), (k, x_t.shape[0])), np.float64)
    a, b = float(path.alpha(t)), float(path.beta(t))
    u = (np.asarray(x_t, np.float64) - b * x0) / a
    log_p, grad = jax.vmap(jax.value_and_grad(log_pi))(jnp.asarray(u))
    log_p = np.asarray(log_p, np.float64)
    w = np.exp(log_p - log_p.max())
    return u, x0, np.asarray(grad, np.float64), w / w.sum(), a, b


# --- a Gaussian target: everything is known ---------------------------------------------------------------------------


@paths
@pytest.mark.parametrize("t", [0.2, 0.9])
def test_optimal_weight_has_no_variance_on_a_gaussian(path, t):
    """u + V s = E[x1 | x_t] for every single candidate, V the posterior variance: eta* = a^2 s^2 / (a^2 s^2 + b^2)."""
    t = jnp.asarray(t)
    a, b, s2 = float(path.alpha(t)), float(path.beta(t)), 0.49
    eta = a**2 * s2 / (a**2 * s2 + b**2)
    exact = GAUSSIAN.posterior_mean(path, X_T, t)
    out = repeat(Reverse(4, Noise(), Fixed(eta)), path, jr.split(jr.key(0), 64), GAUSSIAN, X_T, t)
    # In float32 the candidates, which may be b / a away, cancel.
    assert_close(out.mean, np.tile(exact, (64, 1)), 1e-5, scale=max(1.0, b / a))
    np.testing.assert_array_equal(out.eta, np.float32(eta))
    noise = repeat(Reverse(4, Noise(), Fixed(0)), path, jr.split(jr.key(0), 64), GAUSSIAN, X_T, t)
    assert noise.mean.var() > 1e-3 * s2 * (b / a) ** 2


@paths
def test_tuned_weight_finds_the_posterior_variance(path):
    """On a Gaussian the centred rule finds c = V to three digits, and leaves next to no variance; eta = c a^2 / b^2."""
    a, b, s2 = float(path.alpha(T)), float(path.beta(T)), 0.49
    variance = 1 / (1 / s2 + a**2 / b**2)
    exact = GAUSSIAN.posterior_mean(path, X_T, T)
    keys = jr.split(jr.key(0), 200)
    tuned = repeat(Reverse(64, Noise(), MinVariance(ridge=0.0)), path, keys, GAUSSIAN, X_T, T)
    noise = repeat(Reverse(64, Noise(), Fixed(0)), path, jr.clone(keys), GAUSSIAN, X_T, T)
    usual = tuned.ess > 1.2
    assert usual.mean() > 0.9
    np.testing.assert_allclose(tuned.eta[usual] * b**2 / a**2, variance, rtol=2e-3)
    error = (tuned.mean - exact[None])[usual]
    assert jnp.mean(noise.mean.var(0)) > 1e-3 * variance
    assert jnp.mean(error**2) < 1e-3 * jnp.mean(noise.mean.var(0))


@pytest.mark.parametrize("shape", ["diagonal", "isotropic"])
def test_every_shape_has_no_variance_on_a_gaussian(shape):
    exact = GAUSSIAN.posterior_mean(Linear(), X_T, T)
    control = MinVariance(shape=shape, ridge=1e-9)
    out = repeat(Reverse(64, Noise(), control), Linear(), jr.split(jr.key(0), 50), GAUSSIAN, X_T, T)
    variance = 1 / (1 / 0.49 + 0.36 / 0.16)
    assert jnp.mean((out.mean - exact[None]) ** 2) < 1e-5 * variance


# --- independent implementations on the same noise --------------------------------------------------------------------


@paths
def test_noise_expectation(path):
    """eta = 0: self-normalised mean of the noise, m0 = sum w x0, then m1 = (x_t - b m0) / a (QNE)."""
    key = jr.key(3)
    out = estimate(Reverse(50, Noise(), Fixed(0)), path, key, BIMODAL, X_T, T)
    u, x0, _, w, a, b = candidates(key, path, BIMODAL, 50)
    assert_close(out.mean, (np.asarray(X_T) - b * (w @ x0)) / a, 1e-5, scale=np.abs(u).max())
    np.testing.assert_allclose(out.ess, 1 / np.sum(w**2), rtol=1e-4)


@paths
def test_gradient_expectation(path):
    """eta = 1: the gradient of log mean_k exp log pi((x_t - b x0_k) / a) with respect to x_t is the score of p_t,
    by Tweedie m1 = (x_t + b^2 score) / a (iDEM)."""
    key = jr.key(4)
    out = estimate(Reverse(50, Noise(), Fixed(1)), path, key, BIMODAL, X_T, T)
    x0 = jr.normal(jr.clone(key), (50, 2))
    a, b = path.alpha(T), path.beta(T)
    score = jax.grad(lambda x: jax.nn.logsumexp(jax.vmap(lambda e: BIMODAL((x - b * e) / a))(x0)))(X_T)
    assert_close(out.mean, (X_T + b**2 * score) / a, 1e-5, scale=jnp.abs(b**2 * score).max() / a + b / a)


@paths
def test_noise_form_equals_data_form(path):
    """RFM's other family: m0 = sum w (x0 + eta s0), s0 = -x0 - (b/a) grad log pi; the same velocity."""
    key, eta = jr.key(5), 0.3
    out = estimate(Reverse(50, Noise(), Fixed(eta)), path, key, BIMODAL, X_T, T)
    u, x0, grad, w, a, b = candidates(key, path, BIMODAL, 50)
    m0 = w @ (x0 + eta * (-x0 - b / a * grad))
    velocity = path.velocity(out.mean, X_T, T)
    assert_close(velocity, path.velocity_from_x0(jnp.asarray(m0), X_T, T), 2e-5, scale=np.abs(u).max() / b)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("clip", [2.0, 0.1])
def test_tuned_rule_in_numpy(centred, clip):
    """The official component-wise rule, written out in float64; the clip of c at .1 binds, that at 2 does not."""
    estimator = Reverse(100, Noise(), MinVariance(centred=centred, clip=clip))
    for t in (0.3, 0.6, 0.9):
        key, t = jr.key(int(10 * t)), jnp.asarray(t)
        out = estimate(estimator, Linear(), key, BIMODAL, X_T, t)
        u, x0, grad, w, a, b = candidates(key, Linear(), BIMODAL, 100, X_T, t)
        s = a / b * x0 + grad
        mean, tilt = w @ u, w @ s
        ds = s - tilt if centred else s
        c = np.zeros(2)
        for j in range(2):
            c[j] = -np.sum(w**2 * (u[:, j] - mean[j]) * ds[:, j]) / (np.sum(w**2 * ds[:, j] ** 2) + 1e-4)
        if t == jnp.asarray(0.6):
            assert np.any(np.abs(c) > clip) == (clip == 0.1)
        c = np.clip(c, -clip, clip)
        # c is a ratio of differences from means; the ridge of 1e-4 is all that there is where one candidate has all.
        assert_close(out.mean, mean + c * tilt, 2e-3, scale=max(np.abs(mean).max(), np.abs(c * tilt).max()))
        assert_close(out.eta, c * a**2 / b**2, 5e-3)


def test_isotropic_in_numpy():
    key = jr.key(7)
    u, x0, grad, w, a, b = candidates(key, Linear(), BIMODAL, 100)
    s = a / b * x0 + grad
    mean, tilt = w @ u, w @ s
    dx, ds, w2 = u - mean, s - tilt, w**2
    out = estimate(Reverse(100, Noise(), MinVariance(shape="isotropic")), Linear(), key, BIMODAL, X_T, T)
    c = -sum(w2 * (dx * ds).sum(1)) / (sum(w2 * (ds * ds).sum(1)) + 1e-4)
    assert_close(out.mean, mean + c * tilt, 1e-4, scale=max(np.abs(mean).max(), np.abs(c * tilt).max()))
    assert_close(out.eta, c * a**2 / b**2, 1e-3)


def test_shapes_agree_in_one_dimension():
    target, x_t = Separable.two_modes(1), jnp.array([0.2])
    one, other = (
        estimate(Reverse(50, Noise(), MinVariance(shape=shape)), Linear(), jr.clone(jr.key(0)), target, x_t, T)
        for shape in ("diagonal", "isotropic")
    )
    np.testing.assert_allclose(other.mean, one.mean, rtol=1e-4)
    np.testing.assert_allclose(other.eta, one.eta, rtol=1e-4)


# --- clipping, refusal, what suits which support ----------------------------------------------------------------------


def test_the_clip_is_of_c():
    """At t = .2 the optimum for a wide Gaussian is c = V = 3.2, and eta = .2: the clip of 2 binds."""
    wide, t = Gaussian(jnp.zeros(2), 2.0), jnp.asarray(0.2)
    clipped = estimate(Reverse(400), Linear(), jr.key(0), wide, X_T, t)
    np.testing.assert_allclose(clipped.eta, 2.0 / 16, rtol=1e-5)
    free = estimate(Reverse(400, Noise(), MinVariance(ridge=1e-9, clip=9.0)), Linear(), jr.key(0), wide, X_T, t)
    np.testing.assert_allclose(free.eta, 3.2 / 16, rtol=1e-2)


@pytest.mark.parametrize(
    ("estimator", "supports", "invariant"),
    [
        (Reverse(), {"tanh", "real"}, False),
        (Reverse(control=Fixed(0.0)), {"tanh", "real", "box"}, False),
        (Reverse(proposal=TruncatedNoise(), control=Fixed(0.0)), {"box"}, False),
        (Reverse(proposal=Mixture((Noise(), Particles(bound=1.0))), control=Fixed(0.0)), {"box"}, False),
        (Pooled(), {"box"}, False),
        (Pooled((Reverse(), Reverse(control=Fixed(0.0)))), {"tanh", "real"}, False),
        (Local(), {"tanh", "real", "box"}, False),
        (Markov(), {"tanh", "real"}, True),
        (Gibbs(), {"tanh", "real"}, True),
        (Gibbs(bound=1.0), {"box"}, True),
        (FromData(), set(), False),
    ],
)
def test_what_an_estimator_tells_of_itself(estimator, supports, invariant):
    assert {name for name in get_args(SupportName) if estimator.suits(name)} == supports
    assert estimator.invariant_start is invariant
    assert isinstance(estimator, Estimator) is not isinstance(estimator, FromData)


def test_refusals():
    for control in (Fixed(0.5), MinVariance()):
        with pytest.raises(ValueError, match="boundary"):
            Reverse(10, TruncatedNoise(), control)
    Reverse(10, TruncatedNoise(), Fixed(0))
    with pytest.raises(ValueError, match="samples must be a whole number, at least 1"):
        Reverse(0)
    with pytest.raises(ValueError, match="ridge"):
        MinVariance(ridge=-1.0)
    with pytest.raises(ValueError, match="clip"):
        MinVariance(clip=0.0)
    with pytest.raises(ValueError, match="support"):
        FromData()(None, Linear(), None, X_T, T)


def test_boundary_terms_are_real():
    """Why a control on a truncated proposal is refused: for a flat target on the box E[s] is far from 0."""
    draw = jax.jit(lambda key: TruncatedNoise().sample(key, Linear(), jnp.array([0.5]), T, 20_000, None))
    u = np.asarray(draw(jr.key(0)))
    s = 0.6 / 0.4 * (0.5 - 0.6 * u) / 0.4
    assert abs(s.mean()) > 20 * s.std() / np.sqrt(20_000)


# --- from data --------------------------------------------------------------------------------------------------------


@paths
def test_one_data_point_is_conditional_flow_matching(path):
    x0, x1 = jnp.array([0.3, -1.2]), jnp.array([0.9, 0.1])
    x_t = path.perturb(x0, x1, T)
    out = FromData()(None, path, None, x_t, T, x1[None])
    np.testing.assert_array_equal(out.mean, x1)
    target = path.velocity(out.mean, x_t, T)
    np.testing.assert_allclose(target, path.d_alpha(T) * x1 + path.d_beta(T) * x0, rtol=1e-4)
    if isinstance(path, Linear):
        assert_close(target, x1 - x0, 1e-6, scale=jnp.abs(x_t).max() / (1 - T))  # which x_t / (1 - t) cancels


@paths
def test_many_data_points_are_a_mixture_of_deltas(path):
    support = jr.normal(jr.key(0), (20, 2))
    exact = GaussianMixture(support, 1e-4).posterior_mean(path, X_T, T)
    out = FromData()(None, path, None, X_T, T, support)
    assert_close(out.mean, exact, 1e-5, scale=jnp.abs(support).max())
    assert 1 < out.ess < 20


# --- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [Separable.two_modes(1), GaussianMixture(jnp.array([[-1.0], [1.0]]), 0.4)])
@pytest.mark.parametrize("t", [0.1, *(pytest.param(t, marks=pytest.mark.slow) for t in (0.5, 0.9))])
def test_score_has_mean_zero_under_the_posterior(target, t):
    """Stein's identity by quadrature, for the score that the estimator uses."""
    with jax.enable_x64(True):
        u = jnp.linspace(-15.0, 15.0, 40_001)
        x_t, b = 0.3, 1 - t
        log_p, grad = jax.vmap(jax.value_and_grad(target))(u[:, None])
        w = jax.nn.softmax(log_p - 0.5 * ((x_t - t * u) / b) ** 2)
        s = t / b * (x_t - t * u) / b + grad[:, 0]
        assert abs(w @ s) < 1e-5 * jnp.sqrt(w @ s**2)


@pytest.mark.slow
def test_error_is_a_parabola_in_eta_with_its_minimum_at_the_optimum():
    """MSE(eta) from shared noise is quadratic; its vertex is eta* = -E[W^2 x~ s] / E[W^2 s^2] of a large sample."""
    target, x_t, t = Separable.two_modes(1), jnp.array([0.4]), jnp.asarray(0.6)
    path, exact, keys = Linear(), target.posterior_mean(Linear(), x_t, t), jr.split(jr.key(0), 4000)
    etas = np.array([-0.5, 0.25, 1.0, 1.5])

    def error(eta):
        out = repeat(Reverse(256, Noise(), Fixed(eta)), path, jr.clone(keys), target, x_t, t)
        return float(jnp.mean((out.mean - exact[None]) ** 2))

    mse = [error(eta) for eta in etas.tolist()]
    curve = np.polyfit(etas, mse, 2)
    np.testing.assert_allclose(np.polyval(curve, etas), mse, rtol=2e-2)
    assert curve[0] > 0
    control = MinVariance(centred=False, ridge=0.0, clip=100.0)
    optimum = float(estimate(Reverse(200_000, Noise(), control), path, jr.key(1), target, x_t, t).eta[0])
    assert_close(-curve[1] / (2 * curve[0]), optimum, 0.03, scale=1.0)  # eta goes from noise, 0, to gradients, 1
    assert 0.05 < optimum < 0.95


MIXED = Mixture((Noise(), UniformAction()), Ramp(0.25, 0.3, 0.9))
THREE = Mixture((Noise(), UniformAction(), Particles(0.4)), (0.25, 0.25, 0.5))
# Bad particles on purpose: not drawn from the target.
SUPPORT = jnp.array([[-0.6, 0.2], [0.3, 0.9], [1.1, -0.7], [0.1, -0.2]])
# Every estimator at times where its effective sample size is at least 20; bias elsewhere is a matter of the yardstick.
ESTIMATORS = {
    "noise": (Reverse(512, Noise(), Fixed(0)), (0.5, 0.8)),
    "gradient": (Reverse(512, Noise(), Fixed(1)), (0.8, 0.9)),
    "official": (Reverse(512), (0.5, 0.8)),
    "uncentred": (Reverse(512, Noise(), MinVariance(centred=False)), (0.5, 0.8)),
    "isotropic": (Reverse(512, Noise(), MinVariance("isotropic")), (0.5, 0.8)),
    "uniform": (Reverse(512, UniformAction(), Fixed(0)), (0.1, 0.4)),
    "particles": (Reverse(512, Particles(0.8), Fixed(0)), (0.1, 0.4, 0.8)),
    "mixture": (Reverse(512, MIXED, Fixed(0)), (0.1, 0.5, 0.9)),
    "pooled": (Pooled((Reverse(256, Noise(), Fixed(0)), Reverse(256, Particles(0.8), Fixed(0)))), (0.1, 0.5, 0.8)),
    "three": (Reverse(512, THREE, MinVariance("isotropic", centred=False)), (0.1, 0.5, 0.8)),
}


def test_pooled_by_hand():
    """Both estimates on their own noise, written out, and joined by effective size; the larger one counts for more."""
    path, x_t, t, key = Linear(), jnp.array([0.4, -0.2]), jnp.asarray(0.3), jr.key(4)
    pooled = Pooled((Reverse(40, Noise(), Fixed(0)), Reverse(20, Particles(0.8), Fixed(0))))
    post = pooled(key, path, BIMODAL, x_t, t, SUPPORT)
    k_noise, k_particles = jr.split(jr.clone(key))
    x0 = np.asarray(jr.normal(k_noise, (40, 2)), float)
    u = [(np.asarray(x_t) - 0.7 * x0) / 0.3]
    log_w = [np.asarray(jax.vmap(BIMODAL)(jnp.asarray(u[0], jnp.float32)), float)]
    kernel = Particles(0.8)
    u.append(np.asarray(kernel.sample(k_particles, path, x_t, t, 20, SUPPORT), float))
    at = lambda f: np.asarray(jax.vmap(f)(jnp.asarray(u[1], jnp.float32)), float)
    far = ((np.asarray(x_t) - 0.3 * u[1]) ** 2).sum(1) / (2 * 0.49)
    log_w.append(at(BIMODAL) - far - at(lambda x: kernel.log_prob(x, path, x_t, t, SUPPORT)))
    w = [np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in log_w]
    ess = [1 / (x**2).sum() for x in w]
    means = [a @ b for a, b in zip(w, u, strict=True)]
    np.testing.assert_allclose(post.ess, sum(ess), rtol=1e-3)
    assert_close(post.mean, (ess[0] * means[0] + ess[1] * means[1]) / sum(ess), 1e-3, scale=np.abs(means).max())
    assert abs(ess[0] - ess[1]) > 1 and np.abs(means[0] - means[1]).max() > 0.05
    with pytest.raises(ValueError, match="at least one"):
        Pooled(())


def test_pooled_candidates_do_no_harm_far_from_the_data():
    """The uniform law of the box in six dimensions: as tanh, with plain noise, the error is 3."""
    path, t, flat = Linear(), jnp.asarray(0.05), lambda u: jnp.zeros(())

    def error(key):
        k_support, k_x0, k_estimate = jr.split(key, 3)
        support = jr.uniform(k_support, (16, 6), minval=-1.0, maxval=1.0)
        x_t = path.perturb(jr.normal(k_x0, (6,)), support[0], t)
        return Pooled()(k_estimate, path, flat, x_t, t, support).mean - known(x_t)

    def known(x_t):
        grid = jnp.linspace(-1.0, 1.0, 401)
        near = jax.nn.softmax(-((x_t[:, None] - t * grid[None]) ** 2) / (2 * (1 - t) ** 2), axis=1)
        return near @ grid

    errors = jax.jit(jax.vmap(error))(jr.split(jr.key(0), 500))
    assert jnp.sqrt(jnp.mean(errors**2)) < 0.15


QUICK = ("official", "three")
SQUASHED = ("official", "uniform", "mixture", "three")  # one of each kind also on a squashed target


@pytest.mark.parametrize(
    ("name", "target"),
    [pytest.param(name, BIMODAL, marks=() if name in QUICK else pytest.mark.slow) for name in ESTIMATORS]
    + [pytest.param(name, Separable.two_modes(2), marks=pytest.mark.slow) for name in SQUASHED],
    ids=[*ESTIMATORS, *(f"{name} squashed" for name in SQUASHED)],
)
def test_consistent(name, target):
    """Within 4 standard errors of the exact answer, plus the bias of order 1 / ESS that is left."""
    estimator, times = ESTIMATORS[name]
    path, states, repeats = Linear(), 4, 48
    x1 = target.sample(jr.key(10), states)
    x_t0 = jr.normal(jr.key(11), x1.shape)

    @jax.jit
    def run(t):
        x_t = jax.vmap(path.perturb, (0, 0, None))(x_t0, x1, t)
        keys = jr.split(jr.key(12), (states, repeats))
        one = lambda x, k: estimator(k, path, target, x, t, SUPPORT)
        out = jax.vmap(jax.vmap(one, (None, 0)))(x_t, keys)
        return out, jax.vmap(target.posterior_mean, (None, 0, None))(path, x_t, t)

    for t in times:
        out, exact = run(jnp.asarray(t))
        ess = float(jnp.median(out.ess))
        assert ess >= 20
        # The bias of self-normalising, and of a weight tuned on the same candidates: some posterior deviations / ESS.
        margin = 4 * out.mean.std(1) / np.sqrt(repeats) + 2 * min((1 - t) / t, 1.0) / ess
        assert jnp.all(jnp.abs(out.mean.mean(1) - exact) < margin), (t, ess)


@pytest.mark.parametrize(
    "control",
    [Fixed(0), pytest.param(MinVariance(), marks=pytest.mark.slow)],
    ids=["noise", "official"],
)
def test_bias_shrinks_as_one_over_k(control):
    """Self-normalising biases by O(1/K): four times as many candidates, a quarter of the bias."""
    target, x_t, t = Separable.two_modes(1), jnp.array([0.1]), jnp.asarray(0.45)
    exact, bias = target.posterior_mean(Linear(), x_t, t)[0], {}
    for k, repeats in ((32, 20_000), (128, 30_000)):
        keys = jr.split(jr.key(k), repeats)
        means = np.asarray(repeat(Reverse(k, Noise(), control), Linear(), keys, target, x_t, t).mean)
        bias[k] = (means.mean() - float(exact), means.std() / np.sqrt(repeats))
    assert abs(bias[32][0]) > 8 * bias[32][1]
    assert bias[128][0] == pytest.approx(bias[32][0] / 4, abs=4 * bias[128][1] + abs(bias[32][0]) / 8)


def test_noise_differs_across_a_batch():
    """The key-reuse check cannot see one key closed over by vmap: candidates must differ for the same x_t."""
    out = repeat(Reverse(8, Noise(), Fixed(0)), Linear(), jr.split(jr.key(0), 16), BIMODAL, X_T, T)
    assert len(np.unique(np.asarray(out.mean[:, 0]))) == 16


def test_local_is_right_at_the_end_only():
    """For a Gaussian: score -(x - m) / s^2 of the clean law, which the noised one nears as t -> 1."""
    target, x = Gaussian(jnp.array([0.5, -0.2]), 0.6), jnp.array([0.3, 0.7])

    def gap(t):
        mean = Local()(None, Linear(), target, x, jnp.asarray(t)).mean
        score = -(x - t * mean) / (1 - t) ** 2
        np.testing.assert_allclose(score, -(x - target.mean) / 0.36, rtol=1e-3)
        return np.abs(mean - target.posterior_mean(Linear(), x, jnp.asarray(t))).max()

    assert gap(0.99) < 1e-3 and gap(0.3) > 1.0
