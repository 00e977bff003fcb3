"""Expectiles: between the mean of a distribution and its maximum."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def expectile_loss(error: Float[Array, "*n"], kappa: float) -> Float[Array, "*n"]:
    """Returns |kappa - 1{u < 0}| u^2 of u = y - v (Newey and Powell 1987; IQL, 2110.06169, equation 4).

    The kappa-expectile of y is the v that minimises its mean: the mean for kappa = 1/2, the maximum as kappa -> 1.
    """
    return jnp.where(error < 0, 1 - kappa, kappa) * error**2
