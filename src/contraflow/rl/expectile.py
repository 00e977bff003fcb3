"""Expectiles: between the mean of a distribution and its maximum."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def expectile_loss(error: Float[Array, "*n"], kappa: float) -> Float[Array, "*n"]:
    """|kappa - 1{u < 0}| u^2 of u = y - v (Newey and Powell 1987; IQL, 2110.06169, equation 4).

    Its mean is least where v is the kappa-expectile of y: the mean for kappa = 1/2, the maximum as kappa -> 1.
    """
    return jnp.where(error < 0, 1 - kappa, kappa) * error**2
