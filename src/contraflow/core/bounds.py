"""Checks that data, policies and environments agree, above all on the meaning of an action in [-1, 1]."""

import numpy as np
from jaxtyping import Float64

from contraflow.core.observation import shown
from contraflow.core.types import EnvSpec, UserError

ROUNDING = 1e-4  # tolerance for actions and bounds, as a fraction of half the range
SHOWN = 8  # number of columns whose ranges are printed
Bounds = tuple[Float64[np.ndarray, " a"], Float64[np.ndarray, " a"]]


def action_range(spec: EnvSpec) -> Bounds:
    """Returns the lower and upper bounds, each [a], of one action of the underlying environment."""
    ones = np.ones(spec.action_dim // spec.horizon)
    low, high = spec.low or -ones, spec.high or ones
    return np.asarray(low, np.float64), np.asarray(high, np.float64)


def same_range(one: Bounds, other: Bounds) -> bool:
    """Returns whether the two ranges agree up to rounding."""
    slack = ROUNDING * (other[1] - other[0]) / 2
    return all(bool((abs(a - b) <= slack).all()) for a, b in zip(one, other, strict=True))


def check_fit(policy: EnvSpec, env: EnvSpec, name: str, where: str, like: str = "") -> None:
    """Raises UserError unless the policy called `name` fits the environment `where`.

    They must agree on observations, including the order of their parts, on sizes and on the range of actions. Chunk
    lengths may differ. `like` names an environment that suits the policy.
    """
    have, want = ((spec.observation, spec.action_dim // spec.horizon) for spec in (env, policy))
    remedy = f"choose an environment like {like}" if like else "choose the environment that it was trained for"
    if have != want:
        raise UserError(
            f"{where} has {shown(have[0])} observations and {have[1]} actions, {name} was trained for "
            f"{shown(want[0])} and {want[1]}: {remedy}"
        )
    if policy.obs_keys and env.obs_keys and policy.obs_keys != env.obs_keys:
        parts, own = (", ".join(spec.obs_keys[:SHOWN]) for spec in (env, policy))
        raise UserError(f"{where} observes {parts}, {name} was trained for {own}: {remedy}")
    here, there = action_range(policy), action_range(env)
    if not same_range(here, there):
        raise UserError(
            f"{name} was trained for actions in {range_text(*here)}, {where} takes {range_text(*there)}: choose an "
            "environment with the range that it was trained for"
        )


def range_text(low: np.ndarray, high: np.ndarray) -> str:
    """Returns [-1, 1], or one such pair per number if they differ; only the first few if there are many."""
    each = [f"[{a:.3g}, {b:.3g}]" for a, b in zip(low, high, strict=True)]
    if len(set(each)) == 1:
        return each[0]
    if len(each) <= SHOWN:
        return " ".join(each)
    return f"{' '.join(each[:SHOWN])} ..., all within [{low.min():.3g}, {high.max():.3g}]"
