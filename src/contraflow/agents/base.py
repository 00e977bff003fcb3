"""What every agent is: a frozen dataclass of hyperparameters with three pure methods.

The settings are static under `jit`; everything learned lives in the state, whose leaves are all arrays. No key is ever
stored: randomness is an argument.
"""

import copy
import dataclasses
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Array, Float

from contraflow.core.types import EnvSpec, Metrics, PRNGKey


@runtime_checkable
class Agent(Protocol):
    """An algorithm and its settings. `acting` names the fields of the state that `act` reads: a policy file."""

    acting: ClassVar[tuple[str, ...]]

    def init(self, key: PRNGKey, spec: EnvSpec) -> Any:
        """The first state: networks, targets, optimiser states, step."""
        ...

    def act(self, state: Any, obs: Float[Array, " o"], key: PRNGKey, explore: bool) -> Float[Array, " a"]:
        """One action in [-1, 1]^a for one observation; `explore` False is the evaluation rule."""
        ...

    def update(self, state: Any, batch: Any, key: PRNGKey, /) -> tuple[Any, Metrics]:
        """Learn from `Transition` [B] (off-policy) or `Chunks` [B] (imitation): one gradient step; or from a `Rollout`
        [T, N] (on-policy): all that it is good for. Metrics are scalars.

        An on-policy agent has a fourth method, `sample(state, obs, key)`: an action as `act` draws it to explore, and
        what `update` must know of it, which comes back in `Rollout.extras`.
        """
        ...


def acting_state(agent: Agent, state: Any) -> Any:
    """A copy of the state (a dataclass) with None for the fields that `agent.act` does not read.

    It is what a policy file holds, and what a program that only acts should get: every array passed to a compiled
    program costs time, and targets and optimiser states are most of them.
    """
    out = copy.copy(state)
    for field in dataclasses.fields(state):
        if field.name not in agent.acting:
            object.__setattr__(out, field.name, None)
    return out
