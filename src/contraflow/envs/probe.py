"""Probe environments: one thing can go wrong in each, and the right answer is known in closed form.

All are pure JAX, with one observation and one action dimension. `value(obs, gamma)` is the optimal value of a state and
`best_action(obs)` an optimal action (zero where every action is optimal).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int

from contraflow.core.types import EnvSpec, PRNGKey, Step


class ProbeState(eqx.Module):
    """What a probe carries between steps; the key draws the states in which coming episodes start."""

    obs: Float[Array, "N 1"]
    age: Int[Array, " N"]  # steps since the episode began
    key: PRNGKey


@dataclass(frozen=True)
class Probe(ABC):
    """The loop that all probes share; a probe states how an episode starts, moves, ends and what it is worth."""

    num_envs: int = 1

    @property
    def spec(self) -> EnvSpec:
        return EnvSpec(1, 1, self.num_envs, self.length, jittable=True)

    @property
    def length(self) -> int:
        """Steps per episode."""
        return 1

    def start(self, key: PRNGKey) -> Float[Array, " o"]:
        """First observation of an episode."""
        return jnp.zeros(1)

    @abstractmethod
    def move(self, obs: Float[Array, " o"], action: Float[Array, " a"]) -> tuple[Float[Array, " o"], Float[Array, ""]]:
        """(next_obs, reward) of one environment."""

    def ends(self, age: Int[Array, " N"]) -> tuple[Bool[Array, " N"], Bool[Array, " N"]]:
        """(terminated, truncated) after `age` steps."""
        return age >= self.length, jnp.zeros_like(age, dtype=bool)

    @abstractmethod
    def value(self, obs: Float[Array, " o"], gamma: float) -> Float[Array, ""]:
        """Optimal value of one state."""

    def best_action(self, obs: Float[Array, " o"]) -> Float[Array, " a"]:
        """An optimal action in one state."""
        return jnp.zeros(1)

    def reset(self, key: PRNGKey) -> tuple[ProbeState, Float[Array, "N o"]]:
        """Start N episodes; the key is all the randomness there is."""
        k_now, k_later = jr.split(key)
        obs = jax.vmap(self.start)(jr.split(k_now, self.num_envs))
        return ProbeState(obs, jnp.zeros(self.num_envs, jnp.int32), k_later), obs

    def step(self, state: ProbeState, action: Float[Array, "N a"]) -> tuple[ProbeState, Step]:
        """Advance all copies; an ended one starts anew within the step."""
        next_obs, reward = jax.vmap(self.move)(state.obs, action)
        age = state.age + 1
        terminated, truncated = self.ends(age)
        done = terminated | truncated
        k_now, k_later = jr.split(state.key)
        fresh = jax.vmap(self.start)(jr.split(k_now, self.num_envs))
        obs = jnp.where(done[:, None], fresh, next_obs)
        valid = jnp.ones(self.num_envs, dtype=bool)
        step = Step(obs, next_obs, reward, terminated, truncated, valid)
        return ProbeState(obs, jnp.where(done, 0, age), k_later), step


@dataclass(frozen=True)
class Constant(Probe):
    """Reward 1 and the end: is the loss of the value right at all?"""

    def move(self, obs, action):
        return obs, jnp.ones(())

    def value(self, obs, gamma):
        return jnp.ones(())


@dataclass(frozen=True)
class Obs(Probe):
    """The reward is the observation, -1 or 1: does the value see the observation?"""

    def start(self, key):
        return jr.rademacher(key, (1,), dtype=jnp.float32)

    def move(self, obs, action):
        return obs, obs[0]

    def value(self, obs, gamma):
        return obs[0]


@dataclass(frozen=True)
class TwoStep(Probe):
    """Observations 0, 1, then the end (2); reward 1 for the second step only: is the future discounted, once?"""

    @property
    def length(self):
        return 2

    def move(self, obs, action):
        return obs + 1, obs[0]

    def value(self, obs, gamma):
        return jnp.where(obs[0] < 0.5, gamma, 1.0)


@dataclass(frozen=True)
class Action(Probe):
    """Reward 1 - (a - 1/2)^2: does the policy climb the value?"""

    def move(self, obs, action):
        return obs, 1 - (action[0] - 0.5) ** 2

    def value(self, obs, gamma):
        return jnp.ones(())

    def best_action(self, obs):
        return jnp.full(1, 0.5)


@dataclass(frozen=True)
class ObsAction(Probe):
    """Reward s - (a - s)^2 with s uniform on [-0.8, 0.8]: does the policy depend on the observation?"""

    def start(self, key):
        return jr.uniform(key, (1,), minval=-0.8, maxval=0.8)

    def move(self, obs, action):
        return obs, obs[0] - (action[0] - obs[0]) ** 2

    def value(self, obs, gamma):
        return obs[0]

    def best_action(self, obs):
        return obs


@dataclass(frozen=True)
class Truncation(Probe):
    """Reward 1 for ever, cut every `period` steps: is a time limit taken for an end?

    The observation is the phase 0, 1/period, ... of a cycle, so the successor of the last step is the first state again
    and the value 1 / (1 - gamma) holds everywhere. Who takes the cut for an end finds `mistaken_value` instead.
    """

    period: int = 5

    @property
    def length(self):
        return self.period

    def move(self, obs, action):
        return jnp.mod(jnp.round(obs * self.period) + 1, self.period) / self.period, jnp.ones(())

    def ends(self, age):
        return jnp.zeros_like(age, dtype=bool), age >= self.period

    def value(self, obs, gamma):
        return jnp.full((), 1 / (1 - gamma))

    def mistaken_value(self, obs: Float[Array, " o"], gamma: float) -> Float[Array, ""]:
        """What one learns by treating truncation as termination: the rewards left before the cut."""
        left = self.period - jnp.round(obs[0] * self.period)
        return (1 - gamma**left) / (1 - gamma)


PROBES = {
    "constant": Constant,
    "obs": Obs,
    "two-step": TwoStep,
    "action": Action,
    "obs-action": ObsAction,
    "truncation": Truncation,
}
