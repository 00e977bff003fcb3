"""Recorded experience in memory: rows in time order, trajectory after trajectory.

Two ends are kept apart. `terminated` stops the bootstrap: nothing is worth anything after it. `end` closes a
trajectory: what follows in the arrays is another one. Mostly the first implies the second, but not in data that plays
on after a success; and a trajectory that was cut off ends without `terminated`.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float32, Int

from contraflow.core.bounds import ROUNDING, Bounds, action_range, range_text, same_range
from contraflow.core.flatten import leaf_names, ordered_leaves
from contraflow.core.observation import Observation, Part, shown
from contraflow.core.types import EnvSpec, UserError

VECTORS, REQUIRED = ("obs", "action", "next_obs"), ("obs", "action", "reward", "terminated")
NUMBERS = ("reward", "terminated", "truncated", "end", "known", "human", "terminals", "timeouts", "masks")
COLUMNS = ("obs", "action", "reward", "next_obs", "terminated", "end", "known")
GUESSED = "no action bounds are stated: the range of the data became [-1, 1]"
UNBOUNDED = 1e30  # a bound beyond it, such as the largest float32, is none
LOST = 0.01  # of a column's standard deviation: where rounding to float32 moves it by more, that is said


@dataclass(frozen=True, eq=False)
class Dataset:
    """n rows. `action` is in [-1, 1]^a, rescaled from [`low`, `high`], which are the range of the data where they are
    not `stated`. `next_obs` is the true successor of `obs`, where it was recorded.

    Where it was not, `next_obs` repeats `obs`, and `known` is False unless the step terminated: nothing may read it.
    `human` says which actions a person took in place of the policy; None where that was not recorded.
    `env` is an id of `contraflow.envs`, where it is known; `notes` say what had to be assumed. Built by `build`, `join`
    and `contraflow.data.datasets.readers.load`.
    """

    name: str
    obs: Any  # float32 [n, o], images [n, H, W, C], or a dict of parts [n, ...]
    action: Float32[np.ndarray, "n a"]
    reward: Float32[np.ndarray, " n"]
    next_obs: Any
    terminated: Bool[np.ndarray, " n"]
    end: Bool[np.ndarray, " n"]
    known: Bool[np.ndarray, " n"]
    low: Float32[np.ndarray, " a"]
    high: Float32[np.ndarray, " a"]
    stated: bool = True
    env: str | None = None
    notes: tuple[str, ...] = ()
    human: Bool[np.ndarray, " n"] | None = None

    def __len__(self) -> int:
        return len(self.reward)

    @property
    def recorded(self) -> tuple[str, ...]:
        """The names of its columns."""
        return COLUMNS if self.human is None else (*COLUMNS, "human")

    @property
    def observation(self) -> Observation:
        """What one observation is."""
        if isinstance(self.obs, np.ndarray) and self.obs.ndim == 2:
            return self.obs.shape[1]
        names = leaf_names(self.obs) or ("",)
        leaves = zip(names, ordered_leaves(self.obs), strict=True)
        return tuple(Part(name, x.shape[1:], "uint8" if x.dtype == np.uint8 else "float32") for name, x in leaves)

    @property
    def starts(self) -> Int[np.ndarray, " t"]:
        """Place of the first row of each trajectory."""
        return np.concatenate([[0], np.flatnonzero(self.end)[:-1] + 1])

    @property
    def lengths(self) -> Int[np.ndarray, " t"]:
        return np.flatnonzero(self.end) - self.starts + 1

    @property
    def returns(self) -> Float32[np.ndarray, " t"]:
        """Undiscounted, of each trajectory."""
        return np.add.reduceat(self.reward.astype(np.float64), self.starts).astype(np.float32)

    @property
    def raw_action(self) -> Float32[np.ndarray, "n a"]:
        """Actions in [low, high], as the environment proper takes them."""
        return np.clip(self._raw().astype(np.float32), self.low, self.high)

    def moments(self) -> tuple[Float32[np.ndarray, " o"], Float32[np.ndarray, " o"]]:
        """Mean and standard deviation of `obs`; the deviation of a column that does not vary is 1."""
        mean, std = self.obs.mean(0, dtype=np.float64), self.obs.std(0, dtype=np.float64)
        constant = std <= 1e-6 * np.maximum(1.0, abs(mean))
        return mean.astype(np.float32), np.where(constant, 1.0, std).astype(np.float32)

    def digest(self) -> str:
        """SHA-256 of the arrays: another one where anything in them differs."""
        total = hashlib.sha256()
        for key in (*self.recorded, "low", "high"):
            for name, leaf in zip(
                leaf_names(getattr(self, key)) or ("",), ordered_leaves(getattr(self, key)), strict=True
            ):
                array = np.ascontiguousarray(leaf)
                total.update(f"{key}{name and '/'}{name} {array.dtype} {array.shape}".encode())
                total.update(array.data)
        return total.hexdigest()

    def spec(self, horizon: int = 1, execute: int = 1) -> EnvSpec:
        """Sizes and range of actions, in chunks of `horizon`, for a policy that learns from these rows.

        Raises UserError when no trajectory is that long.
        """
        longest = int(self.lengths.max())
        if not 1 <= horizon <= longest:
            raise UserError(
                f"no trajectory of {self.name} has {horizon} steps, the longest has {longest}: choose a horizon from 1 "
                f"to {longest}, or longer trajectories"
            )
        seen, low, high = self.observation, tuple(self.low.tolist()), tuple(self.high.tolist())
        parts = () if isinstance(seen, int) else seen
        sizes = sum(part.size for part in parts) if isinstance(seen, tuple) else seen, self.action.shape[1] * horizon
        return EnvSpec(*sizes, 1, None, False, horizon, execute, low, high, obs_parts=parts)

    def with_successor(self) -> "Dataset":
        """Without the rows whose successor is unknown; those before them end their trajectories.

        Raises UserError when none is left.
        """
        if self.known.all():
            return self
        if not self.known.any():
            raise UserError(
                f"dataset {self.name} records no successor of any step: imitate it, or record longer trajectories"
            )
        end = self.end | ~np.append(self.known[1:], True)
        rows = {key: end if key == "end" else getattr(self, key) for key in self.recorded}
        return replace(self, **jax.tree.map(lambda x: x[self.known], rows))

    def with_bounds(self, low: Any, high: Any, *, clip: bool = False, where: str = "these bounds") -> "Dataset":
        """The same raw actions as shares of another range, [-1, 1] of [low, high], which is then the stated one.

        Raises UserError for raw actions outside it, by more than rounding, without `clip`.
        """
        raw, notes = self._raw(), [note for note in self.notes if note != GUESSED]
        bounds, stated = _bounds(self.name, raw, low, high)
        remedy = f"choose the environment that it was recorded in{_named(self.env)}, or clip the actions (--clip)"
        action = _unit(self.name, raw, bounds, clip, notes, f"the range of {where}: {remedy}")
        low, high = (bound.astype(np.float32) for bound in bounds)
        return replace(self, action=action, low=low, high=high, stated=stated, notes=tuple(notes))

    def check(self, spec: EnvSpec, env: str = "the environment", *, clip: bool = False) -> "Dataset":
        """The dataset with actions in the range of an environment (or of a policy), the raw ones being the same; itself
        where the range is the same to rounding.

        Raises UserError for other sizes, of a chunk one action counting, and for raw actions outside the range by more
        than rounding without `clip`.
        """
        have, want = (self.observation, self.action.shape[1]), (spec.observation, spec.action_dim // spec.horizon)
        if have != want:
            raise UserError(
                f"dataset {self.name} has {shown(have[0])} observations and {have[1]} actions, {env} has "
                f"{shown(want[0])} and {want[1]}: choose the environment that it was recorded in{_named(self.env)}"
            )
        new, own = action_range(spec), (self.low.astype(np.float64), self.high.astype(np.float64))
        if self.stated and same_range(own, new):
            return self
        was = f"are stated in {range_text(*own)}" if self.stated else "have no stated bounds"
        note = f"actions {was}: the range of {env} is taken, {range_text(*new)}"
        data = self.with_bounds(*new, clip=clip, where=env)
        return replace(data, notes=(*data.notes, note))

    def _raw(self) -> np.ndarray:
        """Raw actions [n, a] in double precision."""
        low, high = self.low.astype(np.float64), self.high.astype(np.float64)
        return (low + high) / 2 + self.action * ((high - low) / 2)


def build(
    arrays: Mapping[str, Any],
    *,
    name: str,
    env: str | None = None,
    low: Any = None,
    high: Any = None,
    notes: Iterable[str] = (),
    clip: bool = False,
) -> Dataset:
    """A dataset from flat arrays obs [n, o], action [n, a] in [low, high], reward [n], next_obs, terminated, end,
    `known` where not all is, and `human` where a person took over.

    Bounds that are not stated, or are none, become the range of the data. `clip` takes actions outside the bounds for
    what most environments take them for. Raises UserError for arrays that do not fit together, are empty or not finite,
    mark no end, or for actions outside the bounds without `clip`.
    """
    said = list(notes)
    rows = columns(name, arrays, (*REQUIRED, "next_obs", "end"))
    same_length(name, rows)
    rows.setdefault("known", np.ones(len(rows["action"]), bool))
    rows = {key: _converted(name, key, rows[key], said) for key in (*COLUMNS, "human") if key in rows}
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), rows[key]) for key in ("obs", "next_obs")]
    if shapes[0] != shapes[1]:
        if not all(isinstance(rows[key], np.ndarray) and rows[key].ndim == 2 for key in ("obs", "next_obs")):
            raise UserError(f"dataset {name}: obs and next_obs have other parts or shapes; record both alike")
        width = [rows[key].shape[1] for key in ("obs", "next_obs")]
        raise UserError(f"dataset {name}: obs has {width[0]} columns and next_obs {width[1]}; record both alike")
    if not rows["end"].any():
        raise UserError(f"dataset {name} marks no end of a trajectory in {len(rows['end'])} rows: add them")
    if not rows["end"][-1]:
        said.append("the last trajectory is cut off: its end counts as truncation")
        rows["end"] = np.append(rows["end"][:-1], True)
    if unknown := int((~rows["known"]).sum()):
        said.append(f"{unknown} steps have no recorded successor: imitation uses them, what learns values does not")
    bounds, stated = _bounds(name, rows["action"], low, high)
    if not stated:
        said.append(GUESSED)
    outside = "their bounds: state the true ones (--low, --high), or clip the actions (--clip)"
    rows["action"] = _unit(name, rows["action"], bounds, clip, said, outside)
    low, high = (bound.astype(np.float32) for bound in bounds)
    notes = tuple(dict.fromkeys(said))  # what was said when it was recorded is not said again
    return Dataset(name=name, **rows, low=low, high=high, stated=stated, env=env, notes=notes)


def join(trajectories: Sequence[Mapping[str, Any]], *, name: str, **options: Any) -> Dataset:
    """`build` from single trajectories of T steps: action [T, a], reward [T], terminated [T], and obs [T+1, o], or
    obs and next_obs [T, o], or obs [T, o] alone, of which `unrecorded` makes the best; `options` as for `build`."""
    parts = []
    for i, trajectory in enumerate(trajectories):
        part = columns(f"{name}, trajectory {i}", trajectory, REQUIRED)
        steps = len(part["action"])
        if len(part["obs"]) not in (steps, steps + 1):
            raise UserError(
                f"dataset {name}: trajectory {i} has {len(part['obs'])} observations and {steps} actions; it needs one "
                "observation more than actions, or as many"
            )
        part = {"known": np.ones(steps, bool), **part, "end": np.arange(steps) == steps - 1}
        if len(part["obs"]) == steps + 1:
            part["obs"], part["next_obs"] = part["obs"][:-1], part["obs"][1:]
        same_length(f"{name}, trajectory {i}", part, empty=True)
        if steps:
            parts.append(part if "next_obs" in part else unrecorded(part))
    if not parts:
        raise UserError(f"dataset {name} is empty: record at least one trajectory of two steps")
    keys = {key for part in parts for key in part}
    lacking = {key: i for i, part in enumerate(parts) for key in keys - part.keys()}
    for key, i in lacking.items():
        raise UserError(f"dataset {name}: trajectory {i} has no {key}, others have: record all in the same way")
    try:
        flat = {key: np.concatenate([part[key] for part in parts]) for key in keys}
    except ValueError as error:
        raise UserError(f"dataset {name} has trajectories of different shapes ({error}); split it") from None
    return build(flat, name=name, **options)


def unrecorded(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Rows with `next_obs` by shift, where the source has no observation after the last step of a trajectory: there it
    repeats obs, and is not `known` unless the step terminated, as nothing reads it then."""
    end, obs = np.append(rows["end"][:-1].astype(bool), True), rows["obs"]
    shifted = lambda x: np.where(end.reshape(-1, *[1] * (x.ndim - 1)), x, np.roll(x, -1, axis=0))
    following = jax.tree.map(shifted, obs)
    return {**rows, "next_obs": following, "known": ~end | rows["terminated"].astype(bool)}


