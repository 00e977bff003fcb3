"""Starting a run from a pretrained policy: its flow, its normalisation and its chunks."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from contraflow.core import bounds
from contraflow.core.trust import Trust
from contraflow.core.types import EnvSpec, UserError
from contraflow.policy.artifact import load_policy, policy_folder
from contraflow.policy.base import Policy


def load(run: Any, trust: Trust) -> tuple[Policy, EnvSpec] | None:
    """Returns the policy that `run` starts from and its sizes; None if it starts from scratch."""
    if not run.pretrained:
        return None
    policy, spec, _ = load_policy(policy_folder(Path(run.pretrained)), trust)
    return policy, spec


def settle(run: Any, trust: Trust) -> Any:
    """Returns the run with the flow and the chunks of its pretrained policy, or the run itself without one.

    Raises UserError for a policy without a flow, and for an agent that cannot start from one.
    """
    found = load(run, trust)
    if found is None:
        return run
    policy, spec = found
    if not hasattr(run.agent, "adopt"):
        raise UserError(f"{type(run.agent).__name__} starts from scratch: leave out --pretrained")
    chunks = {"horizon": spec.horizon, "execute": spec.execute}
    own = {field.name for field in fields(run.source)}
    try:
        source = replace(run.source, **{name: value for name, value in chunks.items() if name in own})
        return replace(run, agent=run.agent.starting_from(policy), source=source)
    except ValueError as error:
        raise UserError(f"{run.pretrained} does not suit {type(run.agent).__name__}: {error}") from None


def check_fit(run: Any, spec: EnvSpec, trust: Trust) -> None:
    """Raises UserError if the policy was trained for other sizes, or another range of actions, than `spec`."""
    found = load(run, trust)
    if found is None:
        return
    bounds.check_fit(found[1], spec, run.pretrained, run.env or run.source.data)
