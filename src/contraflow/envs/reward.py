"""Rewards for learning in place of the environment's. Reported returns stay those of the environment."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from contraflow.core.settings import import_path
from contraflow.core.trust import Trust
from contraflow.core.types import EnvSpec, PRNGKey, Step, UserError
from contraflow.envs.base import Env, close, notes

DENSE, SPARSE = "dense", "sparse"
Rule = Callable[[dict[str, Any]], Any]
"""Rewards [n] of n rows: arrays `obs`, `action` in [-1, 1], `next_obs`, `reward`, `terminated`, and `success` if it is
known."""


def rule(name: str, trust: Trust) -> Rule | None:
    """Returns the rule of `sparse` or `module:function`; None for `dense`, which keeps the rewards. Raises UserError
    for code that is not trusted or does not exist."""
    return None if name == DENSE else sparse if name == SPARSE else import_path(name, trust)


def check(name: str) -> None:
    """Raises ValueError if `name` is not the name of a rule."""
    if name not in (DENSE, SPARSE) and ":" not in name:
        raise ValueError(f"--reward is dense, sparse or module:function, got {name}")


def sparse(rows: dict[str, Any]) -> Any:
    """Returns 0 if the whole task is done, else -1."""
    if rows.get("success") is None:
        raise UserError("--reward sparse needs to know of success, as with tasks of OGBench: name one, or leave it out")
    return rows["success"] - np.float32(1.0)


def rewards(rule: Rule | None, rows: dict[str, Any], shift: float, name: str) -> Any:
    """Returns rewards, float32 [n]: by the rule, or unchanged, plus `shift`. Raises UserError for any other value."""
    if rule is None:
        return rows["reward"] + np.float32(shift)
    try:
        new = rule(rows)
        new = new.astype(np.float32)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--reward {name} failed ({type(error).__name__}: {error}): let it return one array") from None
    if new.shape != rows["reward"].shape:
        raise UserError(
            f"--reward {name} returned shape {new.shape} for {len(rows['reward'])} rows: one number for each"
        )
    if isinstance(new, np.ndarray) and not np.isfinite(new).all():
        raise UserError(f"--reward {name} returned what is not finite for row {int((~np.isfinite(new)).argmax())}")
    return new + np.float32(shift)


@dataclass(frozen=True)
class Rewarded:
    """`env` with the rewards of a rule, plus `shift`. `Step.undiscounted` keeps those of `env` for the returns."""

    env: Env
    rule: Rule | None = None
    shift: float = 0.0
    name: str = DENSE

    @property
    def spec(self) -> EnvSpec:
        return self.env.spec

    @property
    def holds(self) -> bool:
        """Whether `step` can skip copies of the environment."""
        return getattr(self.env, "holds", False)

    def reset(self, key: PRNGKey) -> tuple[Any, Any]:
        """Resets the environment. The state also holds the observation."""
        state, obs = self.env.reset(key)
        return (state, obs), obs

    def step(self, state: Any, action: Any, *active: Any) -> tuple[Any, Step]:
        """Advances the environment and replaces its rewards."""
        inner, obs = state
        inner, step = self.env.step(inner, action, *active)
        xp: Any = jnp if self.spec.jittable else np
        rows = {"obs": obs, "action": xp.clip(action, -1.0, 1.0), "next_obs": step.next_obs, "reward": step.reward}
        rows |= {"terminated": step.terminated, "success": step.success}
        new = rewards(self.rule, rows, self.shift, self.name)
        return (inner, step.obs), replace(step, reward=new, undiscounted=step.reward)

    def close(self) -> None:
        close(self.env)

    @property
    def notes(self) -> tuple[str, ...]:
        return notes(self.env)
