"""What every agent is: a frozen dataclass of settings with three pure methods, and what it may tell of itself.

The settings are static under `jit`; everything learned lives in the state, whose leaves are all arrays. No key is ever
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

Needs = Literal["replay", "rollout", "dataset"]
"""What an agent learns from: `Batch` of replayed steps, a `Rollout`, or `Batch` of recorded ones."""


@runtime_checkable
class Agent(Protocol):
    """An algorithm and its settings.

    `gamma` (a field or property) discounts returns; `needs` says what an agent of one's own learns from, if that is not
    replay. Policies of on-policy agents have `sample(obs, key)`: an action while exploring, and what `update` must know
    of it, which comes back in `Rollout.extras`. Some agents can do more, and are asked for it by name:

    - `starting_from(policy)`: the settings with the flow of a pretrained policy; `adopt(state, policy)`: the state with
      its networks and normalisation.
    - `diagnostics(state, obs, key)`: numbers that show how well it learns, beside those that hold for every policy.
    """

    def init(self, key: PRNGKey, spec: EnvSpec) -> Any:
        """The first state: networks, targets, optimiser states, step."""
        ...

    def policy(self, state: Any) -> Policy:
        """How it acts, put together from the state without any computation."""
        ...

    def update(self, state: Any, batch: Any, key: PRNGKey, /) -> tuple[Any, Metrics]:
        """One gradient step on a `Batch`, or all that a `Rollout` is good for; metrics are scalars."""
        ...


@dataclass(frozen=True)
class Preset:
    """A method by its published name: `contraflow train NAME`."""

    name: str
    agent: Any
    title: str
    paper: str
    """arXiv number, or () for our own."""
    summary: str
    needs: Needs = "replay"
    run: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Run` and its source that differ from their defaults."""


def flow_of(policy: Policy, agent: Any) -> tuple[Flow, RunningMoments | None]:
    """The flow of a pretrained policy, and its normalisation of observations.

    Raises UserError if it has none, or one whose network takes other inputs than those of the agent.
    """
    flow, name = inner(policy, "flow"), type(agent).__name__
    if flow is None:
        raise UserError(
            f"{name} starts from a flow, and {type(policy).__name__} is none: train one with `contraflow train bc`"
        )
    if takes_temperature(policy) and not hasattr(agent, "condition_on_temperature"):
        raise UserError(f"this flow is conditioned on the temperature, {name} has none to tell it: train another one")
    if (objective := getattr(agent, "objective", None)) and objective.averaged and not flow.spec.averaged:
        raise UserError(
            f"{type(objective).__name__} needs a flow of average velocities: train it with that objective too, or give "
            f"{name} the objective Matching"
        )
    return flow, inner(policy, "stats")


def takes_temperature(policy: Policy) -> bool:
    """Whether the network of a flow is told the temperature."""
    return getattr(innermost(policy), "temperature", None) is not None


def adopted(spec: FlowSpec, policy: Policy, agent: Any) -> tuple[Flow, RunningMoments | None]:
    """Copies of flow and normalisation of a pretrained policy, the flow with the settings `spec`."""
    flow, stats = flow_of(policy, agent)
    return jax.tree.map(jnp.copy, (replace(flow, spec=spec), stats))
