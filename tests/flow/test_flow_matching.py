"""Regression targets: value and gradient by hand."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from contraflow.flow.matching import matching_error, posterior_error, square
from contraflow.flow.model import FlowSpec
from contraflow.nets.velocity import ResidualMLP

SPEC = FlowSpec(network=ResidualMLP(4, 1, 4))
X1, X_T, T = jnp.array([1.0, -2.0]), jnp.array([0.4, 0.6]), jnp.asarray(0.25)


def constant(value: jax.Array, spec: FlowSpec = SPEC):
    """A flow whose network returns `value` everywhere."""
    still = jax.tree.map(jnp.zeros_like, spec.init(jr.key(0), 2, 0))
    return eqx.tree_at(lambda flow: flow.net.last.bias, still, value)


def test_the_posterior_error_and_its_gradients():
    target = (np.array(X1) - np.array(X_T)) / 0.75
    loss = lambda out, mean: square(posterior_error(constant(out), jnp.zeros(0), mean, X_T, T))
    out = jnp.array([0.8, 1.2])
    value, (by_out, by_mean) = jax.value_and_grad(loss, (0, 1))(out, X1)
    np.testing.assert_allclose(value, np.mean((np.array(out) - target) ** 2), rtol=1e-6)
    np.testing.assert_allclose(by_out, np.array(out) - target, rtol=1e-6)
    np.testing.assert_array_equal(by_mean, 0.0)  # the target is held fixed


def test_what_each_prediction_is_matched_to():
    x0 = jnp.array([0.3, -0.1])
    for predict, target in {"velocity": X1 - x0, "noise": x0, "data": X1}.items():
        flow = constant(jnp.zeros(2), replace(SPEC, predict=predict))
        np.testing.assert_allclose(matching_error(flow, jnp.zeros(0), x0, X1, T), -target, rtol=1e-6)
