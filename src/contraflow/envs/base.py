"""The interface of environments, and the code that all kinds of environment share."""

import difflib
import logging
import os
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from functools import wraps
from io import StringIO
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np

from contraflow.core.flatten import leaf_names, ordered_leaves
from contraflow.core.observation import Part, misfit
from contraflow.core.types import EnvSpec, PRNGKey, Step, UserError


@runtime_checkable
class Env(Protocol):
    """N parallel environments.

    - Actions arrive in [-1, 1]^a; the adapter rescales them to the environment's own range.
    - Observations are flat float32, or as the parts of the spec say: images, or a dict of images and vectors.
    - `Step.next_obs` is the true successor, also at the end of an episode; `Step.obs` is the one to act on next.
    - `terminated` and `truncated` are kept apart; the adapter resets ended environments.
    - `jittable` environments are pure, and `state` holds everything. Host environments keep the simulator on the
      adapter, and `state` is whatever they need between calls.
    - `reset` with the same key starts the same episodes.

    A host environment may have more: `close()`, which may be called twice (`contraflow.envs.close` calls it if it
    exists); `frame()`, a picture of copy 0; `holds`, True if `step(state, action, active)` can leave out copies;
    `notes`, lines for the user to read (`contraflow.envs.notes`).
    """

    @property
    def spec(self) -> EnvSpec: ...
    def reset(self, key: PRNGKey) -> tuple[Any, Any]:
        """Starts N episodes; returns (state, obs [N, ...])."""
        ...

    def step(self, state: Any, action: Any) -> tuple[Any, Step]:
        """Advances all N environments by `action` [N, a] in [-1, 1]."""
        ...


class Kind(NamedTuple):
    """The environments behind a prefix; `name` is the id without it. No simulator is imported before a call."""

    make: Callable[[str, int, int, bool], Env]
    """(name, num_envs, seed, render) -> environment."""
    check: Callable[[str], object]
    """Raises UserError for a name that `make` does not know or a missing package, without building a simulator."""
    available: Callable[[], list[str]]
    jittable: bool | None
    """None if it is known only after building."""
    renders: bool = False
    most: int | None = None
    """Copies that evaluations make at the most; they then play several episodes each."""


def from_table(prefix: str, table: Mapping[str, Callable[[int], Env]]) -> Kind:
    """Returns the kind for the environments of a table, whose entries are called with num_envs."""

    def check(name: str) -> None:
        if name not in table:
            raise unknown_id(f"{prefix}:{name}", tuple(table))

    def make(name: str, num_envs: int, seed: int, render: bool) -> Env:
        check(name)
        return table[name](num_envs)

    return Kind(make, check, lambda: list(table), jittable=True)


def close(env: Env) -> None:
    """Releases threads and windows of a host environment; does nothing for environments without `close`."""
    getattr(env, "close", lambda: None)()


def notes(env: Env) -> tuple[str, ...]:
    """Returns lines about the built environment that the user should read once."""
    return getattr(env, "notes", ())


# errors

P = ParamSpec("P")
R = TypeVar("R")


def reports(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Wraps a method of an adapter, which has a `name`, so that any error of a simulator becomes a UserError."""

    @wraps(method)
    def call(self: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(self, *args, **kwargs)
        except UserError:
            raise
        except Exception as error:
            raise failed(self.name, method.__name__.strip("_"), error) from error

    return call


def not_rendered(name: str) -> UserError:
    """Returns the error for a video of an environment that cannot be drawn."""
    return UserError(f"environment {name} cannot be rendered; leave out the video, or use envpool:, gym: or jax:")


def failed(name: str, doing: str, error: Exception) -> UserError:
    """Returns a one-line error for `error`, raised by an environment, with its place in the user's code if any."""
    paths = [sysconfig.get_path(key) for key in ("stdlib", "purelib", "platlib")] + [str(Path(__file__).parents[1])]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*paths, "<"))]
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return UserError(f"environment {name} failed in {doing}{place} ({text}); fix the environment")


