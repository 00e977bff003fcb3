"""Rows for tests with a known Q, where nothing but the number of rows and what follows matters."""

import jax.numpy as jnp

from contraflow.core.types import Batch


def bandit(n: int, dim: int = 1, discount: float = 0.0) -> Batch:
    """n rows of one state, action and reward 0; discount 0 ends the episode."""
    zeros, action = jnp.zeros((n, 1)), jnp.zeros((n, dim))
    return Batch(zeros, action, zeros[:, 0], jnp.full(n, discount), zeros, jnp.ones((n, dim)))
