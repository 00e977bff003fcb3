"""A plain multilayer perceptron."""

from dataclasses import dataclass

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.core.observation import Observation
from contraflow.core.optim import check_positive
from contraflow.core.types import Obs, PRNGKey
from contraflow.nets.encoder import Encoder, Pixels, encode, encoder_for
from contraflow.nets.layers import Activation, Linear, activation_function


class MLP(eqx.Module):
    """`depth` hidden layers of `width`, then a linear map, applied to an observation followed by `more` numbers."""

    hidden: tuple[Linear, ...]
    last: Linear
    activation: Activation = eqx.field(static=True)
    encoder: Encoder | None = None

    def __init__(
        self,
        into: Observation,
        out: int,
        width: int,
        depth: int,
        *,
        more: int = 0,
        activation: Activation = "relu",
        pixels: Pixels = Pixels(),
        key: PRNGKey,
    ):
        k_last, *k_hidden = jr.split(key, depth + 1)
        self.encoder, size = encoder_for(into, pixels, key)
        sizes = (size + more,) + (width,) * (depth - 1)
        self.hidden = tuple(Linear(size, width, key=k) for size, k in zip(sizes, k_hidden, strict=True))
        self.last = Linear(width, out, key=k_last)
        self.activation = activation

    def encode(self, obs: Obs) -> Obs:
        """Returns the observation as a vector, which the network accepts in its place."""
        return encode(self.encoder, obs)

    def __call__(self, obs: Obs, *more: Float[Array, " _"]) -> Float[Array, " out"]:
        x = self.encode(obs)
        x = jnp.concatenate([x, *more]) if more else x
        act = activation_function(self.activation)
        for layer in self.hidden:
            x = act(layer(x))
        return self.last(x)


@dataclass(frozen=True)
class MLPSpec:
    """Settings of `MLP`. Raises ValueError unless sizes are positive."""

    width: int = 256
    depth: int = 2
    activation: Activation = "relu"
    pixels: Pixels = Pixels()
    """The encoder of image observations."""

    def __post_init__(self):
        check_positive(self, "width", "depth")

    def init(self, key: PRNGKey, into: Observation, out: int, more: int = 0) -> MLP:
        """Returns a fresh network from an observation, followed by `more` numbers, to [out]."""
        sizes = into, out, self.width, self.depth
        return MLP(*sizes, more=more, activation=self.activation, pixels=self.pixels, key=key)