def unknown_id(name: str, known: tuple[str, ...] = ()) -> UserError:
    """Returns the error for an unknown id; it names the closest existing ids, else those `known` for its prefix."""
    from contraflow.envs import available  # imported here, because that package imports this module

    prefix, _, tail = name.rpartition(":")
    ids: dict[str, list[str]] = {}
    for kind, names in available().items():
        for id in names:
            ids.setdefault(id.lower(), []).append(f"{kind}:{id}")
    close = difflib.get_close_matches(tail.lower(), ids, n=3, cutoff=0.5)
    # Ids with the requested prefix come first: many tasks exist under several.
    found = sorted((full for id in close for full in ids[id]), key=lambda full: not full.startswith(prefix + ":"))
    hint = f"there are {', '.join(known)}" if known else "contraflow.envs.available() lists the known ones"
    return UserError(f"unknown environment {name}; " + (f"did you mean {', '.join(found)}?" if found else hint))


@contextmanager
def quiet() -> Iterator[None]:
    """Silences simulators while they are imported, listed and built; errors are still raised."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# checks


def check_num_envs(name: str, num_envs: int) -> None:
    """Raises UserError for fewer than one environment."""
    if num_envs < 1:
        raise UserError(f"environment {name} needs num_envs >= 1, got {num_envs}; set num_envs to 1 or more")


def check_obs(name: str, spec: EnvSpec, obs: Any) -> None:
    """Raises UserError unless the first observations of a host environment match the spec and are finite."""
    _check_obs(name, "obs", spec, obs)
    _check_finite(name, "observation", obs)


def check_shapes(name: str, spec: EnvSpec, step: Step) -> None:
    """Raises UserError unless observations are [N, o], or match the parts of the spec, and everything else is [N]."""
    for part in ("obs", "next_obs"):
        _check_obs(name, part, spec, getattr(step, part))
    for part in ("reward", "terminated", "truncated", "valid"):
        _check_shape(name, part, getattr(step, part), (spec.num_envs,))


def checked(name: str, spec: EnvSpec, step: Step) -> Step:
    """Returns the step of a host environment; raises UserError unless shapes match the spec and numbers are finite."""
    check_shapes(name, spec, step)
    _check_finite(name, "observation", step.next_obs)
    if step.obs is not step.next_obs:
        _check_finite(name, "observation", step.obs)
    _check_finite(name, "reward", step.reward)
    return step


def _check_obs(name: str, part: str, spec: EnvSpec, obs: Any) -> None:
    if not spec.obs_parts:
        _check_shape(name, part, obs, (spec.num_envs, spec.obs_dim))
    elif problem := misfit(spec.obs_parts, obs, spec.num_envs):
        raise UserError(f"environment {name} returned {part} that {problem} by its spec; fix one of the two")


def _check_shape(name: str, part: str, x: Any, want: tuple[int, ...]) -> None:
    if np.shape(x) != want:
        raise UserError(
            f"environment {name} returned {part} of shape {np.shape(x)}, its spec says {want}; fix one of the two"
        )


def _check_finite(name: str, part: str, x: Any) -> None:
    finite = all(map(np.all, map(np.isfinite, x.values()))) if isinstance(x, dict) else np.isfinite(x).all()
    if not finite:
        raise UserError(f"environment {name} returned a non-finite {part}; fix the environment or its reward")


# spaces


def observation_layout(name: str, space: Any) -> tuple[int, tuple[str, ...], tuple[Part, ...]]:
    """Returns (observation size, names of the flattened parts in order, parts) for a Gymnasium space.

    With an image among them nothing is flattened: the parts are the leaves, "view/left", as one flat dict. Raises
    UserError unless all are numeric arrays of a fixed shape, and images are [height, width, channels].
    """
    from gymnasium.spaces import Box, MultiBinary

    tree, parts = _plain(space), []
    for key, part in zip(leaf_names(tree) or ("",), ordered_leaves(tree), strict=True):
        if not isinstance(part, Box | MultiBinary):
            raise UserError(f"environment {name} observes {part}; wrap it so that it returns arrays (Box observations)")
        image = _is_image(part.shape, part.dtype)
        if image and (len(part.shape) != 3 or part.shape[2] > min(part.shape[:2])):
            raise UserError(
                f"environment {name} observes images {part.shape}, an encoder takes [height, width, channels]; wrap it "
                "to return those"
            )
        shape = part.shape if image else (int(np.prod(part.shape)),)
        parts.append(Part(key, shape, "uint8" if image and part.dtype == np.uint8 else "float32"))
    size = sum(part.size for part in parts)
    return (size, (), tuple(parts)) if any(part.image for part in parts) else (size, leaf_names(tree), ())


def _plain(space: Any) -> Any:
    """Returns a Dict space as a dict, a Tuple space as a tuple, any other space unchanged."""
    from gymnasium.spaces import Dict, Tuple

    if isinstance(space, Dict):
        return {key: _plain(part) for key, part in space.spaces.items()}
    return tuple(map(_plain, space.spaces)) if isinstance(space, Tuple) else space


def _is_image(shape: Any, dtype: Any) -> bool:
    """Returns whether this is bytes on a grid, or numbers on two long axes and a third: [64, 64, 3], [4, 84, 84]."""
    return len(shape) > 1 and (dtype == np.uint8 or (len(shape) > 2 and sorted(shape)[-2] >= 16))


def flatten(obs: Any, n: int) -> np.ndarray:
    """Returns a batch of n observations as one fresh float32 array [n, o], in the order of `ordered_leaves`."""
    parts = [np.asarray(leaf).reshape(n, -1) for leaf in ordered_leaves(obs)]
    return np.concatenate(parts, axis=1, dtype=np.float32, casting="unsafe")


def arranged(obs: Any, n: int, parts: tuple[Part, ...]) -> Any:
    """Returns a batch of n observations as fresh arrays: flattened, or the parts by name."""
    if not parts:
        return flatten(obs, n)
    leaves = dict(zip(leaf_names(obs) or ("",), ordered_leaves(obs), strict=True))
    by_name = {part.name: np.array(leaves[part.name]).reshape(n, *part.shape).astype(part.dtype) for part in parts}
    return by_name.get("", by_name)


def notes_on(name: str, obs: Any) -> tuple[str, ...]:
    """Warns the user where float32 cannot represent observations: from 2^24 on it skips integers."""
    top = [
        np.abs(x).max(initial=0) for x in map(np.asarray, ordered_leaves(obs)) if x.dtype.kind in "iu" or x.itemsize > 4
    ]
    most = max(top, default=0)
    if most < 2**24:
        return ()
    gap = np.spacing(np.float32(most))
    return (f"observations of {name} reach {most:.3g}, where float32 resolves only differences of {gap:.3g}",)


# The largest number with a square in float32; anything beyond counts as "no bound".
UNBOUNDED = float(np.sqrt(np.finfo(np.float32).max))


def action_bounds(name: str, space: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns the bounds of one environment's continuous action space, in its own shape and type.

    Raises UserError for any other space: discrete, integer, or without finite bounds.
    """
    from gymnasium.spaces import Box

    if not isinstance(space, Box) or not np.issubdtype(space.dtype, np.floating):
        raise UserError(f"environment {name} has the action space {space}; choose one with continuous (Box) actions")
    if not (np.abs([space.low, space.high]) < UNBOUNDED).all():
        raise UserError(f"environment {name} has unbounded actions; give its Box action space finite bounds")
    return space.low, space.high


