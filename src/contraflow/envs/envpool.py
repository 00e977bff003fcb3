"""EnvPool: C++ simulators on threads; the default for dm_control, MuJoCo v5, MetaWorld, Adroit and Kitchen tasks."""

from typing import Any, ClassVar

import numpy as np

from contraflow.core.types import EnvSpec, PRNGKey, Step, UserError
from contraflow.envs import base


def check_id(id: str) -> Any:
    """Returns the EnvPool package if it is installed and knows the id. Raises UserError otherwise."""
    try:
        with base.quiet():
            import envpool
    except ImportError as error:
        raise UserError(f'environment envpool:{id} needs EnvPool: pip install "contraflow[envpool]"') from error
    if id not in envpool.list_all_envs():
        raise base.unknown_id(f"envpool:{id}")
    return envpool


def available() -> list[str]:
    """Returns the ids of the continuous-control families; [] if EnvPool is not installed."""
    try:
        import envpool
        from envpool.registration import registry
    except ImportError:
        return []
    ids = []
    for id in envpool.list_all_envs():
        family = registry.specs[id][0].removeprefix("envpool.mujoco.")
        if (
            family in ("dmc", "metaworld")
            or (family == "gym" and id.endswith("-v5"))
            or (family == "playground" and "/" not in id)  # each is registered twice, once with a namespace
            or (family == "robotics" and id.startswith(("AdroitHand", "FrankaKitchen")))
        ):
            ids.append(id)
    return sorted(ids)


