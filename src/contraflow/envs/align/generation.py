"""Generation as one-step episodes: a condition is observed, a sample is the action, its reward ends the episode."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float

from contraflow.core.types import EnvSpec, PRNGKey, Step

Reward = Callable[[Float[Array, " d"], Float[Array, " c"]], Float[Array, ""]]


@runtime_checkable
class Problem(Protocol):
    """What is generated, and what is asked of it. Samples lie in [-1, 1]^d. Hashable: a frozen dataclass.

    `rewards` names functions of one (sample [d], condition [c]); the first is the default. `approved` is a judge that
    training never sees; the share of approved samples is the success rate of an evaluation. `data` are samples under
    conditions, or None. A problem of images has `shape`, their rows and columns.
    """

    @property
    def sizes(self) -> tuple[int, int]:
        """Returns (numbers of a sample, numbers of a condition)."""
        ...

    @property
    def rewards(self) -> Mapping[str, Reward]: ...
    def condition(self, key: PRNGKey) -> Float[Array, " c"]:
        """Returns a random condition."""
        ...

    def approved(self, x: Float[Array, " d"], cond: Float[Array, " c"]) -> Bool[Array, ""]:
        """Returns whether the held-out judge accepts a sample."""
        ...

    def data(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns (conditions [n, c], samples [n, d])."""
        ...


@dataclass(frozen=True)
class Generation:
    """N one-step episodes of a problem. An episode's reward is sum_j weights_j rewards_j(x, c)."""

    problem: Problem
    rewards: tuple[Reward, ...]
    weights: tuple[float, ...] = (1.0,)
    num_envs: int = 1

    @property
    def spec(self) -> EnvSpec:
        dim, cond = self.problem.sizes
        return EnvSpec(cond, dim, self.num_envs, 1, jittable=True)

    def conditions(self, key: PRNGKey, n: int) -> Float[Array, "n c"]:
        """Returns n random conditions."""
        return jax.vmap(self.problem.condition)(jr.split(key, n))

    def each(self, x: Float[Array, " d"], cond: Float[Array, " c"]) -> Float[Array, " m"]:
        """Returns the rewards of one sample."""
        return jnp.stack([reward(x, cond) for reward in self.rewards])

    def score(self, x: Float[Array, " d"], cond: Float[Array, " c"]) -> Float[Array, ""]:
        """Returns the weighted sum of the rewards of one sample."""
        return jnp.sum(self.each(x, cond) * jnp.asarray(self.weights))

    def reset(self, key: PRNGKey) -> tuple[Any, Float[Array, "N c"]]:
        """Returns (state, conditions)."""
        k_now, k_later = jr.split(key)
        cond = self.conditions(k_now, self.num_envs)
        return (k_later, jnp.copy(cond)), cond

    def step(self, state: Any, action: Float[Array, "N d"]) -> tuple[Any, Step]:
        """Rewards every sample, ends every episode and draws new conditions."""
        key, cond = state
        x = jnp.clip(action, -1.0, 1.0)
        k_now, k_later = jr.split(key)
        fresh = self.conditions(k_now, self.num_envs)
        true = jnp.ones(self.num_envs, dtype=bool)
        good = jax.vmap(self.problem.approved)(x, cond)
        step = Step(fresh, cond, jax.vmap(self.score)(x, cond), true, ~true, true, success=good)
        return (k_later, jnp.copy(fresh)), step
