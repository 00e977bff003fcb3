"""State-action value functions."""

from dataclasses import dataclass
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.core.observation import Observation
from contraflow.core.types import Obs, PRNGKey
from contraflow.nets.encoder import Encoder, Pixels, encode, encoder_for
from contraflow.nets.heads import Head, Point
from contraflow.nets.layers import Activation, Linear, Residual, SplitLinear, activation_function, layer_norm

Values = Float[Array, " m"]
Weights = Float[Array, " m"]
Scalar = Float[Array, ""]
Block = Literal["plain", "normalised", "residual"]
"""Hidden layers of a critic: `plain`, relu(W h + b); `normalised`, with layer norm before relu; or `residual`,
h + W relu(V norm(h)) with four times the width inside (SimBa, 2410.09754)."""


@dataclass(frozen=True)
class Min:
    """min_i Q_i (clipped double Q-learning, 1802.09477)."""

    def __call__(self, q: Values, key: PRNGKey | None = None) -> tuple[Weights, Scalar]:
        return jax.nn.one_hot(jnp.argmin(q), q.shape[0]), jnp.zeros(())


@dataclass(frozen=True)
class Mean:
    """mean_i Q_i - rho std_i Q_i: the mean for rho = 0, a lower confidence bound for rho > 0."""

    rho: float = 0.0

    def __call__(self, q: Values, key: PRNGKey | None = None) -> tuple[Weights, Scalar]:
        m = q.shape[0]
        spread = jnp.sqrt(jnp.var(q) + 1e-12) if self.rho else jnp.zeros(())  # sqrt has no gradient at 0
        return jnp.full(m, 1.0 / m), -self.rho * spread


@dataclass(frozen=True)
class SubsetMin:
    """The minimum over `size` members drawn at each update (REDQ, 2101.05982); it needs a key, so use it for backups.

    Raises ValueError for size < 1.
    """

    size: int = 2

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"SubsetMin(size={self.size}): needs at least one member")

    def __call__(self, q: Values, key: PRNGKey | None = None) -> tuple[Weights, Scalar]:
        assert key is not None
        drawn = jr.permutation(jr.clone(key), q.shape[0]) < self.size
        return jax.nn.one_hot(jnp.argmin(jnp.where(drawn, q, jnp.inf)), q.shape[0]), jnp.zeros(())


Reduce = Min | Mean
"""Reduces the values of several critics to one: returns weights that sum to 1, and a number to add."""


class Critic(eqx.Module):
    """Outputs of a head [k] at (s, a). The first layer has separate weights for the action and the state."""

    first: SplitLinear
    hidden: tuple[Linear | Residual, ...]
    last: Linear
    activation: Activation = eqx.field(static=True)
    block: Block = eqx.field(static=True)
    encoder: Encoder | None = None

    def __init__(
        self,
        obs: Observation,
        action: int,
        width: int,
        depth: int,
        *,
        outputs: int = 1,
        block: Block = "plain",
        activation: Activation = "relu",
        pixels: Pixels = Pixels(),
        key: PRNGKey,
    ):
        """`depth` counts all hidden layers, or the residual blocks after the first layer."""
        residual = block == "residual"
        k_first, k_last, *k_hidden = jr.split(key, depth + 1 + residual)
        self.encoder, size = encoder_for(obs, pixels, key)
        self.first = SplitLinear((action, size), width, key=k_first)
        self.hidden = tuple(Residual(width, key=k) if residual else Linear(width, width, key=k) for k in k_hidden)
        self.last = Linear(width, outputs, key=k_last)
        self.activation = activation
        self.block = block

    def __call__(self, obs: Obs, action: Float[Array, " a"]) -> Float[Array, " k"]:
        h = self.first(action, encode(self.encoder, obs))
        if self.block == "residual":
            for layer in self.hidden:
                h = layer(h)
            return self.last(layer_norm(h))
        act = activation_function(self.activation)
        norm = layer_norm if self.block == "normalised" else lambda h: h
        h = act(norm(h))
        for layer in self.hidden:
            h = act(norm(layer(h)))
        return self.last(h)


class QEnsemble(eqx.Module):
    """m critics with stacked parameters and independent initialisations, and the reduction of their values to one.

    Evaluation loops over the members: on a CPU separate matrix products are twice as fast as one batched product, and m
    is small.
    """

    members: Critic
    num: int = eqx.field(static=True)
    head: Head = eqx.field(static=True)
    reduce: Reduce = eqx.field(static=True)

    def __init__(
        self,
        num: int,
        obs: Observation,
        action: int,
        width: int,
        depth: int,
        *,
        head: Head = Point(),
        reduce: Reduce = Min(),
        key: PRNGKey,
        **kwargs,
    ):
        def member(k):
            return Critic(obs, action, width, depth, outputs=head.outputs, key=k, **kwargs)

        self.members = jax.vmap(member)(jr.split(key, num))
        self.num, self.head, self.reduce = num, head, reduce

    def encode(self, obs: Obs) -> Obs:
        """Returns the observation as the members see it, [m, c]; a vector observation is returned unchanged.

        The other methods accept the result in place of the observation, so encode once before a loop over actions.
        """
        if self.members.encoder is None or getattr(obs, "ndim", None) == 2:
            return obs
        return jnp.stack([encode(member.encoder, obs) for member in self._each()])

    def outputs(self, obs: Obs, action: Float[Array, " a"]) -> Float[Array, "m k"]:
        """Returns the outputs of every member [m, k], from which the head computes values."""
        seen = self.encode(obs)
        rows: Any = [obs] * self.num if self.members.encoder is None else seen
        return jnp.stack([member(row, action) for member, row in zip(self._each(), rows, strict=True)])

    def _each(self) -> list[Critic]:
        return [jax.tree.map(lambda leaf, i=i: leaf[i], self.members) for i in range(self.num)]

    def __call__(self, obs: Obs, action: Float[Array, " a"]) -> Float[Array, " m"]:
        """Returns Q_i(s, a) [m]."""
        return jax.vmap(self.head.mean)(self.outputs(obs, action))

    def value(self, obs: Obs, action: Float[Array, " a"]) -> Float[Array, ""]:
        """Returns Q(s, a) [], the reduced value that policies climb and select by."""
        q = self(obs, action)
        weights, shift = self.reduce(q)
        return weights @ q + shift
