"""Maps between the unbounded end u of a flow and an action in [-1, 1]^a."""

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
        """Returns atanh a, with actions at the edge of the box moved 1e-4 inside."""
        return jnp.arctanh(jnp.clip(action, -1 + 1e-4, 1 - 1e-4))

    def uniform(self, key: PRNGKey, *shape: int) -> Vectors:
        """Returns latents [*shape] of uniform actions: logistic with scale 1/2, so no action can round to +-1."""
        return 0.5 * jr.logistic(key, shape)

    def holds(self, u: Float[Array, " a"]) -> Bool[Array, ""]:
        """Returns whether u is the latent of an action: true for every u."""
        return jnp.array(True)

    def log_det(self, u: Float[Array, " a"]) -> Float[Array, ""]:
        """Returns log |da/du| []; the log-density of an action is that of u minus this."""
        return jnp.sum(log_sech2(u))


@dataclass(frozen=True)
class Box:
    """a = clip(u, -1, 1), the point of the box nearest to u."""

    name: ClassVar[Literal["box"]] = "box"

    def action(self, u: Vectors) -> Vectors:
        return jnp.clip(u, -1.0, 1.0)

    def latent(self, action: Vectors) -> Vectors:
        return action

    def uniform(self, key: PRNGKey, *shape: int) -> Vectors:
        """Returns uniform actions [*shape]."""
        return jr.uniform(key, shape, minval=-1.0)

    def holds(self, u: Float[Array, " a"]) -> Bool[Array, ""]:
        """Returns whether u lies in the box."""
        return jnp.all(jnp.abs(u) <= 1.0)

    def log_det(self, u: Float[Array, " a"]) -> Float[Array, ""]:
        return jnp.zeros(())


@dataclass(frozen=True)
class Real:
    """a = u in R^d, for densities on the whole space (`contraflow.sampling`)."""

    name: ClassVar[Literal["real"]] = "real"

    def action(self, u: Vectors) -> Vectors:
        return u

    def latent(self, action: Vectors) -> Vectors:
        return action

    def log_det(self, u: Float[Array, " a"]) -> Float[Array, ""]:
        return jnp.zeros(())


Support = Tanh | Box | Real
