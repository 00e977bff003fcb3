"""Behaviour cloning of a batch by a flow or diffusion policy."""

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.core.types import Batch, PRNGKey
from contraflow.flow.matching import matching_error
from contraflow.flow.model import EDGE, Flow


def cloning_loss(flow: Flow, batch: Batch, key: PRNGKey, weight: Float[Array, " B"] | None = None) -> Float[Array, ""]:
    """Returns sum w mask |f(x_t, t, s) - f*|^2 / sum mask, x_t between noise and a_data, t ~ U(0, 1) for each row.

    f* is a_data - x_0, the noise x_0 or a_data, as the flow predicts. Without `weight` every row has the weight 1.
    """

    def one(obs, action, key):
        k_noise, k_t = jr.split(key)
        t = jr.uniform(k_t, minval=EDGE, maxval=1 - EDGE)
        return matching_error(flow, obs, flow.noise(k_noise), flow.spec.support.latent(action), t)

    square = batch.mask * jax.vmap(one)(batch.obs, batch.action, jr.split(key, batch.reward.shape[0])) ** 2
    square = square if weight is None else weight[:, None] * square
    return jnp.sum(square) / jnp.maximum(batch.mask.sum(), 1.0)
