"""Target density of a maximum-entropy policy over latent actions u, with a = tanh(u) or a = u in the box."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from contraflow.flow.targets import LogDensity, log_sech2


def boltzmann(
    q: Callable[[Float[Array, " a"]], Float[Array, ""]], lam: Float[Array, ""], base: float = 1.0
) -> LogDensity:
    """Returns log pi(u) = Q(tanh u) / lam + base * sum_j log sech^2 u_j (2601.08136, section 4), a function of u [a].

    base = 1 is exactly exp(Q / lam) over actions a in (-1, 1)^d; base < 1 favours the faces of the box.
    """

    def log_pi(u: Float[Array, " a"]) -> Float[Array, ""]:
        return q(jnp.tanh(u)) / lam + base * jnp.sum(log_sech2(u))

    return log_pi


def boltzmann_in_box(q: Callable[[Float[Array, " a"]], Float[Array, ""]], lam: Float[Array, ""]) -> LogDensity:
    """Returns log pi(u) = Q(clip(u)) / lam, which is exp(Q / lam) on [-1, 1]^d for candidates drawn inside the box.

    Outside the box, value and gradient are those of the nearest action, so the critic is never evaluated off the box.
    There is no integral over all u, but the posterior of u given x_t exists. SDAC (2502.00361) clips the same way, and
    `TruncatedNoise` draws inside the box.
    """

    def log_pi(u: Float[Array, " a"]) -> Float[Array, ""]:
        return q(u + jax.lax.stop_gradient(jnp.clip(u, -1.0, 1.0) - u)) / lam

    return log_pi
