"""`Markov` and `Gibbs`: unbiased in many dimensions with few candidates, where the endpoint is a draw of the target."""

from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.closeness import assert_close
from tests.flow.invariance import residuals

from contraflow.flow.path import Linear
from contraflow.flow.posterior.control import Fixed
from contraflow.flow.posterior.gibbs import Gibbs
from contraflow.flow.posterior.importance import Reverse
from contraflow.flow.posterior.markov import Markov
from contraflow.flow.posterior.proposal import Mixture, Noise, Particles, TruncatedNoise
from contraflow.flow.targets import Gaussian, GaussianMixture, Separable, log_normal

MARKOV = {
    "weights": Markov(2, sizes=()),
    "resampling": Markov(4, sizes=(1e-9,)),
    "langevin": Markov(1, sizes=(2.5,) * 6, control=0.0),
    "both": Markov(4, sizes=(1.0, 3.0), control=0.5),
    "gibbs": Gibbs(3),
    "sweeps": Gibbs(3, sweeps=3),
}
QUICK = ("resampling", "both", "gibbs")
SIX = Separable.two_modes(6, 0.5)


@pytest.mark.parametrize("t", [0.15, *(pytest.param(t, marks=pytest.mark.slow) for t in (0.5, 0.85))])
@pytest.mark.parametrize(
    "estimator",
    [pytest.param(e, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, e in MARKOV.items()],
)
def test_unbiased_where_the_policy_is_right(estimator, t):
    """With one to four candidates, in six dimensions of two modes each."""
    assert residuals(estimator, SIX, jr.key(3), 40_000, jnp.asarray(t)).max() < 4.0


@pytest.mark.parametrize("t", [0.15, 0.5])
def test_unbiased_with_several_endpoints(t):
    """The others start chains too, as often as they explain x_t."""
    estimator = Markov(2, sizes=(1.0,), control=0.5)
    assert residuals(estimator, SIX, jr.key(3), 40_000, jnp.asarray(t), 5).max() < 4.0


@pytest.mark.parametrize(("modes", "std"), [((1.0, -1.0), 0.5), ((1.0, -3.0), 0.3)], ids=["near", "far"])
@pytest.mark.parametrize(("t", "endpoints"), [(0.5, 1), (0.15, 4), (0.85, 4)])
def test_gibbs_is_unbiased_where_coordinates_hang_together(modes, std, t, endpoints):
    """Two modes on a diagonal; far: u out in the strata's tails, where a sweep hardly moves."""
    target = GaussianMixture(jnp.outer(jnp.array(modes), jnp.ones(3)), std, jnp.array([0.3, 0.7]))
    draws = 160_000 // endpoints
    assert residuals(Gibbs(3), target, jr.key(4), draws, jnp.asarray(t), endpoints).max() < 4.0


def test_a_sweep_renews_each_coordinate_given_the_others_by_then():
    """With many candidates the mean is that of two exact steps, in either order, by quadrature."""
    target = GaussianMixture(jnp.array([[0.8, 0.8], [-0.8, -0.8]]), 0.5, jnp.array([0.3, 0.7]))
    x_t, t, start = jnp.array([0.1, 0.0]), jnp.asarray(0.3), jnp.array([1.0, 0.4])
    u = jnp.linspace(-4.0, 4.0, 801)
    pairs = jnp.stack(jnp.meshgrid(u, u, indexing="ij"), -1).reshape(-1, 2)
    log_p = jax.vmap(lambda u: target(u) + log_normal(x_t, t * u, 1 - t))(pairs).reshape(801, 801)

    def means(log_p, second):
        """(first, second) renewed in that order, the second starting at `second`."""
        p_first = jax.nn.softmax(log_p[:, jnp.argmin(jnp.abs(u - second))])
        return p_first @ u, p_first @ (jax.nn.softmax(log_p, axis=1) @ u)

    forwards, backwards = means(log_p, start[1]), means(log_p.T, start[0])
    exact = jnp.stack([(forwards[0] + backwards[1]) / 2, (forwards[1] + backwards[0]) / 2])
    run = jax.jit(jax.vmap(lambda k: Gibbs(64)(k, Linear(), target, x_t, t, start[None]).mean))
    assert_close(run(jr.split(jr.key(0), 20_000)).mean(0), exact, 0.01, scale=0.8)  # of where the modes are


def test_a_sweep_forgets_a_wrong_endpoint_where_coordinates_are_independent():
    """In 20 dimensions, where 400 candidates drawn for all coordinates at once do not."""
    target, t = Separable.two_modes(20, 0.3), jnp.asarray(0.3)
    x_t = Linear().perturb(jr.normal(jr.key(0), (20,)), target.sample(jr.key(1), 1)[0], t)
    exact = target.posterior_mean(Linear(), x_t, t)

    def error(estimator):
        run = jax.vmap(lambda k: estimator(k, Linear(), target, x_t, t, jnp.full((1, 20), 2.0)).mean)
        return jnp.sqrt(jnp.mean((jax.jit(run)(jr.split(jr.key(2), 300)).mean(0) - exact) ** 2))

    assert error(Gibbs(16)) < 0.04
    assert error(Markov(400, sizes=())) > 0.1


def test_several_endpoints_are_less_noise():
    """At small t, where x_t tells little, 16 chains have a 16th of the variance; at large t they start alike."""
    target, estimator = Gaussian(jnp.zeros(6), 0.7), Markov(1, sizes=(1e-9,))

    @partial(jax.jit, static_argnums=1)
    def spread(t, endpoints):
        def one(key):
            k_x0, k_support, key = jr.split(key, 3)
            support = target.sample(k_support, endpoints)
            x_t = Linear().perturb(jr.normal(k_x0, (6,)), support[0], t)
            exact = target.posterior_mean(Linear(), x_t, t)
            return jnp.sum((estimator(key, Linear(), target, x_t, t, support).mean - exact) ** 2)

        return jnp.mean(jax.vmap(one)(jr.split(jr.key(0), 4000)))

    ratios = [float(spread(jnp.asarray(t), 16) / spread(jnp.asarray(t), 1)) for t in (0.02, 0.9)]
    np.testing.assert_allclose(ratios, [1 / 16, 1.0], rtol=0.1)


@pytest.mark.parametrize("t", [0.1, 0.6, 0.95])
def test_control_leaves_no_variance_on_a_gaussian(t):
    """u + V s = E[x1 | x_t] at every point u, moved or not, wherever the chain starts."""
    target, x_t, t = Gaussian(jnp.array([0.5, -1.0]), 0.7), jnp.array([0.3, -0.4]), jnp.asarray(t)
    exact = target.posterior_mean(Linear(), x_t, t)
    estimator = Markov(1, sizes=(0.5, 2.0), control=0.7)
    start = exact + 0.3
    run = jax.jit(jax.vmap(lambda k: estimator(k, Linear(), target, x_t, t, start[None])))
    out = run(jr.split(jr.key(0), 20))
    # The step and the score along it, in units of the posterior's deviation, cancel.
    assert_close(out.mean, np.tile(exact, (20, 1)), 1e-5, scale=3.0)
    signal = (0.7 * t) ** 2
    np.testing.assert_allclose(out.eta, signal / (signal + (1 - t) ** 2), rtol=1e-5)


def test_forgets_a_wrong_endpoint():
    """Away from the fixed point each step moves the estimate towards the posterior mean: 60 of them arrive."""
    target, x_t, t = Gaussian(jnp.array([0.5, -1.0]), 0.7), jnp.array([0.3, -0.4]), jnp.asarray(0.6)
    exact = target.posterior_mean(Linear(), x_t, t)
    wrong = exact + 3.0

    @partial(jax.jit, static_argnums=0)
    def error(estimator):
        out = jax.vmap(lambda k: estimator(k, Linear(), target, x_t, t, wrong[None]).mean)(jr.split(jr.key(0), 2000))
        return jnp.abs(out.mean(0) - exact).max()

    few, many = (error(Markov(1, sizes=(1.0,) * n, control=0.0)) for n in (2, 60))
    assert few > 0.3 and many < 0.02
    few, many = (error(Gibbs(2, n)) for n in (1, 30))
    assert few > 0.3 and many < 0.02
    assert error(Markov(32, Noise(), sizes=())) < 0.05  # importance weights alone leave only their bias


def test_refusals():
    with pytest.raises(ValueError, match="support"):
        Markov()(jr.key(0), Linear(), SIX, jnp.zeros(6), jnp.asarray(0.5))
    with pytest.raises(ValueError, match="support"):
        Gibbs()(jr.key(0), Linear(), SIX, jnp.zeros(6), jnp.asarray(0.5))
    with pytest.raises(ValueError, match="samples must be a whole number, at least 1"):
        Markov(samples=0)
    with pytest.raises(ValueError, match="samples must be a whole number, at least 2"):
        Gibbs(samples=1)
    with pytest.raises(ValueError, match="sweeps must be a whole number, at least 1"):
        Gibbs(sweeps=0)
    with pytest.raises(ValueError, match="bound must be positive"):
        Gibbs(bound=0.0)
    with pytest.raises(ValueError, match="on the whole space"):
        Markov(proposal=TruncatedNoise())
    with pytest.raises(ValueError, match="positive"):
        Markov(sizes=(1.0, 0.0))
    with pytest.raises(ValueError, match="not Particles"):
        Markov(proposal=Mixture((Noise(), Particles())))


def test_the_test_of_bias_sees_the_bias_of_importance_sampling():
    """With four times the candidates."""
    assert residuals(Reverse(16, Mixture(), Fixed(0)), SIX, jr.key(3), 20_000, jnp.asarray(0.5)).max() > 6.0
