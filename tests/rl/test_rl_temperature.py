"""The tuned temperature: its estimate of an entropy, and the way it turns."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from contraflow.agents.rfm import RFM
from contraflow.rl.select import First, Softmax
from contraflow.rl.temperature import Constant, Tuned, gaussian_entropy


@pytest.mark.parametrize("n", [4, 8, 32])
def test_entropy_of_gaussian_draws(n: int):
    std = jnp.array([0.1, 0.5, 2.0])
    draws = std[None, None] * jr.normal(jr.key(0), (20_000, n, 3))
    wanted = jnp.mean(jnp.log(std)) + 0.5 * np.log(2 * np.pi * np.e)
    np.testing.assert_allclose(jax.vmap(gaussian_entropy)(draws).mean(), wanted, atol=0.01)


def test_too_much_entropy_cools():
    tuned = Tuned(entropy=-0.5, start=0.1, rate=0.01, low=0.05, high=0.2)
    log_lam = tuned.first()
    np.testing.assert_allclose(jnp.exp(log_lam), 0.1, rtol=1e-6)
    np.testing.assert_allclose(tuned.move(log_lam, jnp.asarray(0.5)) - log_lam, -0.01, rtol=1e-4)
    assert tuned.move(log_lam, jnp.asarray(-1.0)) > log_lam
    for entropy, limit in ((100.0, 0.05), (-200.0, 0.2)):
        np.testing.assert_allclose(jnp.exp(tuned.move(log_lam, jnp.asarray(entropy))), limit, rtol=1e-5)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="low <= start"):
        Tuned(start=20.0)
    with pytest.raises(ValueError, match="at least 4 particles"):
        RFM(temperature=Tuned(), backup=First())
    assert RFM(temperature=Tuned(), backup=Softmax(4)).temperature.entropy == -0.5
    assert isinstance(RFM().temperature, Constant)
