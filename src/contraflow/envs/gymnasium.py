"""Gymnasium: any id that it can make (dm_control through Shimmy included) and user-defined vector environments."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import jax
import numpy as np

from contraflow.core.observation import blank
from contraflow.core.types import EnvSpec, PRNGKey, Step, UserError
from contraflow.envs import base

SUCCESS = ("success", "is_success")  # entries of `info` that say whether the task is done


class Gymnasium:
    """N copies of a Gymnasium environment.

    - `env` is an id, a VectorEnv, or a callable without arguments that builds one environment or a VectorEnv.
    - Dict and tuple observations are flattened in the order of `spec.obs_keys`. With an image among them they become
      one flat dict of the parts; a single image stays an image.
    - Copies made here never waste a step. A VectorEnv in NEXT_STEP mode does: those rows have `valid` False.
    - `state` marks the copies that a NEXT_STEP environment will reset at the next step, [N] bool.

    Raises UserError when a package is missing, the id is unknown, actions are not continuous and bounded, observations
    are not numeric arrays, a VectorEnv does not state how it resets ended copies, or anything goes wrong in the
    environment's own code.
    """

    @base.reports
    def __init__(self, env: str | Callable[[], Any] | Any, num_envs: int = 1, seed: int = 0, *, render: bool = False):
        """`num_envs` must match a given VectorEnv; `render` applies to ids (build your own env with render_mode)."""
        self.name = env if isinstance(env, str) else getattr(env, "__name__", type(env).__name__)
        self._seed, self._closed = seed, False
        base.check_num_envs(self.name, num_envs)
        try:
            from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
        except ImportError as error:
            raise UserError(f'environment {env} needs Gymnasium: pip install "contraflow[mujoco]"') from error
        self._vector: Any = env
        self._mode, self._modes = None, AutoresetMode
        self._copies: list[Any] = []  # plain environments, stepped one after the other; empty for a vector one
        if not isinstance(env, VectorEnv):
            build = partial(_make, env, render) if isinstance(env, str) else env
            self._vector = first = build()
            if not isinstance(first, VectorEnv):
                self._copies = [first, *(build() for _ in range(num_envs - 1))]
                if not isinstance(env, str):
                    self.name = type(first.unwrapped).__name__
        if self._copies:
            one, observation, action = self._copies[0], self._copies[0].observation_space, self._copies[0].action_space
        else:
            one, many = self._vector, self._vector.num_envs
            if many != num_envs:
                raise UserError(f"environment {self.name} holds {many} copies, not {num_envs}; change num_envs")
            observation, action = one.single_observation_space, one.single_action_space
            self._mode = one.metadata.get("autoreset_mode")
            if not isinstance(self._mode, AutoresetMode):
                raise UserError(
                    f"environment {self.name} does not state its reset mode; set metadata['autoreset_mode']"
                )
            if type(one) is SyncVectorEnv and self._mode is AutoresetMode.DISABLED:
                self._copies = list(one.envs)
        self.holds = bool(self._copies)
        obs_dim, keys, parts = base.observation_layout(self.name, observation)
        self._low, self._high = base.action_bounds(self.name, action)
        sizes, layout = (obs_dim, self._low.size, num_envs), {"obs_keys": keys, "obs_parts": parts}
        spec = EnvSpec(*sizes, _episode_length(one), jittable=False, **layout)
        self._spec = base.with_bounds(spec, self._low, self._high)
        self._empty = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), blank(self._spec.observation, num_envs))
        self._start(0)

    @property
    def spec(self) -> EnvSpec:
        return self._spec

    @base.reports
    def reset(self, key: PRNGKey) -> tuple[np.ndarray, Any]:
        """Starts N episodes that depend only on the adapter's seed and `key`; returns (state [N], obs [N, ...])."""
        return np.zeros(self._spec.num_envs, bool), self._start(base.derive_seed(self._seed, key))

    @base.reports
    def step(self, state: np.ndarray, action: Any, active: np.ndarray | None = None) -> tuple[np.ndarray, Step]:
        """Advances all copies by `action` [N, a] in [-1, 1]; ended copies are reset here or by the VectorEnv.

        If `holds` is True, copies that are not `active` [N] are held; their rows are zeros with `valid` False.
        """
        scaled = base.rescale(action, self._low, self._high)
        if self._copies:
            step = self._step_copies(scaled, np.ones(len(scaled), bool) if active is None else np.array(active))
        else:
            state, step = self._step_vector(state, scaled)
        return state, base.checked(self.name, self._spec, step)

    def _start(self, seed: int) -> Any:
        if self._copies:
            raw = [copy.reset(seed=seed + i)[0] for i, copy in enumerate(self._copies)]
            rows = [self._row(one) for one in raw]
            parts = self._spec.obs_parts
            obs = jax.tree.map(lambda *x: np.stack(x), *rows) if parts else np.array(rows, np.float32)
        else:
            raw = self._vector.reset(seed=seed)[0]
            obs = base.arranged(raw, self._spec.num_envs, self._spec.obs_parts)
        base.check_obs(self.name, self._spec, obs)
        self.notes = base.notes_on(self.name, raw)
        return obs

    def _step_copies(self, scaled: np.ndarray, active: np.ndarray) -> Step:
        n = self._spec.num_envs
        next_obs, reward = _each(np.ndarray.copy, self._empty), np.zeros(n, np.float32)
        terminated, truncated, success = np.zeros(n, bool), np.zeros(n, bool), None
        for i in active.nonzero()[0]:
            raw, earned, terminated[i], truncated[i], info = self._copies[i].step(scaled[i])
            for key in SUCCESS:
                if key in info:
                    success = np.zeros(n, bool) if success is None else success
                    success[i] = bool(info[key])
            _put(next_obs, i, self._row(raw))
            if getattr(earned, "shape", ()):
                shape = np.shape(earned)
                raise UserError(f"environment {self.name} returned a reward of shape {shape}; let it return a number")
            reward[i] = earned
        obs, done = next_obs, np.flatnonzero(terminated | truncated)
        if done.size:
            obs = _each(np.ndarray.copy, next_obs)
            for i in done:
                _put(obs, i, self._row(self._copies[i].reset()[0]))
        return Step(obs, next_obs, reward, terminated, truncated, active, success=success)

    def _row(self, raw: Any) -> Any:
        """Returns one observation [o], or its parts. Raises UserError for another size than that of its space."""
        if self._spec.obs_parts:
            return _each(lambda x: x[0], base.arranged(raw, 1, self._spec.obs_parts))
        row = np.asarray(raw).reshape(-1) if self._spec.obs_keys == () else base.flatten(raw, 1)[0]
        if len(row) != self._spec.obs_dim:
            raise UserError(
                f"environment {self.name} returned an observation of {len(row)} numbers, its observation_space has "
                f"{self._spec.obs_dim}; fix one of the two"
            )
        return row

    def _step_vector(self, state: np.ndarray, scaled: np.ndarray) -> tuple[np.ndarray, Step]:
        n = self._spec.num_envs
        raw, reward, terminated, truncated, info = self._vector.step(scaled)
        obs, reward = base.arranged(raw, n, self._spec.obs_parts), np.asarray(reward, np.float32)
        terminated, truncated = np.array(terminated, bool), np.array(truncated, bool)
        done, success = terminated | truncated, None
        for said in (info, info.get("final_info", {})):  # of ended copies that were reset
            for key in SUCCESS:
                if key in said:
                    success = np.zeros(n, bool) if success is None else success
                    success |= np.array(said[key], bool)
        if self._mode is self._modes.NEXT_STEP:
            return done, Step(obs, obs, reward, terminated, truncated, ~state, success=success)
        next_obs = obs
        if done.any() and self._mode is self._modes.SAME_STEP:
            if "final_obs" not in info:
                raise UserError(f"environment {self.name} resets in the same step; let it give info['final_obs']")
            next_obs = _each(np.ndarray.copy, obs)
            for i in np.flatnonzero(done):
                _put(next_obs, i, self._row(info["final_obs"][i]))
        elif done.any():
            fresh = base.arranged(self._vector.reset(options={"reset_mask": done})[0], n, self._spec.obs_parts)
            mask = lambda x: done.reshape(-1, *[1] * (x.ndim - 1))
            obs = jax.tree.map(lambda new, old: np.where(mask(new), new, old), fresh, next_obs)
        return state, Step(obs, next_obs, reward, terminated, truncated, np.ones(n, bool), success=success)

    @base.reports
    def frame(self) -> np.ndarray:
        """Returns a picture of copy 0, uint8 [h, w, 3]. Raises UserError unless built with render=True."""
        frame = None
        if self._vector.render_mode == "rgb_array":
            with _explained(self.name, "frame"):
                frame = self._copies[0].render() if self._copies else (self._vector.render() or (None,))[0]
        if frame is None:
            raise UserError(f"environment {self.name} was built without pictures; construct it with render=True")
        return np.asarray(frame)

    @base.reports
    def close(self) -> None:
        """Closes all copies; may be called twice."""
        if not self._closed:
            self._closed = True
            ours = any(env is self._vector for env in self._copies)
            for env in self._copies if ours else [self._vector]:
                env.close()


