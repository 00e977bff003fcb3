"""Generation as one-step episodes: a condition is observed, a sample is the action, its reward ends the episode."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float

from contraflow.core.beside import Beside
from contraflow.core.types import EnvSpec, PRNGKey, Step, UserError

Reward = Callable[[Float[Array, " d"], Float[Array, " c"]], Float[Array, ""]]


@runtime_checkable
class Problem(Protocol):
    """What is generated, and what is asked of it. Samples lie in [-1, 1]^d. Hashable: a frozen dataclass.

    `rewards` names functions of one (sample [d], condition [c]); the first is the default. `approved` is a judge that
    training never sees; the share of approved samples is the success rate of an evaluation. `data` are samples under
    conditions, or None. A problem of images has `shape`, their rows and columns, and `images` where a sample is not the
    image itself. One whose judge is not written in JAX has `judge`, which takes arrays, in place of `approved`.
    """

    @property
    def sizes(self) -> tuple[int, int]:
        """Returns (numbers of a sample, numbers of a condition)."""
        ...

    @property
    def rewards(self) -> Mapping[str, Reward | Beside]: ...
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
    """N one-step episodes of a problem. An episode's reward is sum_j weights_j rewards_j(x, c).

    Rewards are functions in JAX of one (sample, condition), or functions of arrays beside this process.
    """

    problem: Problem
    rewards: tuple[Reward | Beside, ...]
    weights: tuple[float, ...] = (1.0,)
    num_envs: int = 1

    @property
    def spec(self) -> EnvSpec:
        dim, cond = self.problem.sizes
        return EnvSpec(cond, dim, self.num_envs, 1, jittable=not (self.outside or self.judge))

    @property
    def outside(self) -> bool:
        """Whether a reward is computed outside of JAX."""
        return any(isinstance(reward, Beside) for reward in self.rewards)

    @property
    def judge(self) -> Beside | None:
        """A judge outside of JAX: a function of arrays."""
        return getattr(self.problem, "judge", None)

    def conditions(self, key: PRNGKey, n: int) -> Float[Array, "n c"]:
        """Returns n random conditions."""
        return jax.vmap(self.problem.condition)(jr.split(key, n))

    def each(self, x: Float[Array, " d"], cond: Float[Array, " c"]) -> Float[Array, " m"]:
        """Returns the rewards of one sample."""
        return jnp.stack([reward(x, cond) for reward in self.rewards])  # pyright: ignore[reportArgumentType]

    def each_of(self, x: Any, cond: Any) -> np.ndarray:
        """Returns the rewards [n, m] of samples [n, d] under conditions [n, c], from inside and outside of JAX.

        Raises UserError for what is not a finite number for each.
        """
        x, cond = np.asarray(x), np.asarray(cond)
        calls = [reward.submit(x, cond) if isinstance(reward, Beside) else None for reward in self.rewards]
        columns = []
        for reward, call in zip(self.rewards, calls, strict=True):
            if isinstance(reward, Beside):
                column = reward.result(call)  # pyright: ignore[reportArgumentType]
                if column.shape != x.shape[:1]:
                    raise UserError(f"{reward.name} returned {column.shape} for {len(x)} samples: one number for each")
                if not np.isfinite(column).all():
                    raise UserError(f"{reward.name} returned a number that is not finite")
            else:
                column = _each(reward, jnp.asarray(x), jnp.asarray(cond))
            columns.append(np.asarray(column, np.float32))
        return np.stack(columns, -1)

    def good(self, x: Any, cond: Any) -> Any:
        """Returns what the judge says [n] of samples under conditions."""
        if self.judge is None:
            return _each(self.problem.approved, x, cond)
        return self.judge(np.asarray(x), np.asarray(cond))

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
        total = self.each_of(x, cond) @ np.asarray(self.weights) if self.outside else jax.vmap(self.score)(x, cond)
        step = Step(fresh, cond, total, true, ~true, true, success=self.good(x, cond))
        return (k_later, jnp.copy(fresh)), step

    def close(self) -> None:
        """Ends the processes of rewards and judge."""
        for part in (*self.rewards, self.judge):
            if isinstance(part, Beside):
                part.close()

    @property
    def notes(self) -> tuple[str, ...]:
        """Says which rewards run outside of JAX, and why."""
        return tuple(f"{r.name} runs in a process of its own; {r.why}" for r in self.rewards if isinstance(r, Beside))


@partial(jax.jit, static_argnames=("function",))
def _each(function: Any, x: Float[Array, "n d"], cond: Float[Array, "n c"]) -> Array:
    return jax.vmap(function)(x, cond)
