"""What every environment adapter promises, and the few lines that the host adapters share."""

import difflib
import os
import sys
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from contraflow.core.types import EnvSpec, PRNGKey, Step, UserError


@runtime_checkable
class Env(Protocol):
    """N parallel environments.

    - Actions arrive in [-1, 1]^a; the adapter rescales them to the environment's own range.
    - Observations are flat float32.
    - `Step.next_obs` is the true successor, also at the end of an episode; `Step.obs` is what to act on next.
    - `terminated` and `truncated` are kept apart; an ended environment is reset by the adapter itself.
    - `jittable` environments are pure: `state` carries everything. Host environments keep the simulator on the
      adapter, and `state` is whatever they need between calls.
    - `reset` with the same key starts the same episodes.
    """

    @property
    def spec(self) -> EnvSpec: ...
    def reset(self, key: PRNGKey) -> tuple[Any, Any]:
        """Start N episodes; returns (state, obs [N, o])."""
        ...

    def step(self, state: Any, action: Any) -> tuple[Any, Step]:
        """Advance all N environments by `action` [N, a] in [-1, 1]."""
        ...


def check_finite(name: str, obs: np.ndarray, reward: np.ndarray) -> None:
    """Raise UserError when a host environment returned NaN or infinity."""
    if not (np.isfinite(obs).all() and np.isfinite(reward).all()):
        culprit = "observation" if not np.isfinite(obs).all() else "reward"
        raise UserError(f"environment {name} returned a non-finite {culprit}; mend the environment or its reward")


def check_num_envs(name: str, num_envs: int) -> None:
    """Raise UserError when fewer than one environment is asked for."""
    if num_envs < 1:
        raise UserError(f"environment {name} needs num_envs >= 1, got {num_envs}; set num_envs to 1 or more")


def unknown_id(name: str) -> UserError:
    """The error for an id nobody knows, naming the closest ones that exist."""
    from contraflow.envs import available  # here, because that package imports this module

    prefix, _, tail = name.rpartition(":")
    known: dict[str, list[str]] = {}
    everything = available()
    for kind, ids in everything.items():
        for id in ids:
            known.setdefault(id.lower(), []).append(f"{kind}:{id}")
    close = difflib.get_close_matches(tail.lower(), known, n=3, cutoff=0.5)
    # The prefix that was asked for comes first: many tasks are known under several.
    names = sorted((full for id in close for full in known[id]), key=lambda full: not full.startswith(prefix + ":"))
    hint = f"did you mean {', '.join(names)}?" if names else "contraflow.envs.available() lists the known ones"
    if not names and prefix in ("jax", "probe", "bandit"):
        hint = f"there are {', '.join(everything[prefix])}"
    return UserError(f"unknown environment {name}; {hint}")


def flatten(obs: Any, n: int) -> np.ndarray:
    """A batch of n observations as one fresh float32 array [n, o].

    Dict entries follow each other in sorted key order, tuple entries in their own order, nested ones depth first.
    """
    parts = _leaves(obs, n)
    return np.concatenate(parts, axis=1, dtype=np.float32, casting="unsafe")


def _leaves(obs: Any, n: int) -> list[np.ndarray]:
    if isinstance(obs, dict):
        return [leaf for name in sorted(obs) for leaf in _leaves(obs[name], n)]
    if isinstance(obs, tuple):
        return [leaf for part in obs for leaf in _leaves(part, n)]
    return [np.asarray(obs).reshape(n, -1)]


def action_bounds(name: str, space: Any) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bounds of one environment's continuous action space, in its own shape and type.

    Raises UserError for any other space: discrete, integer, or without finite bounds.
    """
    from gymnasium.spaces import Box

    if not isinstance(space, Box) or not np.issubdtype(space.dtype, np.floating):
        raise UserError(f"environment {name} has the action space {space}; choose one with continuous (Box) actions")
    if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
        raise UserError(f"environment {name} has unbounded actions; give its Box action space finite bounds")
    return space.low, space.high


def rescale(action: Any, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Map actions [N, a] from [-1, 1] to [low, high], in the shape [N, *low.shape] and type of the bounds.

    What lies outside [-1, 1] is clipped.
    """
    unit = np.asarray(action, dtype=low.dtype).reshape(-1, *low.shape)
    # Clipped after scaling: rounding can leave the range by one unit in the last place, which some simulators refuse.
    return np.clip(low + (unit + 1) * ((high - low) / 2), low, high)


def with_bounds(spec: EnvSpec, low: np.ndarray, high: np.ndarray) -> EnvSpec:
    """The spec with the range of an action, which a policy is saved with."""
    return replace(spec, low=tuple(low.ravel().tolist()), high=tuple(high.ravel().tolist()))


def derive_seed(seed: int, key: PRNGKey) -> int:
    """A simulator seed in [0, 2^31) from the adapter's seed and a reset key, the same on every call.

    Hashed, because simulators seed copy i with seed + i: neighbouring seeds would share most of their episodes.
    """
    words = np.asarray(jax.random.key_data(key)).ravel().tolist()
    return int(np.random.SeedSequence([seed, *words]).generate_state(1)[0] >> 1)


def prefer_egl() -> None:
    """Ask MuJoCo for EGL on a Linux machine without a display; must come before the first import of mujoco."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")