def _each(function: Callable[[np.ndarray], np.ndarray], obs: Any) -> Any:
    """Applies `function` to the observations or to each part; `jax.tree.map` takes as long as a small simulator."""
    return {name: function(x) for name, x in obs.items()} if isinstance(obs, dict) else function(obs)


def _put(obs: Any, i: Any, row: Any) -> None:
    """Sets row i of the observations, in place."""
    if not isinstance(obs, dict):
        obs[i] = row
        return
    for name, x in obs.items():
        x[i] = row[name]


def register_shimmy() -> None:
    """Registers the `dm_control/` ids with Gymnasium. Raises ImportError if Shimmy or dm_control is missing."""
    import gymnasium
    import shimmy  # dm_control looks for a display and prints a message if there is none

    gymnasium.register_envs(shimmy)


def available() -> list[str]:
    """Returns the ids of Gymnasium's continuous control and, through Shimmy, dm_control; [] without Gymnasium."""
    try:
        import gymnasium
    except ImportError:
        return []
    with base.quiet(), suppress(Exception):  # even if OpenGL is broken
        register_shimmy()
    suite = {id for id in gymnasium.registry if id.startswith("dm_control/") and id[11].islower()}
    small = {"Pendulum-v1", "MountainCarContinuous-v0"}
    mujoco = {id for id, spec in gymnasium.registry.items() if "mujoco" in str(spec.entry_point) and id.endswith("-v5")}
    return sorted(small | mujoco | suite - {"dm_control/compatibility-env-v0"})


