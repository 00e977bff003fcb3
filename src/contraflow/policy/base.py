"""What a policy is: a pytree that one calls. It is what gets evaluated, saved, served, exported and composed.

Array leaves are what was learned, everything else is static; policies are made of policies (`Normalised`, `Noisy`,
`BestOf`). What some of them can do beside acting is asked for by name:

    cost                                            what one greedy action costs (`Cost`)
    ablations() -> {rule: policy}                   what is left without a part: one particle, no actor
    particles(obs, key, n) -> actions [n, a]        n candidates for one observation
    sample(obs, key) -> (action, extras)            an action while exploring, and what a gradient must know of it
    flow                                            the `Flow` that acts, for fine-tuning and composition
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.core.observation import rows
from contraflow.core.types import PRNGKey


@runtime_checkable
class Policy(Protocol):
    """One action in [-1, 1]^a for one observation; batches by `vmap`. `greedy` False is the rule of exploration."""

    def __call__(self, obs: Any, key: PRNGKey, greedy: bool = True) -> Float[Array, " a"]: ...


@dataclass(frozen=True)
class Cost:
    """Of one action: `particles` candidates, `nfe` evaluations of the actor for each, `critic_calls` in all."""

    particles: int
    nfe: int
    critic_calls: int


class Noisy(eqx.Module):
    """clip(policy(s) + unit * scale * e, -1, 1), e ~ N(0, I), while exploring; the policy itself otherwise."""

    policy: Any
    scale: Float[Array, ""] | None
    unit: float = eqx.field(static=True)

    def __call__(self, obs: Any, key: PRNGKey, greedy: bool = True) -> Float[Array, " a"]:
        k_policy, k_noise = jr.split(key)
        action = self.policy(obs, k_policy, greedy)
        if greedy:
            return action
        std = self.unit if self.scale is None else self.unit * self.scale
        return jnp.clip(action + std * jr.normal(k_noise, action.shape), -1.0, 1.0)

    def ablations(self) -> dict[str, Policy]:
        return mapped_ablations(self.policy, lambda policy: Noisy(policy, self.scale, self.unit))

    @property
    def cost(self) -> Cost | None:
        return self.policy.cost


def mapped_ablations(policy: Any, wrap: Callable[[Any], Policy]) -> dict[str, Policy]:
    """The ablations of a policy within a wrapper."""
    return {name: wrap(part) for name, part in ablations(policy).items()}


def ablations(policy: Any) -> dict[str, Policy]:
    """What is left of a policy without its parts, by rule; {} for one that has none."""
    return getattr(policy, "ablations", dict)()


def inner(policy: Any, name: str) -> Any:
    """The attribute `name` of a policy or, failing that, of the policy within it; None if none has it."""
    while policy is not None:
        if (found := getattr(policy, name, None)) is not None:
            return found
        policy = getattr(policy, "policy", None)
    return None


def innermost(policy: Any) -> Any:
    """The policy within all wrappers."""
    while (within := getattr(policy, "policy", None)) is not None:
        policy = within
    return policy


@partial(jax.jit, static_argnames=("greedy",))
def act_batch(policy: Policy, obs: Any, key: PRNGKey, first: Any, greedy: bool = True) -> Any:
    """Actions [N, a] for observations [N, ...]; the number of row r is first + r, and its key is folded from `key`."""
    keys = jax.vmap(jr.fold_in, (None, 0))(key, first + jnp.arange(rows(obs)))
    return jax.vmap(lambda o, k: policy(o, k, greedy))(obs, keys)