def columns(name: str, arrays: Mapping[str, Any], required: Iterable[str] = ()) -> dict[str, Any]:
    """The arrays, those that a dataset is made of being numbers of the right rank: [n, k] for obs, action and next_obs,
    [n] for the others. A lone number for each step may come as [n] or [n, 1].

    Raises UserError for what is missing, not numeric, of another rank or not finite.
    """
    for key in required:
        if key not in arrays:
            raise UserError(f"dataset {name} has no {key}: record it for each step")
    rows = dict(arrays)
    for key in (*VECTORS, *NUMBERS):
        if key not in rows:
            continue
        if key.endswith("obs") and (isinstance(rows[key], dict) or np.ndim(rows[key]) == 4):
            rows[key] = jax.tree.map(partial(_part, name, key), rows[key])
            continue
        try:
            array = np.asarray(rows[key])
        except ValueError:
            raise UserError(f"dataset {name}: {key} has rows of different lengths; record all alike") from None
        if array.dtype.kind not in "biuf":
            raise UserError(f"dataset {name}: {key} holds {array.dtype}, not numbers; convert it")
        shape, vectors = array.shape, key in VECTORS
        if vectors and array.ndim == 1:
            array = array[:, None]
        elif not vectors and shape[1:] == (1,):
            array = array[:, 0]
        if array.ndim != 1 + vectors:
            wanted = "rows of numbers, or images [n, H, W, C]" if vectors else "one number for each step"
            raise UserError(f"dataset {name}: {key} has shape {list(shape)}; it must be {wanted}")
        rows[key] = array
        _check_finite(name, key, array)
    return rows


