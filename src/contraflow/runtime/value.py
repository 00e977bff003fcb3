"""The value that guides or chooses a policy's actions, as it is named on the command line."""

from pathlib import Path
from typing import Any

import jax

from contraflow.core.bounds import check_fit
from contraflow.core.settings import import_path
from contraflow.core.trust import Trust
from contraflow.core.types import UserError
from contraflow.policy.base import inner
from contraflow.policy.value import Judge, Plain, own_critic
from contraflow.runtime.policy import Policy, load


def load_value(name: str, policy: Policy, trust: Trust = "") -> Any:
    """Returns the value called `name` for a policy: the critic in a folder, a `module:function`, or its own for "".

    Raises UserError for a folder without a critic, for a critic of other observations, actions or chunks, and for a
    function that cannot be imported or does not return one number.
    """
    if not name:
        return own_critic(policy.network)
    spec = policy.spec
    if ":" in name and not Path(name).is_dir():
        value = Plain(import_path(name, trust), spec.horizon)
        if not spec.obs_parts:
            _check(value, name, spec.obs_dim, spec.action_dim)
        return value
    other = load(name, trust=trust)
    if inner(other.network, "critic") is None:
        raise UserError(
            f"the policy in {name} has no critic: train ifql, idql or qc on the same data and give its folder"
        )
    check_fit(other.spec, spec, f"the critic in {name}", "the policy", other.env)
    if other.spec.horizon != spec.horizon:
        raise UserError(
            f"the critic in {name} values chunks of {other.spec.horizon} actions, and the policy makes {spec.horizon}: "
            f"train the critic with --horizon {spec.horizon}"
        )
    return Judge(inner(other.network, "critic"), inner(other.network, "stats"))


def _check(value: Plain, name: str, obs: int, action: int) -> None:
    try:
        found = jax.eval_shape(value, *(jax.ShapeDtypeStruct((n,), "float32") for n in (action, obs)))
        shape = found.shape
    except Exception as error:
        raise UserError(f"--value {name} failed ({type(error).__name__}: {error}): it takes (action, obs)") from None
    if shape != ():
        raise UserError(
            f"--value {name} returned shape {shape}: it must return one number, large where actions are good"
        )
