"""Probe environments: each tests one thing that can go wrong, and the right answer has a closed form.

All are pure JAX, with one observation and one action dimension.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int

from contraflow.core.types import EnvSpec, PRNGKey, Step
from contraflow.envs.base import from_table


class ProbeState(eqx.Module):
    """State of a probe between steps; the key draws the first states of coming episodes."""

    obs: Float[Array, "N 1"]
    age: Int[Array, " N"]  # steps since the episode began
    key: PRNGKey


def _zero(_: Any) -> Float[Array, " 1"]:
    return jnp.zeros(1)


@dataclass(frozen=True)
class Probe:
    """N copies of a task, defined by how its episodes start, move and end and by the value of its states.

    `value(obs, gamma)` is the optimal value of a state. `best_action(obs)` is an optimal action, zero if every action
    is optimal. An episode ends after `length` steps: it terminates, or is truncated if `truncates`.
    """

    num_envs: int = 1
    _: KW_ONLY
    move: Callable[[Any, Any], tuple[Any, Any]]
    """(obs [1], action [1]) -> (next_obs [1], reward [])."""
    value: Callable[[Any, float], Any]
    start: Callable[[Any], Any] = _zero
    """key -> first obs [1]."""
    best_action: Callable[[Any], Any] = _zero
    length: int = 1
    truncates: bool = False

    @property
    def spec(self) -> EnvSpec:
        return EnvSpec(1, 1, self.num_envs, self.length, jittable=True)

    def reset(self, key: PRNGKey) -> tuple[ProbeState, Float[Array, "N o"]]:
        """Starts N episodes; all randomness comes from the key."""
        k_now, k_later = jr.split(key)
        obs = jax.vmap(self.start)(jr.split(k_now, self.num_envs))
        return ProbeState(obs, jnp.zeros(self.num_envs, jnp.int32), k_later), obs

    def step(self, state: ProbeState, action: Float[Array, "N a"]) -> tuple[ProbeState, Step]:
        """Advances all copies; an ended copy restarts within the step."""
        next_obs, reward = jax.vmap(self.move)(state.obs, action)
        age = state.age + 1
        done, never = age >= self.length, jnp.zeros(self.num_envs, bool)
        k_now, k_later = jr.split(state.key)
        fresh = jax.vmap(self.start)(jr.split(k_now, self.num_envs))
        obs = jnp.where(done[:, None], fresh, next_obs)
        ends = (never, done) if self.truncates else (done, never)
        return ProbeState(obs, jnp.where(done, 0, age), k_later), Step(obs, next_obs, reward, *ends, ~never)


PERIOD = 5


def _around(obs: Float[Array, " 1"], action: Any) -> tuple[Float[Array, " 1"], Float[Array, ""]]:
    """Returns the next phase 0, 1/PERIOD, ... of a cycle, and reward 1."""
    return jnp.mod(jnp.round(obs * PERIOD) + 1, PERIOD) / PERIOD, jnp.ones(())


def mistaken_value(obs: Float[Array, " 1"], gamma: float) -> Float[Array, ""]:
    """Returns the value learned in `Truncation` if truncation is treated as termination: the rewards until the cut."""
    left = PERIOD - jnp.round(obs[0] * PERIOD)
    return (1 - gamma**left) / (1 - gamma)


Constant = partial(Probe, move=lambda s, a: (s, jnp.ones(())), value=lambda s, gamma: jnp.ones(()))
"""Reward 1, then the end: does the loss of the value work at all?"""

Obs = partial(
    Probe,
    start=lambda key: jr.rademacher(key, (1,), dtype=jnp.float32),
    move=lambda s, a: (s, s[0]),
    value=lambda s, gamma: s[0],
)
"""The reward is the observation, -1 or 1: does the value see the observation?"""

TwoStep = partial(
    Probe, length=2, move=lambda s, a: (s + 1, s[0]), value=lambda s, gamma: jnp.where(s[0] < 0.5, gamma, 1.0)
)
"""Observations 0, 1, then the end (2); reward 1 for the second step only: is the future discounted, once?"""

Action = partial(
    Probe,
    move=lambda s, a: (s, 1 - (a[0] - 0.5) ** 2),
    value=lambda s, gamma: jnp.ones(()),
    best_action=lambda s: jnp.full(1, 0.5),
)
"""Reward 1 - (a - 1/2)^2: does the policy climb the value?"""

ObsAction = partial(
    Probe,
    start=lambda key: jr.uniform(key, (1,), minval=-0.8, maxval=0.8),
    move=lambda s, a: (s, s[0] - (a[0] - s[0]) ** 2),
    value=lambda s, gamma: s[0],
    best_action=lambda s: s,
)
"""Reward s - (a - s)^2 with s uniform on [-0.8, 0.8]: does the policy depend on the observation?"""

Truncation = partial(
    Probe, length=PERIOD, truncates=True, move=_around, value=lambda s, gamma: jnp.full((), 1 / (1 - gamma))
)
"""Reward 1 for ever, cut every PERIOD steps: is a time limit mistaken for an end?

The observation is the phase of a cycle, so the successor of the last step is the first state again and the value
1 / (1 - gamma) holds everywhere. An agent that takes the cut for an end learns `mistaken_value` instead.
"""

PROBES = {
    "constant": Constant,
    "obs": Obs,
    "two-step": TwoStep,
    "action": Action,
    "obs-action": ObsAction,
    "truncation": Truncation,
}
KIND = from_table("probe", PROBES)
