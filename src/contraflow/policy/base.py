"""The interface of policies. A policy is a callable pytree that can be evaluated, saved, served, exported and composed.

Array leaves are learned and everything else is static. Policies can wrap policies (`Normalised`, `Noisy`, `BestOf`).
Callers look up optional abilities by name:

    cost                                            the cost of one greedy action (`Cost`)
    ablations() -> {rule: policy}                   the policy without one of its parts: one particle, no actor
    from_noise(obs, x0, key) -> action              the action of given start noise [a], for clients that steer by noise
    particles(obs, key, n) -> actions [n, a]        n candidates for one observation
    sample(obs, key) -> (action, extras)            an exploring action, and the data a policy gradient needs about it
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
    """Maps one observation to an action in [-1, 1]^a; `vmap` it over batches. `greedy=False` explores."""

    def __call__(self, obs: Any, key: PRNGKey, greedy: bool = True) -> Float[Array, " a"]: ...


@dataclass(frozen=True)
class Cost:
    """Cost of one action: `particles` candidates, `nfe` actor evaluations for each, `critic_calls` in total."""

    particles: int
    nfe: int
    critic_calls: int


class Noisy(eqx.Module):
    """Explores with clip(policy(s) + unit * scale * e, -1, 1), e ~ N(0, I); acts as the policy itself when greedy."""

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
    """Returns the ablations of a policy, each inside a wrapper."""
    return {name: wrap(part) for name, part in ablations(policy).items()}


def ablations(policy: Any) -> dict[str, Policy]:
    """Returns the ablated variants of a policy by rule; {} if it has none."""
    return getattr(policy, "ablations", dict)()


def inner(policy: Any, name: str) -> Any:
    """Returns the attribute `name` of the policy or of the first wrapped policy that has it; None if none has."""
    while policy is not None:
        if (found := getattr(policy, name, None)) is not None:
            return found
        policy = getattr(policy, "policy", None)
    return None


def innermost(policy: Any) -> Any:
    """Returns the policy inside all wrappers."""
    while (within := getattr(policy, "policy", None)) is not None:
        policy = within
    return policy


@partial(jax.jit, static_argnames=("greedy",))
def act_batch(policy: Policy, obs: Any, key: PRNGKey, first: Any, greedy: bool = True) -> Any:
    """Returns actions [N, a] for observations [N, ...]; the key of row r is `key` folded with first + r."""
    return jax.vmap(lambda o, k: policy(o, k, greedy))(obs, _keys(key, first, rows(obs)))


@partial(jax.jit, static_argnames=("greedy",))
def resume_batch(
    policy: Any, obs: Any, previous: Any, left: Any, delay: Any, key: PRNGKey, first: Any, greedy: bool = True
) -> Any:
    """Returns chunks [N, h, a] that continue `previous` [N, h, a], of which `left` [N] actions are known."""

    def one(obs, previous, left, key):
        return policy.resume(obs, previous, left, delay, key, greedy)

    return jax.vmap(one)(obs, previous, left, _keys(key, first, rows(obs)))


def _keys(key: PRNGKey, first: Any, n: int) -> Any:
    return jax.vmap(jr.fold_in, (None, 0))(key, first + jnp.arange(n))