def _part(name: str, key: str, array: Any) -> np.ndarray:
    """A part of an observation: images as they are, vectors [n, k]."""
    array = np.asarray(array)
    if array.dtype.kind not in "biuf" or array.ndim not in (1, 2, 4):
        what = f"{array.dtype}{list(array.shape)}"
        raise UserError(f"dataset {name}: a part of {key} is {what}; it must be numbers [n, k] or images [n, H, W, C]")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UserError(f"dataset {name}: a part of {key} is not finite: repair or leave out its trajectory")
    pixels = array.ndim == 4 and array.dtype == np.uint8
    return array if pixels else (array[:, None] if array.ndim == 1 else array).astype(np.float32)


def same_length(name: str, rows: Mapping[str, Any], empty: bool = False) -> None:
    """Raise UserError for the first of the `columns` that is not as long as the actions, or unless `empty` is allowed
    where there is no action."""
    n = len(rows["action"])
    if n == 0 and not empty:
        raise UserError(f"dataset {name} is empty: record at least one trajectory of two steps")
    for key in (*VECTORS, *NUMBERS):
        for have in {len(leaf) for leaf in ordered_leaves(rows[key])} - {n} if key in rows else ():
            raise UserError(f"dataset {name}: {key} has {have} rows, action has {n}; each step needs one of both")


