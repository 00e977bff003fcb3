"""The regression loss of flow matching."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from contraflow.flow.path import AbstractPath, Scalar, Vector
from contraflow.flow.solver import Drift

Predict = Literal["velocity", "noise"]
"""What a network returns: dx/dt, or E[x0 | x_t]."""


def matching_loss(
    field: Drift, path: AbstractPath, x1: Vector, x_t: Vector, t: Scalar, predict: Predict = "velocity"
) -> Float[Array, ""]:
    """mean_j (f_j(x_t, t) - f*_j)^2, f* the velocity, or noise, of the mean x1 of x_t, which is held fixed."""
    convert = path.velocity if predict == "velocity" else path.x0_from_x1
    target = jax.lax.stop_gradient(convert(x1, x_t, t))
    return jnp.mean((field(x_t, t) - target) ** 2)
