"""State-action value functions."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.nets.layers import Activation, Linear, SplitLinear, activation_function, layer_norm
from contraflow.types import PRNGKey


class Critic(eqx.Module):
    """Q(s, a): an MLP whose first layer has one weight for the action and one for the observation."""

    first: SplitLinear
    hidden: tuple[Linear, ...]
    last: Linear
    activation: Activation = eqx.field(static=True)
    normalise: bool = eqx.field(static=True)

    def __init__(
        self,
        obs: int,
        action: int,
        width: int,
        depth: int,
        *,
        activation: Activation = "relu",
        normalise: bool = False,
        key: PRNGKey,
    ):
        """depth: hidden layers; normalise: layer norm before each activation."""
        k_first, k_last, *k_hidden = jr.split(key, depth + 1)
        self.first = SplitLinear((action, obs), width, key=k_first)
        self.hidden = tuple(Linear(width, width, key=k) for k in k_hidden)
        self.last = Linear(width, 1, key=k_last)
        self.activation = activation
        self.normalise = normalise

    def __call__(self, obs: Float[Array, " o"], action: Float[Array, " a"]) -> Float[Array, ""]:
        act = activation_function(self.activation)
        norm = layer_norm if self.normalise else lambda h: h
        h = act(norm(self.first(action, obs)))
        for layer in self.hidden:
            h = act(norm(layer(h)))
        return self.last(h)[0]


class QEnsemble(eqx.Module):
    """m critics with stacked parameters and independent initialisations.

    Evaluation is unrolled over the members: on a CPU one matrix product after another is twice as fast as one batched
    product, and m is small.
    """

    members: Critic
    num: int = eqx.field(static=True)

    def __init__(self, num: int, obs: int, action: int, width: int, depth: int, *, key: PRNGKey, **kwargs):
        self.members = jax.vmap(lambda k: Critic(obs, action, width, depth, key=k, **kwargs))(jr.split(key, num))
        self.num = num

    def __call__(self, obs: Float[Array, " o"], action: Float[Array, " a"]) -> Float[Array, " m"]:
        each = [jax.tree.map(lambda leaf, i=i: leaf[i], self.members) for i in range(self.num)]
        return jnp.stack([member(obs, action) for member in each])

    def min(self, obs: Float[Array, " o"], action: Float[Array, " a"]) -> Float[Array, ""]:
        """min_i Q_i(s, a)."""
        return self(obs, action).min()
