"""Starting from a policy that exists: its network, the normalisation that belongs to it, and its chunks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import equinox as eqx

from contraflow.core.types import EnvSpec, UserError
from contraflow.train.artifact import load_policy, policy_folder
from contraflow.train.loop import Carry


def source(run: Any) -> Path | None:
    """Where the artefact lies that `run` starts from, if it does."""
    name = getattr(run, "pretrained", None)
    return policy_folder(Path(name)) if name else None


def settle(run: Any, trust: bool = False) -> Any:
    """The run with the flow policy and the chunks of its artefact in place of its own; itself without one.

    Raises UserError for an artefact that is no flow policy, and for an agent that starts from none.
    """
    folder = source(run)
    if folder is None:
        return run
    agent, spec, _, _ = load_policy(folder, trust)
    if not hasattr(run.agent, "adopt"):
        raise UserError(f"{type(run.agent).__name__} starts from scratch: leave out --pretrained")
    if not hasattr(agent, "network"):
        raise UserError(
            f"{run.pretrained} is a policy of {type(agent).__name__}, which has no single flow to start from: "
            "train one with `contraflow train bc`"
        )
    try:
        return replace(run, agent=replace(run.agent, policy=agent.policy), horizon=spec.horizon, execute=spec.execute)
    except ValueError as error:
        raise UserError(f"{run.pretrained} does not suit {type(run.agent).__name__}: {error}") from None


def check_fit(run: Any, spec: EnvSpec) -> None:
    """Raise UserError if the artefact was made for other sizes than `spec`, before anything is trained."""
    folder = source(run)
    if folder is None:
        return
    _, other, _, _ = load_policy(folder)
    have, want = (other.obs_dim, other.action_dim), (spec.obs_dim, spec.action_dim)
    if have != want:
        raise UserError(
            f"{run.pretrained} takes {have[0]} observations and gives {have[1] // spec.horizon} actions, {run.env} has "
            f"{want[0]} and {want[1] // spec.horizon}: choose the environment that it was trained for"
        )


def adopt(run: Any, carry: Carry) -> Carry:
    """The first carry with the trained network in it."""
    folder = source(run)
    if folder is None:
        return carry
    agent, _, _, state = load_policy(folder)
    new = run.agent.adopt(carry.learner.agent, agent.network(state), state.stats)
    return eqx.tree_at(lambda c: c.learner.agent, carry, new)