class EnvPool:
    """N copies of one EnvPool task.

    - Dict observations are flattened in the order of `spec.obs_keys`. The bounds that EnvPool declares for them are
      wrong and unused.
    - An ended copy is reset within the same `step`, so EnvPool's dummy transition after an end never happens.
    - `truncated` marks the time limit and `terminated` the task's own end; both are True when they coincide.
    - The goal of a task of MetaWorld is part of the observation, as in its MT1; EnvPool hides it unless told.
    - EnvPool seeds a pool only at construction, so `reset` builds a new pool, seeded from `seed` and its key.

    Raises UserError when EnvPool is missing, the id is unknown, actions are not continuous and bounded, observations
    are images, or anything goes wrong in a simulator.
    """

    holds: ClassVar[bool] = True
    """`step` can leave out copies."""

    @base.reports
    def __init__(
        self,
        id: str,
        num_envs: int = 1,
        seed: int = 0,
        *,
        episode_length: int | None = None,
        num_threads: int = 0,
        render: bool = False,
        render_size: tuple[int, int] = (480, 480),
        camera: int | None = None,
    ) -> None:
        """`episode_length` None keeps the task's own limit; `num_threads` 0 means one per core.

        `render_size` is (height, width) of `frame()`. `camera` None is the first camera of the DeepMind Control Suite,
        which follows the walker, and otherwise the task's default view, -1.
        """
        self.name, self._seed, self._gl = f"envpool:{id}", seed, None
        self._pool: Any = None
        base.check_num_envs(self.name, num_envs)
        envpool = check_id(id)
        self._make = envpool.make_gymnasium
        self._settings: dict[str, Any] = {"task_id": id, "num_envs": num_envs, "num_threads": num_threads}
        if id.startswith("MetaWorld/"):
            self._settings["partially_observable"] = False
        if render:
            height, width = render_size
            self._gl = _gl_context(width, height)
            self._settings |= {"render_mode": "rgb_array", "render_width": width, "render_height": height}
            suite = type(envpool.make_spec(id)).__name__.startswith("Dmc")
            self._settings |= {"render_camera_id": (0 if suite else -1) if camera is None else camera}

        limit = episode_length or int(envpool.make_spec(id).config.max_episode_steps)
        # One step longer than ours: at its own limit EnvPool reports terminated = False even for a task that ended.
        self._settings["max_episode_steps"] = limit + 1
        space, actions = self._build(0)
        obs_dim, keys, parts = base.observation_layout(self.name, space)
        if parts:
            raise UserError(
                f"environment {self.name} observes images {parts[0].shape}, which EnvPool here does not support; use "
                "the Gymnasium version (gym:) or a task that observes states"
            )
        self._low, self._high = base.action_bounds(self.name, actions)
        spec = EnvSpec(obs_dim, self._low.size, num_envs, limit, jittable=False, obs_keys=keys)
        self._spec = base.with_bounds(spec, self._low, self._high)
        self._start()

    @property
    def spec(self) -> EnvSpec:
        return self._spec

    @base.reports
    def reset(self, key: PRNGKey) -> tuple[None, np.ndarray]:
        """Starts N episodes that depend only on the adapter's seed and `key`; returns (None, obs [N, o])."""
        self._build(base.derive_seed(self._seed, key))
        return None, self._start()

    @base.reports
    def step(self, state: None, action: Any, active: np.ndarray | None = None) -> tuple[None, Step]:
        """Advances all copies by `action` [N, a] in [-1, 1]; ended copies start their next episode at once.

        Copies that are not `active` [N] are held; their rows are zeros with `valid` False.
        """
        n = self._spec.num_envs
        scaled, valid = base.rescale(action, self._low, self._high), np.ones(n, bool)
        if active is None:
            raw, reward, terminated, truncated, info = self._pool.step(scaled)
        else:
            ids = np.flatnonzero(active).astype(np.int32)
            raw, reward, terminated, truncated, info = self._pool.step(scaled[ids], ids)
        truncated = truncated | (info["elapsed_step"] >= self._spec.episode_length)
        next_obs, reward = base.flatten(raw, len(reward)), np.asarray(reward, np.float32)
        success = np.array(info["success"], bool) if "success" in info else None
        if active is not None:
            at = info["env_id"]  # rows come back in the order in which threads finish
            rows = next_obs, reward, terminated, truncated, valid[: len(at)]
            next_obs, reward, terminated, truncated, valid = (_placed(n, at, row) for row in rows)
            success = None if success is None else _placed(n, at, success)
        obs, ended = next_obs, np.flatnonzero(terminated | truncated).astype(np.int32)
        if ended.size:
            fresh, info = self._pool.reset(ended)
            obs = next_obs.copy()
            obs[info["env_id"]] = base.flatten(fresh, ended.size)  # in the order in which threads finish
        step = Step(obs, next_obs, reward, terminated, truncated, valid, success=success)
        return None, base.checked(self.name, self._spec, step)

    def _build(self, seed: int) -> tuple[Any, Any]:
        """Replaces the old pool by a new one and returns its spaces.

        Two pools at once would double the memory, some 30 MiB per copy of a MuJoCo task.
        """
        self._release()
        with base.quiet():  # the first access to the spaces warns about EnvPool's own bounds
            self._pool = self._make(seed=seed, **self._settings)
            return self._pool.single_observation_space, self._pool.single_action_space

    def _start(self) -> np.ndarray:
        raw = self._pool.reset()[0]
        obs = base.flatten(raw, self._spec.num_envs)
        base.check_obs(self.name, self._spec, obs)
        self.notes = base.notes_on(self.name, raw)
        return obs

    @base.reports
    def frame(self) -> np.ndarray:
        """Returns a picture of copy 0, uint8 [h, w, 3]. Raises UserError unless built with render=True."""
        if self._gl is None:
            raise UserError(f"environment {self.name} was built without pictures; construct it with render=True")
        self._gl.make_current()
        return np.asarray(self._pool.render(env_ids=0))[0]

    def close(self) -> None:
        """Releases the simulators and the OpenGL context; may be called twice."""
        self._release()  # the renderer must be released while the context exists
        if self._gl is not None:
            self._gl.free()
            self._gl = None

    def _release(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def _placed(n: int, at: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns an array of n rows with `rows` at the places `at` and zeros elsewhere."""
    out = np.zeros((n, *rows.shape[1:]), rows.dtype)
    out[at] = rows
    return out


def _gl_context(width: int, height: int) -> Any:
    """Returns a current OpenGL context, without which EnvPool's renderer aborts the whole process."""
    base.prefer_egl()
    try:
        import mujoco

        context = mujoco.GLContext(width, height)
        context.make_current()
    except Exception as error:
        raise UserError(f"no OpenGL context for rendering ({error}); set MUJOCO_GL=egl and start again") from error
    return context


KIND = base.Kind(
    lambda name, num_envs, seed, render: EnvPool(name, num_envs, seed, render=render),
    check_id,
    available,
    jittable=False,
    renders=True,
)
