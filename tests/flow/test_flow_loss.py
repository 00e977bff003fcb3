"""The regression loss: value and gradient by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from contraflow.flow.matching import matching_loss
from contraflow.flow.path import Linear


def test_value_and_gradient():
    x1, x_t, t = jnp.array([1.0, -2.0]), jnp.array([0.4, 0.6]), jnp.asarray(0.25)
    target = (np.array([1.0, -2.0]) - np.array([0.4, 0.6])) / 0.75
    loss = lambda scale, x1: matching_loss(lambda x, t: scale * x, Linear(), x1, x_t, t)
    value, (by_scale, by_x1) = jax.value_and_grad(loss, (0, 1))(jnp.asarray(2.0), x1)
    error = 2.0 * np.array([0.4, 0.6]) - target
    np.testing.assert_allclose(value, np.mean(error**2), rtol=1e-6)
    np.testing.assert_allclose(by_scale, np.mean(2 * error * np.array([0.4, 0.6])), rtol=1e-6)
    np.testing.assert_array_equal(by_x1, 0.0)  # the target is held fixed
