"""Solving with predicted noise, against the map that is known where actions are Gaussian."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from contraflow.flow.path import VP, Cosine, Linear
from contraflow.rl.flow_policy import FlowPolicy

MEAN, STD = 0.3, 0.2


class Exact(FlowPolicy):
    """The noise E[x0 | x_t] where x1 ~ N(MEAN, STD^2)."""

    def output(self, net, x, t, r, obs):
        a, b = self.path.alpha(t), self.path.beta(t)
        return b * (x - a * MEAN) / (a**2 * STD**2 + b**2)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("path", [Linear(), Cosine(), VP()], ids=lambda p: type(p).__name__)
def test_noise_leads_to_the_gaussian(path, clip):
    """x_1 = m + s (x_0 - alpha_0 m) / sqrt(alpha_0^2 s^2 + beta_0^2), also where alpha_0 = 0: x_t is the noise then."""
    policy = Exact(path=path, predict="noise", steps=400, clip=clip)
    x0 = jr.normal(jr.key(0), (64, 2))
    x1 = jax.jit(jax.vmap(lambda x: policy(None, x, jnp.zeros(1))))(x0)
    a, b = path.alpha(jnp.zeros(())), path.beta(jnp.zeros(()))
    np.testing.assert_allclose(x1, MEAN + STD * (x0 - a * MEAN) / jnp.sqrt(a**2 * STD**2 + b**2), atol=0.02)
