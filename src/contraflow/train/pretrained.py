"""Starting from a policy that exists: its network, the normalisation that belongs to it, and its chunks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import equinox as eqx

from contraflow.core.types import EnvSpec, UserError
from contraflow.policy.artifact import load_policy, policy_folder
from contraflow.train.loop import Carry


def source(run: Any) -> Path | None:
    """Where the artefact lies that `run` starts from, if it does."""
    name = getattr(run, "pretrained", None)
    return policy_folder(Path(name)) if name else None


def settle(run: Any, trust: bool = False) -> Any:
    """The run with the flow and the chunks of its pretrained policy in place of its own; itself without one.

    Raises UserError for a policy that is no flow, and for an agent that starts from none.
    """
    folder = source(run)
    if folder is None:
        return run
    policy, spec, _ = load_policy(folder, trust)
    if not hasattr(run.agent, "starting_from"):
        raise UserError(f"{type(run.agent).__name__} starts from scratch: leave out --pretrained")
    try:
        agent = run.agent.starting_from(policy)
    except ValueError as error:
        raise UserError(f"{run.pretrained} does not suit {type(run.agent).__name__}: {error}") from None
    return replace(run, agent=agent, horizon=spec.horizon, execute=spec.execute)


def check_fit(run: Any, spec: EnvSpec, trust: bool = False) -> None:
    """Raise UserError if the policy was made for other sizes than `spec`, before anything is trained."""
    folder = source(run)
    if folder is None:
        return
    _, other, _ = load_policy(folder, trust)
    have, want = (other.obs_dim, other.action_dim), (spec.obs_dim, spec.action_dim)
    if have != want:
        raise UserError(
            f"{run.pretrained} takes {have[0]} observations and gives {have[1] // spec.horizon} actions, {run.env} has "
            f"{want[0]} and {want[1] // spec.horizon}: choose the environment that it was trained for"
        )


def adopt(run: Any, carry: Carry, trust: bool = False) -> Carry:
    """The first carry with the trained networks in it."""
    folder = source(run)
    if folder is None:
        return carry
    new = run.agent.adopt(carry.learner.agent, load_policy(folder, trust)[0])
    return eqx.tree_at(lambda c: c.learner.agent, carry, new, is_leaf=lambda x: x is None)