def check_id(id: str) -> None:
    """Raises UserError when Gymnasium is missing or does not know the id."""
    with _explained(id) as gymnasium:
        gymnasium.spec(id)


def _make(id: str, render: bool) -> Any:
    # Not every constructor takes a render_mode. `base.checked` replaces Gymnasium's checker with one-line messages.
    options = {"render_mode": "rgb_array"} if render else {}
    with _explained(id) as gymnasium:
        return gymnasium.make(id, disable_env_checker=True, **options)


@contextmanager
def _explained(id: str, doing: str = "init") -> Iterator[Any]:
    """Yields Gymnasium with the ids of Shimmy registered if needed; turns its errors into UserErrors with a remedy."""
    try:
        with base.quiet():
            import gymnasium
    except ImportError as error:
        raise UserError(f'environment {id} needs Gymnasium: pip install "contraflow[mujoco]"') from error
    try:
        with base.quiet():
            if id.startswith("dm_control/"):
                register_shimmy()
            yield gymnasium
    except (ModuleNotFoundError, gymnasium.error.DependencyNotInstalled) as error:
        text = " ".join(str(error).split())
        extra = "dmc" if id.startswith("dm_control/") else "mujoco" if "mujoco" in text.lower() else ""
        remedy = f'pip install "contraflow[{extra}]"' if extra else "install that package"
        raise UserError(f"environment {id} lacks a package ({text}): {remedy}") from error
    except gymnasium.error.UnregisteredEnv as error:
        raise base.unknown_id(f"gym:{id}") from error
    except (ImportError, gymnasium.error.Error) as error:
        text = " ".join(str(error).split())
        raise UserError(f"environment {id} cannot be built ({text}); use another id or version") from error
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, TypeError) and "argument 'render_mode'" in str(error):
            raise UserError(
                f"environment {id} takes no render_mode, so it cannot be filmed; leave out the video"
            ) from error
        raise base.failed(id, doing, error) from error


def _episode_length(env: Any) -> int | None:
    """Returns the time limit in steps; None if there is none or it is unknown."""
    first = env.envs[0] if getattr(env, "envs", None) else env
    limit = first.spec.max_episode_steps if first.spec is not None else None
    if limit is None:  # Shimmy registers dm_control tasks without the limit, which only the task itself holds
        limit = getattr(getattr(first.unwrapped, "_env", None), "_step_limit", None)
    return int(limit) if limit is not None and np.isfinite(limit) else None


KIND = base.Kind(
    lambda name, num_envs, seed, render: Gymnasium(name, num_envs, seed, render=render),
    check_id,
    available,
    jittable=False,
    renders=True,
)
