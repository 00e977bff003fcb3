"""A plain multilayer perceptron."""

from dataclasses import dataclass

import equinox as eqx
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.core.optim import check_positive
from contraflow.core.types import PRNGKey
from contraflow.nets.layers import Activation, Linear, activation_function


class MLP(eqx.Module):
    """`depth` hidden layers of `width`, then a linear map."""

    hidden: tuple[Linear, ...]
    last: Linear
    activation: Activation = eqx.field(static=True)

    def __init__(self, into: int, out: int, width: int, depth: int, *, activation: Activation = "relu", key: PRNGKey):
        k_last, *k_hidden = jr.split(key, depth + 1)
        sizes = (into,) + (width,) * (depth - 1)
        self.hidden = tuple(Linear(size, width, key=k) for size, k in zip(sizes, k_hidden, strict=True))
        self.last = Linear(width, out, key=k_last)
        self.activation = activation

    def __call__(self, x: Float[Array, " into"]) -> Float[Array, " out"]:
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

    def __post_init__(self):
        check_positive(self, "width", "depth")

    def init(self, key: PRNGKey, into: int, out: int) -> MLP:
        """A fresh network from [into] to [out]."""
        return MLP(into, out, self.width, self.depth, activation=self.activation, key=key)