def _converted(name: str, key: str, array: Any, said: list[str]) -> Any:
    """A column as bool or float32, in which it must be finite; a note where that loses what varies in it."""
    if key in ("terminated", "end", "known", "human"):
        return array.astype(bool)
    if isinstance(array, dict) or array.ndim == 4:
        return array  # what `_part` made of it
    with np.errstate(over="ignore"):
        small = array.astype(np.float32, copy=False)
    _check_finite(name, key, small)
    if array.itemsize > 2 and array.dtype != np.float32 and key != "next_obs":
        lost = abs(small.astype(np.float64) - array).max(0) > LOST * array.std(0, dtype=np.float64)
        bad = np.flatnonzero(np.atleast_1d(lost & (np.ptp(array, axis=0) > 0)))
        if bad.size:
            where = f"{key}, column {', '.join(map(str, bad[:8]))}" if array.ndim > 1 else key
            said.append(f"float32 rounds {where} by more than {LOST:.0%} of what it varies: subtract a mean")
    return small


def _check_finite(name: str, key: str, array: np.ndarray) -> None:
    bad = ~np.isfinite(array)
    if bad.any():
        row, *column = (int(i) for i in np.argwhere(bad)[0])
        where = f"column {column[0]} of {key}" if column else key
        value = "NaN" if np.isnan(array[row, *column]) else "infinite"
        raise UserError(f"dataset {name}: {where} is {value} in row {row}: repair or leave out its trajectory")


