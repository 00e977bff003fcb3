"""A bandit in JAX whose best action stands in its image only."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr

from contraflow.core.observation import Part
from contraflow.core.types import EnvSpec, Step

SIDE = 16
PARTS = (Part("image", (SIDE, SIDE, 1), "uint8"), Part("state", (2,)))


@dataclass(frozen=True)
class Spot:
    """One bright pixel, in column c: r(a) = 1 - (a - target)^2, target = 2 c / 15 - 1. `state` [2] is noise.

    Without the image the best action is 0, worth 1 - E[target^2] = 1 - 17 / 45 = .622; with it 1.
    """

    num_envs: int = 1
    seed: int = 0
    blind: bool = False
    """The image is black."""

    @property
    def spec(self) -> EnvSpec:
        return EnvSpec(SIDE**2 + 2, 1, self.num_envs, 1, jittable=True, obs_parts=PARTS)

    def reset(self, key):
        k_column, k_row, k_state, later = jr.split(key, 4)
        n = self.num_envs
        column, row = (jr.randint(k, (n,), 0, SIDE) for k in (k_column, k_row))
        image = jnp.zeros((n, SIDE, SIDE, 1), jnp.uint8)
        if not self.blind:
            image = image.at[jnp.arange(n), row, column, 0].set(255)
        return (column, later), {"image": image, "state": jr.normal(k_state, (n, 2))}

    def step(self, state, action):
        column, key = state
        reward = 1 - (action[:, 0] - (2 * column / (SIDE - 1) - 1)) ** 2
        state, obs = self.reset(key)
        yes = jnp.ones(self.num_envs, bool)
        return state, Step(obs, obs, reward, yes, ~yes, yes)


@dataclass(frozen=True)
class Dark(Spot):
    blind: bool = True


@dataclass(frozen=True)
class Wrong(Spot):
    """Against its spec."""

    def reset(self, key):
        state, obs = super().reset(key)
        return state, obs | {"image": obs["image"][:, :8]}


def batch_of(rng: Any, n: int) -> dict[str, jax.Array]:
    """n observations."""
    return {
        "image": jnp.asarray(rng.integers(0, 256, (n, SIDE, SIDE, 1)), jnp.uint8),
        "state": jnp.asarray(rng.standard_normal((n, 2)), jnp.float32),
    }
