"""The network of a flow, from (x [d], t, cond [c]) to a vector [d]."""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.core.optim import check_positive
from contraflow.core.types import PRNGKey
from contraflow.nets.layers import Activation, Linear, SplitLinear, activation_function, time_embedding


class Velocity(eqx.Module):
    """v(x, t, cond): a residual MLP, h <- h + act(W h + b), with separate first-layer weights for x, t and cond.

    `t` is one time, or one for each action of a chunk: then the network sees the mean of their features.
    """

    first: SplitLinear
    blocks: tuple[Linear, ...]
    last: Linear
    embedding: int = eqx.field(static=True)
    activation: Activation = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        cond: int,
        width: int,
        depth: int,
        *,
        embedding: int = 128,
        activation: Activation = "gelu",
        key: PRNGKey,
    ):
        """dim: size of x; cond: size of the condition; depth: residual blocks; embedding: size of the time features."""
        k_first, k_last, *k_blocks = jr.split(key, depth + 2)
        self.first = SplitLinear((dim, embedding, cond), width, key=k_first)
        self.blocks = tuple(Linear(width, width, key=k) for k in k_blocks)
        self.last = Linear(width, dim, key=k_last)
        self.embedding = embedding
        self.activation = activation

    @property
    def dim(self) -> int:
        return self.last.bias.shape[0]

    def __call__(self, x: Float[Array, " d"], t: Float[Array, "*h"], cond: Float[Array, " c"]) -> Float[Array, " d"]:
        return self.last(self.features(x, t, cond))

    def features(self, x: Float[Array, " d"], t: Float[Array, "*h"], cond: Float[Array, " c"]) -> Float[Array, " w"]:
        """Returns the last hidden layer [w]."""
        act = activation_function(self.activation)
        h = act(self.first(x, _time_features(t, self.embedding), cond))
        for block in self.blocks:
            h = h + act(block(h))
        return h


def _time_features(t: Float[Array, "*h"], size: int) -> Float[Array, " size"]:
    """Returns the features of one time, or the mean of those of h times: exactly those of one time if all are equal."""
    if t.ndim == 0:
        return time_embedding(t, size)
    last = time_embedding(t[-1], size)
    return last + jnp.mean(jax.vmap(lambda t: time_embedding(t, size) - last)(t), 0)


@dataclass(frozen=True)
class ResidualMLP:
    """Settings of `Velocity`. Raises ValueError unless all sizes are positive."""

    width: int = 256
    depth: int = 3
    """Residual layers, after a first one."""
    embedding: int = 32
    """Size of the time features."""

    def __post_init__(self):
        check_positive(self, "width", "depth", "embedding")

    def init(self, key: PRNGKey, dim: int, cond: int, horizon: int = 1) -> Velocity:
        """Returns a fresh network for vectors [dim] under conditions [cond]."""
        return Velocity(dim, cond, self.width, self.depth, embedding=self.embedding, key=key)
