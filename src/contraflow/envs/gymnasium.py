"""Gymnasium: any id it can make (dm_control through Shimmy included) and any vector environment of the user's."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from contraflow.core.types import EnvSpec, PRNGKey, Step, UserError
from contraflow.envs import base


class Gymnasium:
    """N copies of a Gymnasium environment.

    - `env` is an id, a VectorEnv, or a callable without arguments that builds one environment or a VectorEnv.
    - Dict observations are flattened in sorted key order, tuples in their own.
    - Copies made here never waste a step. A VectorEnv in NEXT_STEP mode does: those rows have `valid` False.
    - `state` is which copies a NEXT_STEP environment will reset at the coming step, [N] bool.

    Raises UserError when a package is missing, the id is unknown, actions are not continuous and bounded,
    observations are not numeric arrays, or a VectorEnv does not say how it resets ended copies.
    """

    def __init__(self, env: str | Callable[[], Any] | Any, num_envs: int = 1, seed: int = 0, *, render: bool = False):
        """`num_envs` must agree with a ready VectorEnv; `render` concerns ids (build your own with render_mode)."""
        try:
            from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
        except ImportError as error:
            raise UserError(f'environment {env} needs Gymnasium: pip install "contraflow[mujoco]"') from error
        self.name = env if isinstance(env, str) else getattr(env, "__name__", type(env).__name__)
        self._seed = seed
        base.check_num_envs(self.name, num_envs)
        if isinstance(env, str) and render:
            base.prefer_egl()
        if not isinstance(env, VectorEnv):
            build = partial(_make, env, render) if isinstance(env, str) else env
            env = build()
            if not isinstance(env, VectorEnv):
                # copy=False: `flatten` copies anyway. DISABLED with a masked reset: no dummy steps, plain arrays.
                copies = [lambda first=env: first, *[build] * (num_envs - 1)]
                env = SyncVectorEnv(copies, copy=False, autoreset_mode=AutoresetMode.DISABLED)
        if env.num_envs != num_envs:
            raise UserError(f"environment {self.name} holds {env.num_envs} copies, not {num_envs}; change num_envs")

        mode = env.metadata.get("autoreset_mode")
        if not isinstance(mode, AutoresetMode):
            raise UserError(f"environment {self.name} does not state its reset mode; set metadata['autoreset_mode']")
        self._env, self._mode, self._modes = env, mode, AutoresetMode
        self.holds = mode is AutoresetMode.DISABLED and isinstance(env, SyncVectorEnv)
        _check_observations(self.name, env.single_observation_space)
        self._low, self._high = base.action_bounds(self.name, env.single_action_space)
        obs_dim = base.flatten(env.reset(seed=0)[0], num_envs).shape[1]
        self._spec = base.with_bounds(
            EnvSpec(obs_dim, self._low.size, num_envs, _episode_length(env), jittable=False), self._low, self._high
        )

    @property
    def spec(self) -> EnvSpec:
        return self._spec

    def reset(self, key: PRNGKey) -> tuple[np.ndarray, np.ndarray]:
        """Start N episodes that depend on the adapter's seed and `key` only; returns (state [N], obs [N, o])."""
        obs = base.flatten(self._env.reset(seed=base.derive_seed(self._seed, key))[0], self._spec.num_envs)
        base.check_finite(self.name, obs, np.zeros(1))
        return np.zeros(self._spec.num_envs, bool), obs

    def step(self, state: np.ndarray, action: Any, active: np.ndarray | None = None) -> tuple[np.ndarray, Step]:
        """Advance all copies by `action` [N, a] in [-1, 1]; ended copies are reset here or by their own rule.

        Copies not `active` [N] stand still, where `holds` is True; their rows are zeros with `valid` False.
        """
        n = self._spec.num_envs
        scaled = base.rescale(action, self._low, self._high)
        if active is not None:
            return state, self._step_some(scaled, active)
        raw, reward, terminated, truncated, info = self._env.step(scaled)
        obs, reward = base.flatten(raw, n), np.asarray(reward, np.float32)
        terminated, truncated = np.array(terminated, bool), np.array(truncated, bool)
        base.check_finite(self.name, obs, reward)
        done = terminated | truncated
        if self._mode is self._modes.NEXT_STEP:
            return done, Step(obs, obs, reward, terminated, truncated, ~state)
        next_obs = obs
        if done.any() and self._mode is self._modes.SAME_STEP:
            if "final_obs" not in info:
                raise UserError(f"environment {self.name} resets in the same step; let it give info['final_obs']")
            next_obs = obs.copy()
            for i in np.flatnonzero(done):
                next_obs[i] = base.flatten(info["final_obs"][i], 1)[0]
            base.check_finite(self.name, next_obs, reward)
        elif done.any():
            fresh = base.flatten(self._env.reset(options={"reset_mask": done})[0], n)
            obs = np.where(done[:, None], fresh, next_obs)
            base.check_finite(self.name, obs, reward)
        return state, Step(obs, next_obs, reward, terminated, truncated, np.ones(n, bool))

    def _step_some(self, scaled: np.ndarray, active: np.ndarray) -> Step:
        n = self._spec.num_envs
        next_obs, obs = np.zeros((n, self._spec.obs_dim), np.float32), np.zeros((n, self._spec.obs_dim), np.float32)
        reward, terminated, truncated = np.zeros(n, np.float32), np.zeros(n, bool), np.zeros(n, bool)
        copies: Any = getattr(self._env, "envs")  # noqa: B009 - only a SyncVectorEnv, which `holds`, has them
        for i in np.flatnonzero(active):
            copy = copies[i]
            raw, reward[i], terminated[i], truncated[i], _ = copy.step(scaled[i])
            next_obs[i] = base.flatten(raw, 1)[0]
            obs[i] = base.flatten(copy.reset()[0], 1)[0] if terminated[i] or truncated[i] else next_obs[i]
        base.check_finite(self.name, np.concatenate([next_obs, obs]), reward)
        return Step(obs, next_obs, reward, terminated, truncated, np.array(active))

    def frame(self) -> np.ndarray:
        """Picture of copy 0, uint8 [h, w, 3]; raises UserError unless built with render=True."""
        frames = self._env.render() if self._env.render_mode == "rgb_array" else None
        if frames is None:
            raise UserError(f"environment {self.name} was built without pictures; construct it with render=True")
        return np.asarray(frames[0])

    def close(self) -> None:
        """Close all copies."""
        self._env.close()


