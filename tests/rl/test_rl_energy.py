"""The Boltzmann law over latents u is the one over actions a = tanh(u): by quadrature, autodiff and hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contraflow.rl.energy import boltzmann, boltzmann_in_box

LAM = 0.3


def q(a):
    return jnp.sum(jnp.sin(2.0 * a + 0.3)) + 0.5 * a[0] ** 2


def q1(a):
    return np.sin(2.0 * a + 0.3) + 0.5 * a**2


@pytest.mark.parametrize("base", [1.0, 2.0, 0.5])
def test_integrates_to_the_law_over_actions(base):
    """int exp(log pi(u)) f(tanh u) du = int exp(Q(a) / lam) (1 - a^2)^(base - 1) f(a) da for f = 1, a, a^2."""
    u = np.linspace(-30, 30, 20001)
    log_pi = boltzmann(q, jnp.asarray(LAM), base)
    density = np.exp(np.asarray(jax.vmap(lambda v: log_pi(v[None]))(jnp.asarray(u)), float))
    # The substitution a = sin(theta) makes the right-hand integrand smooth up to the faces, also for base < 1.
    theta = (np.arange(4000) + 0.5) / 4000 * np.pi - np.pi / 2
    a = np.sin(theta)
    want = np.exp(q1(a) / LAM) * np.cos(theta) ** (2 * base - 1) * np.pi / 4000
    for f in (np.ones_like, np.array, np.square):
        np.testing.assert_allclose(np.sum(density * f(np.tanh(u))) * (u[1] - u[0]), np.sum(want * f(a)), rtol=2e-4)


def test_jacobian_is_that_of_tanh():
    u = jnp.array([0.4, -1.7, 3.0])
    jacobian = jax.jacfwd(jnp.tanh)(u)
    want = q(jnp.tanh(u)) / LAM + jnp.linalg.slogdet(jacobian)[1]
    np.testing.assert_allclose(boltzmann(q, jnp.asarray(LAM))(u), want, rtol=1e-4)


def test_gradient_and_extremes():
    """grad log pi = Q'(a) (1 - a^2) / lam - 2 base a, finite wherever u is."""
    grad = jax.vmap(jax.grad(boltzmann(lambda a: 3.0 * a[0], jnp.asarray(LAM), 0.7)))
    u = np.array([-200.0, -2.0, 0.0, 0.5, 200.0])
    a = np.tanh(u)
    np.testing.assert_allclose(
        grad(jnp.asarray(u)[:, None])[:, 0], 3 * (1 - a**2) / LAM - 1.4 * a, rtol=1e-4, atol=1e-5
    )


def test_in_a_box_values_beyond_are_those_of_the_nearest_action():
    """Value and gradient; the density inside is exp(Q / lam) itself."""
    log_pi = boltzmann_in_box(q, jnp.asarray(LAM))
    inside, beyond = jnp.array([0.3, -0.8]), jnp.array([1.7, -0.8])
    np.testing.assert_allclose(log_pi(inside), q(inside) / LAM, rtol=1e-6)
    edge = jnp.array([1.0, -0.8])
    np.testing.assert_allclose(log_pi(beyond), q(edge) / LAM, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(log_pi)(beyond), jax.grad(q)(edge) / LAM, rtol=1e-6)
