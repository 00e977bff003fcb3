"""Pick one of n candidate actions by score (Q / lambda)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int

from contraflow.core.types import PRNGKey
from contraflow.nets.critic import QEnsemble


def _check(particles: int) -> None:
    if particles < 1:
        raise ValueError(f"a selector needs at least one particle, got {particles}")


@dataclass(frozen=True)
class Softmax:
    """Index i with probability ~ exp(score_i)."""

    particles: int = 32

    def __post_init__(self):
        _check(self.particles)

    def __call__(self, key: PRNGKey, score: Float[Array, " n"]) -> Int[Array, ""]:
        return jr.categorical(key, score)


@dataclass(frozen=True)
class Argmax:
    """The best of n."""

    particles: int = 32

    def __post_init__(self):
        _check(self.particles)

    def __call__(self, key: PRNGKey, score: Float[Array, " n"]) -> Int[Array, ""]:
        return jnp.argmax(score)


@dataclass(frozen=True)
class First:
    """The first, no choice: the policy itself. More than one particle only where others are of use too."""

    particles: int = 1

    def __post_init__(self):
        _check(self.particles)

    def __call__(self, key: PRNGKey, score: Float[Array, " n"]) -> Int[Array, ""]:
        return jnp.zeros((), jnp.int32)


Selector = Softmax | Argmax | First


def chooses(selector: Selector) -> bool:
    """Whether scores matter: no critic needs to be asked otherwise."""
    return selector.particles > 1 and not isinstance(selector, First)


def pick(
    selector: Selector,
    key: PRNGKey,
    critic: QEnsemble | None,
    obs: Float[Array, " o"],
    actions: Float[Array, "n a"],
    lam: Float[Array, ""],
) -> Int[Array, ""]:
    """The index in [0, n) that `selector` picks by Q(s, a) / lam, lam > 0, among actions [n, a] at obs [o].

    Without a choice it is the first, and no critic is needed.
    """
    if not chooses(selector):
        return jnp.zeros((), jnp.int32)
    assert critic is not None
    return selector(key, jax.vmap(lambda a: critic.value(obs, a))(actions) / lam)
