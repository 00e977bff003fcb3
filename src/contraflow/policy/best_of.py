"""Best of n: draw candidate actions from a policy and pick one by its value."""

from dataclasses import dataclass, replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int

from contraflow.core.types import Obs, PRNGKey, UserError
from contraflow.nets.critic import QEnsemble
from contraflow.policy.base import Cost, Policy, innermost
from contraflow.policy.gaussian import ClippedGaussian, Deterministic, SquashedGaussian
from contraflow.policy.uniform import BetaActions
from contraflow.policy.value import as_value, under


def _check(particles: int) -> None:
    if particles < 1:
        raise ValueError(f"a selector needs at least one particle, got {particles}")


@dataclass(frozen=True)
class Softmax:
    """Picks index i with probability ~ exp(score_i). Raises ValueError for fewer than one particle."""

    particles: int = 32

    def __post_init__(self):
        _check(self.particles)

    def __call__(self, key: PRNGKey, score: Float[Array, " n"]) -> Int[Array, ""]:
        return jr.categorical(key, score)


@dataclass(frozen=True)
class Argmax:
    """Picks the best of n. Raises ValueError for fewer than one particle."""

    particles: int = 32

    def __post_init__(self):
        _check(self.particles)

    def __call__(self, key: PRNGKey, score: Float[Array, " n"]) -> Int[Array, ""]:
        return jnp.argmax(score)


@dataclass(frozen=True)
class First:
    """Picks the first candidate, so the policy acts alone. Use more than one particle only if others need them.

    Raises ValueError for fewer than one particle.
    """

    particles: int = 1

    def __post_init__(self):
        _check(self.particles)

    def __call__(self, key: PRNGKey, score: Float[Array, " n"]) -> Int[Array, ""]:
        return jnp.zeros((), jnp.int32)


Selector = Softmax | Argmax | First


def chooses(selector: Selector) -> bool:
    """Returns whether the selector uses scores; if not, the critic need not be evaluated."""
    return selector.particles > 1 and not isinstance(selector, First)


def pick(
    selector: Selector,
    key: PRNGKey,
    critic: QEnsemble | None,
    obs: Obs,
    actions: Float[Array, "n a"],
    lam: Float[Array, ""] | None,
) -> Int[Array, ""]:
    """Returns the index in [0, n) that `selector` picks by Q(s, a) / lam among actions [n, a] at `obs`, with lam > 0
    (None is 1).

    A selector that uses no scores picks index 0 and needs no critic.
    """
    if not chooses(selector):
        return jnp.zeros((), jnp.int32)
    assert critic is not None
    q = jax.vmap(lambda a: critic.value(obs, a))(actions)
    return selector(key, q if lam is None else q / lam)


ONE, UNIFORM = "one particle", "uniform actions"


class BestOf(eqx.Module):
    """Picks one of n particles of `policy` by Q(s, a) / temperature, with separate rules for `explore` and `greedy`."""

    policy: Any
    critic: QEnsemble
    temperature: Float[Array, ""] | None  # None is 1: the best of n has no use for one
    explore: Selector = eqx.field(static=True)
    greedy: Selector = eqx.field(static=True)

    def __call__(self, obs: Any, key: PRNGKey, greedy: bool = True) -> Float[Array, " a"]:
        return self.select(obs, key, self.greedy if greedy else self.explore)

    def select(self, obs: Any, key: PRNGKey, selector: Selector) -> Float[Array, " a"]:
        """Returns the action [a] that `selector` picks."""
        k_draw, k_pick = jr.split(key)
        actions = self.policy.particles(obs, k_draw, selector.particles)
        return actions[pick(selector, k_pick, self.critic, obs, actions, self.temperature)]

    def ablations(self) -> dict[str, Policy]:
        """Returns one particle without the critic, and n uniform actions (32 if n = 1) picked by the critic alone."""
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


class Chosen(eqx.Module):
    """Picks the best of n actions of a whole policy, by a value that need not be its own (V-GPS, 2410.13816).

    With one action it is the policy itself.
    """

    policy: Any
    value: Any
    n: int = eqx.field(static=True)

    def __call__(self, obs: Any, key: PRNGKey, greedy: bool = True) -> Float[Array, " a"]:
        if self.n == 1:
            return self.policy(obs, key, greedy)
        actions = jax.vmap(lambda k: self.policy(obs, k, greedy))(jr.split(key, self.n))
        return actions[jnp.argmax(jax.vmap(under(self.value, obs))(actions))]

    @property
    def cost(self) -> Cost:
        cost = self.policy.cost
        return Cost(self.n * cost.particles, cost.nfe, self.n * cost.critic_calls + (self.n if self.n > 1 else 0))


def chosen(policy: Policy, value: Any, n: int) -> Chosen:
    """Returns the policy that acts with the best of n of its actions by a value (`contraflow.policy.value`).

    Raises UserError for n < 1, and for a Gaussian policy, whose greedy actions are all the same.
    """
    if n < 1:
        raise UserError(f"the best of {n} actions is none: give at least 1")
    if isinstance(innermost(policy), SquashedGaussian | ClippedGaussian | Deterministic):
        raise UserError("a choice needs a policy that draws its greedy actions, such as a flow: this one has a mean")
    return Chosen(policy, as_value(value), n)
