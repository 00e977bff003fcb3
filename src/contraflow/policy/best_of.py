"""Best of n: candidate actions of a policy, of which one is taken by its value."""

from dataclasses import dataclass, replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int

from contraflow.core.types import Obs, PRNGKey
from contraflow.nets.critic import QEnsemble
from contraflow.policy.base import Cost, Policy
from contraflow.policy.uniform import BetaActions


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
    obs: Obs,
    actions: Float[Array, "n a"],
    lam: Float[Array, ""] | None,
) -> Int[Array, ""]:
    """The index in [0, n) that `selector` picks by Q(s, a) / lam, lam > 0 (None is 1), among actions [n, a] at `obs`.

    Without a choice it is the first, and no critic is needed.
    """
    if not chooses(selector):
        return jnp.zeros((), jnp.int32)
    assert critic is not None
    q = jax.vmap(lambda a: critic.value(obs, a))(actions)
    return selector(key, q if lam is None else q / lam)


ONE, UNIFORM = "one particle", "uniform actions"


class BestOf(eqx.Module):
    """Of n particles of `policy` the one picked by Q(s, a) / temperature, by a rule for exploring or a greedy one."""

    policy: Any
    critic: QEnsemble
    temperature: Float[Array, ""] | None  # None is 1: the best of n has no use for one
    explore: Selector = eqx.field(static=True)
    greedy: Selector = eqx.field(static=True)

    def __call__(self, obs: Any, key: PRNGKey, greedy: bool = True) -> Float[Array, " a"]:
        return self.select(obs, key, self.greedy if greedy else self.explore)

    def select(self, obs: Any, key: PRNGKey, selector: Selector) -> Float[Array, " a"]:
        """The action that `selector` takes."""
        k_draw, k_pick = jr.split(key)
        actions = self.policy.particles(obs, k_draw, selector.particles)
        return actions[pick(selector, k_pick, self.critic, obs, actions, self.temperature)]

    def ablations(self) -> dict[str, Policy]:
        """One particle; and as many uniform actions (32 for one particle) by the same critic, which then acts alone."""
        if isinstance(self.policy, BetaActions):
            return {}
        n = self.greedy.particles
        uniform = BetaActions(jnp.zeros(self.policy.flow.dim), 1.0)
        return {
            ONE: replace(self, greedy=First()),
            UNIFORM: replace(self, policy=uniform, greedy=Argmax(n if n > 1 else 32)),
        }

    @property
    def cost(self) -> Cost:
        n = self.greedy.particles
        return Cost(n, self.policy.cost.nfe, n if chooses(self.greedy) else 0)