def _unit(name: str, raw: np.ndarray, bounds: Bounds, clip: bool, said: list[str], outside: str) -> np.ndarray:
    """Raw actions as shares of their bounds, in [-1, 1]. Raises UserError for one outside them, unless it is clipped;
    `outside` says outside of what, and the remedy."""
    low, high = bounds
    unit = (raw - (low + high) / 2) / ((high - low) / 2)
    beyond = (abs(unit) > 1 + ROUNDING).any(1)
    if beyond.any():
        at, share = int(beyond.argmax()), float(beyond.mean())
        column = int(abs(unit[at]).argmax())
        where = f"column {column} of action is {raw[at, column]:g} in row {at}"
        if not clip:
            raise UserError(f"dataset {name}: {where}, outside [{low[column]:g}, {high[column]:g}], {outside}")
        said.append(f"{share:.1%} of the actions lay outside their bounds and were clipped ({where})")
    return np.clip(unit, -1, 1).astype(np.float32)


def _bounds(name: str, action: np.ndarray, low: Any, high: Any) -> tuple[Bounds, bool]:
    """Action bounds, and whether all are stated; for the others the range of the data, never narrower than rounding."""
    dim, given = action.shape[1], []
    for bound, none in ((low, -np.inf), (high, np.inf)):
        array = np.asarray(none if bound is None or np.size(bound) == 0 else bound, np.float64).ravel()
        given.append(np.broadcast_to(array, dim) if array.size == 1 else array)
    low, high = given
    if low.shape != (dim,) or high.shape != (dim,):
        raise UserError(
            f"dataset {name}: the bounds have {low.size} and {high.size} numbers, actions {dim}; give one for each"
        )
    no_low, no_high = ~(abs(low) < UNBOUNDED), ~(abs(high) < UNBOUNDED)
    low, high = np.where(no_low, action.min(0), low), np.where(no_high, action.max(0), high)
    narrow, (least, most) = (
        high - low <= 1e-6 * np.maximum(1.0, abs(low)),
        (np.minimum(low, high), np.maximum(low, high)),
    )
    low, high = np.where(narrow & no_low, least - 1, low), np.where(narrow & no_high, most + 1, high)
    if not (low < high).all():
        raise UserError(f"dataset {name}: a lower action bound is not below the upper one; give the true ones")
    return (low, high), not (no_low | no_high).any()


def _named(env: str | None) -> str:
    return f" ({env})" if env else ""
