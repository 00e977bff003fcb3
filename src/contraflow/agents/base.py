"""The interface of agents: a frozen dataclass of settings with three pure methods, and optional abilities.

The settings are static under `jit`. Everything learned lives in the state, whose leaves are all arrays. No key is ever
stored: randomness is an argument.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from contraflow.core.types import EnvSpec, Metrics, PRNGKey, UserError
from contraflow.flow.model import Flow, FlowSpec
from contraflow.policy.base import Policy, inner, innermost
from contraflow.policy.normalise import RunningMoments

Needs = Literal["replay", "rollout", "dataset", "conditions"]
"""The data an agent learns from: a `Batch` of replayed steps, a `Rollout`, a `Batch` of recorded steps, or rewarded
samples of its own under conditions."""


@runtime_checkable
class Agent(Protocol):
    """An algorithm and its settings.

    `gamma` (a field or property) discounts returns. A user-defined agent sets `needs` to the data that it learns from,
    unless that is replay. The policy of an on-policy agent has `sample(obs, key)`, which returns an exploring action
    and the data that `update` needs about it, passed back in `Rollout.extras`. Callers look up two optional abilities
    by name:

    - `starting_from(policy)` returns the settings with the flow of a pretrained policy, and `adopt(state, policy)` the
      state with its networks and normalisation.
    - `diagnostics(state, obs, key)` returns numbers on how well the agent learns, in addition to those of any policy.
    """

    def init(self, key: PRNGKey, spec: EnvSpec) -> Any:
        """Returns the first state: networks, targets, optimiser states, step."""
        ...

    def policy(self, state: Any) -> Policy:
        """Returns the policy, assembled from the state without any computation."""
        ...

    def update(self, state: Any, batch: Any, key: PRNGKey, /) -> tuple[Any, Metrics]:
        """Makes one gradient step on a `Batch`, or all passes over a `Rollout`; metrics are scalars."""
        ...


@dataclass(frozen=True)
class Preset:
    """A method by its published name: `contraflow train NAME`."""

    name: str
    agent: Any
    title: str
    paper: str
    """arXiv number; "" for a method without a paper."""
    summary: str
    needs: Needs = "replay"
    run: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Run` and of its source whose values differ from the defaults."""


def flow_of(policy: Policy, agent: Any) -> tuple[Flow, RunningMoments | None]:
    """Returns the flow of a pretrained policy and its normalisation of observations (None if it has none).

    Raises UserError if the policy has no flow, or if its network takes other inputs than the agent provides.
    """
    flow, name = inner(policy, "flow"), type(agent).__name__
    if flow is None:
        raise UserError(
            f"{name} starts from a flow, but {type(policy).__name__} has none: train one with `contraflow train bc`"
        )
    if takes_temperature(policy) and not hasattr(agent, "condition_on_temperature"):
        raise UserError(f"this flow takes a temperature and {name} has none: use a flow trained without temperature")
    if (objective := getattr(agent, "objective", None)) and objective.averaged and not flow.spec.averaged:
        raise UserError(
            f"{type(objective).__name__} needs a flow of average velocities: train the flow with that objective, or "
            f"give {name} the objective Matching"
        )
    return flow, inner(policy, "stats")


def takes_temperature(policy: Policy) -> bool:
    """Returns whether the network of a flow policy takes the temperature as an input."""
    return getattr(innermost(policy), "temperature", None) is not None


def adopted(spec: FlowSpec, policy: Policy, agent: Any) -> tuple[Flow, RunningMoments | None]:
    """Returns copies of a pretrained policy's flow, with the settings `spec`, and of its normalisation."""
    flow, stats = flow_of(policy, agent)
    return jax.tree.map(jnp.copy, (replace(flow, spec=spec), stats))