def register_shimmy() -> None:
    """Make Gymnasium know the `dm_control/` ids; raises ImportError where Shimmy or dm_control is missing."""
    import gymnasium

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dm_control looks for a display and says so when there is none
        import shimmy

        gymnasium.register_envs(shimmy)


def check_id(id: str) -> None:
    """Raise UserError when Gymnasium is missing or does not know the id."""
    try:
        import gymnasium
    except ImportError as error:
        raise UserError(f'environment {id} needs Gymnasium: pip install "contraflow[mujoco]"') from error
    with _explained(id):
        if id.startswith("dm_control/"):
            register_shimmy()
        gymnasium.spec(id)


def _make(id: str, render: bool) -> Any:
    import gymnasium

    with _explained(id):
        if id.startswith("dm_control/"):
            register_shimmy()
        return gymnasium.make(id, render_mode="rgb_array" if render else None)


@contextmanager
def _explained(id: str) -> Iterator[None]:
    """Turn what Gymnasium raises for an id into a UserError that names the remedy."""
    import gymnasium

    try:
        yield
    except (ModuleNotFoundError, gymnasium.error.DependencyNotInstalled) as error:
        extra = "dmc" if id.startswith("dm_control/") else "mujoco"
        raise UserError(f'environment {id} cannot be built ({error}): pip install "contraflow[{extra}]"') from error
    except gymnasium.error.UnregisteredEnv as error:
        raise base.unknown_id(f"gym:{id}") from error
    except (ImportError, gymnasium.error.Error) as error:
        raise UserError(f"environment {id} cannot be built ({error}); use another id or version") from error


def _check_observations(name: str, space: Any) -> None:
    """Raise UserError unless `space` is made of numeric arrays of a fixed shape."""
    from gymnasium.spaces import Box, Dict, MultiBinary, Tuple

    for part in space.values() if isinstance(space, Dict) else space if isinstance(space, Tuple) else ():
        _check_observations(name, part)
    if not isinstance(space, Box | MultiBinary | Dict | Tuple):
        raise UserError(f"environment {name} observes {space}; wrap it so that it returns arrays (Box observations)")


def _episode_length(env: Any) -> int | None:
    """The time limit in steps, None where there is none or where nothing tells."""
    first = env.envs[0] if getattr(env, "envs", None) else env
    limit = first.spec.max_episode_steps if first.spec is not None else None
    if limit is None:  # Shimmy registers dm_control tasks without the limit; only the task itself holds it.
        limit = getattr(getattr(first.unwrapped, "_env", None), "_step_limit", None)
    return int(limit) if limit is not None and np.isfinite(limit) else None
