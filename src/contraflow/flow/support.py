"""How the unbounded end u of a flow becomes an action in [-1, 1]^a, and back."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float

from contraflow.core.types import PRNGKey
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

    def uniform(self, key: PRNGKey, *shape: int) -> Vectors:
        """Latents [*shape] of uniform actions: logistic of scale 1/2; drawn so, an action cannot round to +-1."""
        return 0.5 * jr.logistic(key, shape)

    def holds(self, u: Float[Array, " a"]) -> Bool[Array, ""]:
        """Whether u stands for an action: everywhere."""
        return jnp.array(True)

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

    def uniform(self, key: PRNGKey, *shape: int) -> Vectors:
        """Uniform actions [*shape]."""
        return jr.uniform(key, shape, minval=-1.0)

    def holds(self, u: Float[Array, " a"]) -> Bool[Array, ""]:
        """Whether u lies in the box."""
        return jnp.all(jnp.abs(u) <= 1.0)

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