def rescale(action: Any, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Maps actions [N, a] from [-1, 1] to [low, high], in the shape [N, *low.shape] and type of the bounds.

    Actions outside [-1, 1] are clipped.
    """
    unit = np.asarray(action, dtype=low.dtype).reshape(-1, *low.shape)
    # Clipped after scaling: rounding can exceed the range by one unit in the last place, which some simulators refuse.
    return np.clip(low + (unit + 1) * ((high - low) / 2), low, high)


def with_bounds(spec: EnvSpec, low: np.ndarray, high: np.ndarray) -> EnvSpec:
    """Returns the spec with the range of an action, which is saved with a policy."""
    return replace(spec, low=tuple(low.ravel().tolist()), high=tuple(high.ravel().tolist()))


def derive_seed(seed: int, key: PRNGKey) -> int:
    """Returns a simulator seed in [0, 2^31) from the adapter's seed and a reset key, the same on every call.

    The seed is hashed because simulators seed copy i with seed + i, so neighbouring seeds would share most episodes.
    """
    words = np.asarray(jax.random.key_data(key)).ravel().tolist()
    return int(np.random.SeedSequence([seed, *words]).generate_state(1)[0] >> 1)


def prefer_egl() -> None:
    """Makes MuJoCo use EGL on a Linux machine without a display; call it before the first import of mujoco."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")
