"""Bandits: one action, one reward, then the end. A known reward gives the optimal soft policy exp(r / lam)."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from contraflow.core.types import EnvSpec, PRNGKey, Step
from contraflow.envs import base

Reward = Callable[[Float[Array, " a"]], Float[Array, ""]]


@dataclass(frozen=True)
class Flat:
    """r(a) = level: every policy is optimal and the soft one is uniform on the cube."""

    level: float = 0.0

    def __call__(self, action: Float[Array, " a"]) -> Float[Array, ""]:
        return jnp.full((), self.level)


@dataclass(frozen=True)
class Linear:
    """r(a) = 2 lam sum(a): exp(r / lam) is a product of exp(2 a_i) on [-1, 1], each with mean coth(2) - 1/2."""

    lam: float = 1.0

    def __call__(self, action: Float[Array, " a"]) -> Float[Array, ""]:
        return 2 * self.lam * jnp.sum(action)


@dataclass(frozen=True)
class TwoPeak:
    """exp(r / lam) = N(a; c, width^2) + N(a; -c, width^2) up to a constant factor, c = (centre, ..., centre)."""

    lam: float = 1.0
    centre: float = 0.5
    width: float = 0.15

    def __call__(self, action: Float[Array, " a"]) -> Float[Array, ""]:
        squares = jnp.stack([jnp.sum((action - c) ** 2) for c in (self.centre, -self.centre)])
        return self.lam * jax.nn.logsumexp(-squares / (2 * self.width**2))


@dataclass(frozen=True)
class Bandit:
    """N one-step episodes: the observation is always 0, the reward is `reward(action)`, and every step terminates.

    `reward` maps one action [dim] in [-1, 1] to a number. It must be hashable: a frozen dataclass or a function.
    """

    reward: Reward = Flat()
    dim: int = 2
    num_envs: int = 1

    @property
    def spec(self) -> EnvSpec:
        return EnvSpec(1, self.dim, self.num_envs, 1, jittable=True)

    def reset(self, key: PRNGKey) -> tuple[None, Float[Array, "N 1"]]:
        """Returns (no state, zeros [N, 1]); the key is unused because every episode starts alike."""
        return None, jnp.zeros((self.num_envs, 1))

    def step(self, state: None, action: Float[Array, "N a"]) -> tuple[None, Step]:
        """Rewards every action [N, dim] and ends every episode."""
        obs = jnp.zeros((self.num_envs, 1))
        true = jnp.ones(self.num_envs, dtype=bool)
        return state, Step(obs, obs, jax.vmap(self.reward)(action), true, ~true, true)


BANDITS: dict[str, type[Flat | Linear | TwoPeak]] = {"constant": Flat, "linear": Linear, "two-peak": TwoPeak}


def check(name: str) -> tuple[str, int]:
    """Returns (reward, dimensions) for `linear/8`, or for `linear` with 2. Raises UserError for any other name."""
    reward, slash, dim = name.partition("/")
    if reward not in BANDITS or (slash and not (dim.isdecimal() and int(dim) > 0)):
        raise base.unknown_id(f"bandit:{name}", tuple(BANDITS))
    return reward, int(dim or 2)


def _make(name: str, num_envs: int, seed: int, render: bool) -> Bandit:
    reward, dim = check(name)
    return Bandit(BANDITS[reward](), dim, num_envs)


KIND = base.Kind(_make, check, lambda: list(BANDITS), jittable=True)
