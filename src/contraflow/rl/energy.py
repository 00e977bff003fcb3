"""The target law of a maximum-entropy policy, as a density over latent actions u; a = tanh(u), or u within its box."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from contraflow.flow.targets import LogDensity, log_sech2


def boltzmann(
    q: Callable[[Float[Array, " a"]], Float[Array, ""]], lam: Float[Array, ""], base: float = 1.0
) -> LogDensity:
    """log pi(u) = Q(tanh u) / lam + base * sum_j log sech^2 u_j (2601.08136, section 4).

    base = 1 is exactly exp(Q / lam) over actions a in (-1, 1)^d; base < 1 favours the faces of the box.
    """

    def log_pi(u: Float[Array, " a"]) -> Float[Array, ""]:
        return q(jnp.tanh(u)) / lam + base * jnp.sum(log_sech2(u))

    return log_pi


def boltzmann_in_box(q: Callable[[Float[Array, " a"]], Float[Array, ""]], lam: Float[Array, ""]) -> LogDensity:
    """log pi(u) = Q(clip(u)) / lam: exp(Q / lam) on [-1, 1]^d for candidates drawn inside, as `TruncatedNoise` does.

    Beyond the box value and gradient are those of the nearest action: no critic is asked about what no action is, and
    laws of u given x_t exist, though there is no integral over all u (SDAC, 2502.00361, clips so).
    """

    def log_pi(u: Float[Array, " a"]) -> Float[Array, ""]:
        return q(u + jax.lax.stop_gradient(jnp.clip(u, -1.0, 1.0) - u)) / lam

    return log_pi
