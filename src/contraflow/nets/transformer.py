"""The velocity network for long chunks: attention between the actions of a chunk."""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.core.optim import check_positive
from contraflow.core.types import PRNGKey
from contraflow.nets.layers import Linear, layer_norm, time_embedding


class Block(eqx.Module):
    """Attention and a feed-forward layer, each after a layer norm (adaLN-Zero, 2212.09748).

    The condition scales and shifts the norms and gates both layers. The block is the identity at first.
    """

    modulate: Linear
    mix: Linear  # queries, keys and values
    join: Linear
    into: Linear
    out: Linear
    heads: int = eqx.field(static=True)

    def __init__(self, width: int, heads: int, *, key: PRNGKey):
        keys = jr.split(key, 5)
        modulate = Linear(width, 6 * width, key=keys[0])
        self.modulate = eqx.tree_at(lambda m: m.weight, modulate, jnp.zeros_like(modulate.weight))
        self.mix = Linear(width, 3 * width, key=keys[1])
        self.join = Linear(width, width, key=keys[2])
        self.into = Linear(width, 4 * width, key=keys[3])
        self.out = Linear(4 * width, width, key=keys[4])
        self.heads = heads

    def __call__(self, h: Float[Array, "n w"], cond: Float[Array, "*n w"]) -> Float[Array, "n w"]:
        """Returns the tokens [n, w] under one condition [w], or one for each token [n, w]."""
        axis = None if cond.ndim == 1 else 0
        modulate = self.modulate if cond.ndim == 1 else jax.vmap(self.modulate)
        scale1, shift1, gate1, scale2, shift2, gate2 = jnp.split(modulate(jax.nn.silu(cond)), 6, axis=-1)
        n, width = h.shape

        def norm(h, scale, shift):
            return jax.vmap(lambda x, scale, shift: layer_norm(x) * (1 + scale) + shift, (0, axis, axis))(
                h, scale, shift
            )

        z = norm(h, scale1, shift1)
        q, k, v = jnp.split(jax.vmap(self.mix)(z).reshape(n, 3 * self.heads, -1), 3, axis=1)
        z = jax.nn.dot_product_attention(q, k, v).reshape(n, width)
        h = h + jnp.atleast_2d(gate1) * jax.vmap(self.join)(z)
        z = jax.vmap(lambda x: self.out(jax.nn.gelu(self.into(x))))(norm(h, scale2, shift2))
        return h + jnp.atleast_2d(gate2) * z


class Transformer(eqx.Module):
    """v(x, t, cond) with one token per action of the chunk x (DiT, 2212.09748; for control 2303.04137).

    `t` is one time, or one for each action (2512.05964).
    """

    embed: Linear
    place: Float[Array, "h w"]
    time: Linear
    cond: Linear
    blocks: tuple[Block, ...]
    last: Linear
    embedding: int = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        cond: int,
        width: int,
        depth: int,
        *,
        horizon: int,
        heads: int = 4,
        embedding: int = 128,
        key: PRNGKey,
    ):
        """`dim` is the size of the chunk of `horizon` actions; the other arguments are those of `Velocity`."""
        k_embed, k_place, k_time, k_cond, k_last, *k_blocks = jr.split(key, depth + 5)
        self.embed = Linear(dim // horizon, width, key=k_embed)
        self.place = 0.02 * jr.normal(k_place, (horizon, width))
        self.time = Linear(embedding, width, key=k_time)
        self.cond = Linear(cond, width, key=k_cond)
        self.blocks = tuple(Block(width, heads, key=k) for k in k_blocks)
        self.last = Linear(width, dim // horizon, key=k_last)
        self.embedding = embedding

    @property
    def dim(self) -> int:
        return self.place.shape[0] * self.last.bias.shape[0]

    def __call__(self, x: Float[Array, " d"], t: Float[Array, "*h"], cond: Float[Array, " c"]) -> Float[Array, " d"]:
        return jax.vmap(self.last)(self._tokens(x, t, cond)).reshape(-1)

    def features(self, x: Float[Array, " d"], t: Float[Array, "*h"], cond: Float[Array, " c"]) -> Float[Array, " w"]:
        """Returns the last hidden layer [w], averaged over the tokens."""
        return self._tokens(x, t, cond).mean(0)

    def _tokens(self, x: Float[Array, " d"], t: Float[Array, "*h"], cond: Float[Array, " c"]) -> Float[Array, "h w"]:
        h = jax.vmap(self.embed)(x.reshape(self.place.shape[0], -1)) + self.place
        if t.ndim == 0:
            c = self.time(time_embedding(t, self.embedding)) + self.cond(cond)
        else:
            c = jax.vmap(lambda t: self.time(time_embedding(t, self.embedding)))(t) + self.cond(cond)[None]
        for block in self.blocks:
            h = block(h, c)
        return jax.vmap(layer_norm)(h)


@dataclass(frozen=True)
class ChunkTransformer:
    """Settings of `Transformer`, for long chunks. Raises ValueError unless the width is a multiple of the heads."""

    width: int = 256
    depth: int = 3
    embedding: int = 32
    """Size of the time features."""
    heads: int = 4

    def __post_init__(self):
        check_positive(self, "width", "depth", "embedding", "heads")
        if self.width % self.heads:
            raise ValueError(f"a transformer's width must be a multiple of its {self.heads} heads, got {self.width}")

    def init(self, key: PRNGKey, dim: int, cond: int, horizon: int = 1) -> Transformer:
        """Returns a fresh network for chunks [dim] of `horizon` actions under conditions [cond]."""
        sizes = dim, cond, self.width, self.depth
        return Transformer(*sizes, horizon=horizon, heads=self.heads, embedding=self.embedding, key=key)
