"""The regression loss of flow matching."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from contraflow.flow.path import AbstractPath, Scalar, Vector
from contraflow.flow.solve import Drift


def matching_loss(field: Drift, path: AbstractPath, x1: Vector, x_t: Vector, t: Scalar) -> Float[Array, ""]:
    """mean_j (v_j(x_t, t) - v*_j)^2 with v* the velocity that belongs to the mean x1 of x_t; x1 is held fixed."""
    target = jax.lax.stop_gradient(path.velocity(x1, x_t, t))
    return jnp.mean((field(x_t, t) - target) ** 2)
