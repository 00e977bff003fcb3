"""How the unbounded end u of a flow becomes an action in [-1, 1]^a, and back."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from contraflow.flow.targets import log_sech2

Vectors = Float[Array, "*n a"]


@dataclass(frozen=True)
class Tanh:
    """a = tanh u."""

    name: ClassVar[Literal["tanh"]] = "tanh"

    def action(self, u: Vectors) -> Vectors:
        return jnp.tanh(u)

    def latent(self, action: Vectors) -> Vectors:
        """atanh a; what lies at the edge of the box is moved 1e-4 inside."""
        return jnp.arctanh(jnp.clip(action, -1 + 1e-4, 1 - 1e-4))

    def log_det(self, u: Float[Array, " a"]) -> Float[Array, ""]:
        """log |da/du|: an action has the log-density of u less this."""
        return jnp.sum(log_sech2(u))


@dataclass(frozen=True)
class Box:
    """a = u within the box, the nearest point of it beyond."""

    name: ClassVar[Literal["box"]] = "box"

    def action(self, u: Vectors) -> Vectors:
        return jnp.clip(u, -1.0, 1.0)

    def latent(self, action: Vectors) -> Vectors:
        return action

    def log_det(self, u: Float[Array, " a"]) -> Float[Array, ""]:
        return jnp.zeros(())


@dataclass(frozen=True)
class Real:
    """a = u in R^d: for densities on the whole space (`contraflow.sampling`)."""

    name: ClassVar[Literal["real"]] = "real"

    def action(self, u: Vectors) -> Vectors:
        return u

    def latent(self, action: Vectors) -> Vectors:
        return action

    def log_det(self, u: Float[Array, " a"]) -> Float[Array, ""]:
        return jnp.zeros(())


Support = Tanh | Box | Real
