"""Advantages of a rollout."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Rows = Float[Array, "T N"]


def gae(
    reward: Rows,
    value: Rows,
    next_value: Rows,
    terminated: Bool[Array, "T N"],
    truncated: Bool[Array, "T N"],
    gamma: float,
    lam: float,
) -> Rows:
    """Returns generalised advantage estimates [T, N] (1506.02438, eq. 16).

    delta_t = r_t + gamma (1 - terminated_t) V(s_{t+1}) - V(s_t), and A_t = delta_t + gamma lam (1 - end_t) A_{t+1}.
    `next_value` is the value of the true successor, so a truncated episode bootstraps from it. No advantage is carried
    from one episode into the one before it in the same row.
    """
    delta = reward + gamma * jnp.where(terminated, 0.0, next_value) - value
    carry_on = gamma * lam * (1.0 - (terminated | truncated).astype(reward.dtype))

    def back(later, inputs):
        delta, carry_on = inputs
        now = delta + carry_on * later
        return now, now

    return jax.lax.scan(back, jnp.zeros_like(delta[0]), (delta, carry_on), reverse=True)[1]


def normalise(x: Float[Array, " B"], weight: Float[Array, " B"]) -> Float[Array, " B"]:
    """Returns (x - mean) / std [B], with moments weighted by `weight`."""
    total = jnp.maximum(weight.sum(), 1.0)
    mean = jnp.sum(weight * x) / total
    var = jnp.sum(weight * (x - mean) ** 2) / total
    return (x - mean) / (jnp.sqrt(var) + 1e-8)
