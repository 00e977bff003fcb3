"""Expectiles with a closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contraflow.rl.expectile import expectile_loss


@pytest.mark.parametrize(("kappa", "value"), [(0.5, 0.5), (0.7, 0.6044), (0.9, 0.75)])
def test_expectiles_of_the_uniform_distribution(kappa, value):
    """sqrt(k) / (sqrt(k) + sqrt(1 - k)): where the derivative of the mean loss over 10000 midpoints changes sign."""
    y = (jnp.arange(10_000) + 0.5) / 10_000
    slope = jax.jit(jax.grad(lambda v: expectile_loss(y - v, kappa).mean()))
    low, high = 0.0, 1.0
    for _ in range(25):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    np.testing.assert_allclose(low, np.sqrt(kappa) / (np.sqrt(kappa) + np.sqrt(1 - kappa)), rtol=1e-3)
    np.testing.assert_allclose(low, value, rtol=1e-3)  # float32 sums of 10000 numbers
