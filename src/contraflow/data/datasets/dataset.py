"""Recorded experience in memory: rows in time order, trajectory after trajectory.

Two ends are kept apart. `terminated` stops the bootstrap: nothing is worth anything after it. `end` closes a
trajectory: what follows in the arrays is another one. Mostly the first implies the second, but not in data that plays
on after a success; and a trajectory that was cut off ends without `terminated`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int

from contraflow.core.types import EnvSpec, UserError

ROUNDING = 1e-4  # of half the action range: by so much an action may miss its bounds and is clipped without a word


@dataclass(frozen=True, eq=False)
class Dataset:
    """n rows. `action` is in [-1, 1]^a, rescaled from [`low`, `high`]; `next_obs` is the true successor of `obs`, but
    at a `terminated` row of a source that does not record it, where it repeats `obs` and nothing may read it.

    `last` is the place of the last row of each row's trajectory. `env` is an id of `contraflow.envs`, where it is
    known; `notes` say what had to be assumed. Built by `build`, `join` and `contraflow.data.datasets.readers.load`.
    """

    name: str
    obs: Float32[np.ndarray, "n o"]
    action: Float32[np.ndarray, "n a"]
    reward: Float32[np.ndarray, " n"]
    next_obs: Float32[np.ndarray, "n o"]
    terminated: Bool[np.ndarray, " n"]
    end: Bool[np.ndarray, " n"]
    last: Int[np.ndarray, " n"]
    low: Float32[np.ndarray, " a"]
    high: Float32[np.ndarray, " a"]
    env: str | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.reward)

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
        low, high = self.low.astype(np.float64), self.high.astype(np.float64)
        raw = (low + high) / 2 + self.action * ((high - low) / 2)
        return np.clip(raw.astype(np.float32), self.low, self.high)

    def moments(self) -> tuple[Float32[np.ndarray, " o"], Float32[np.ndarray, " o"]]:
        """Mean and standard deviation of `obs`; the deviation of a column that does not vary is 1."""
        mean, std = self.obs.mean(0, dtype=np.float64), self.obs.std(0, dtype=np.float64)
        constant = std <= 1e-6 * np.maximum(1.0, abs(mean))
        return mean.astype(np.float32), np.where(constant, 1.0, std).astype(np.float32)

    def chunk_index(self, horizon: int) -> tuple[Int[np.ndarray, "n h"], Bool[np.ndarray, "n h"]]:
        """(rows, valid): the `horizon` rows from each row on. What lies beyond the end of the trajectory repeats its
        last row and is not valid; a row may be valid that follows a `terminated` one.

        Raises UserError when no trajectory is that long.
        """
        longest = int(self.lengths.max())
        if not 1 <= horizon <= longest:
            raise UserError(
                f"no trajectory of {self.name} has {horizon} steps, the longest has {longest}: choose a horizon from 1 "
                f"to {longest}, or longer trajectories"
            )
        rows = np.arange(len(self), dtype=np.int32)[:, None] + np.arange(horizon, dtype=np.int32)
        return np.minimum(rows, self.last[:, None]), rows <= self.last[:, None]

    def check(self, spec: EnvSpec, env: str = "the environment") -> None:
        """Raise UserError unless the sizes are those of an environment; of a chunk, one action counts."""
        have, want = (self.obs.shape[1], self.action.shape[1]), (spec.obs_dim, spec.action_dim // spec.horizon)
        if have != want:
            raise UserError(
                f"dataset {self.name} has {have[0]} observations and {have[1]} actions, {env} has {want[0]} and "
                f"{want[1]}: choose the environment that it was recorded in{f' ({self.env})' if self.env else ''}"
            )


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
    """A dataset from flat arrays obs [n, o], action [n, a] in [low, high], reward [n], next_obs, terminated and end.

    Bounds that are not stated become the range of the data. `clip` takes actions outside the bounds for what most
    environments take them for. Raises UserError for arrays that do not fit together, are empty or not finite, mark no
    end, or for actions outside the bounds without `clip`.
    """
    said = list(notes)
    rows = _checked(name, arrays)
    if not rows["end"].any():
        raise UserError(f"dataset {name} marks no end of a trajectory in {len(rows['end'])} rows: add them")
    if not rows["end"][-1]:
        said.append("the last trajectory is cut off: its end counts as truncation")
        rows["end"] = np.concatenate([rows["end"][:-1], [True]])
    low, high = _bounds(name, rows["action"], low, high, said)
    unit = (rows["action"] - (low + high) / 2) / ((high - low) / 2)
    outside = (abs(unit) > 1 + ROUNDING).any(1)
    if outside.any():
        at, share = int(outside.argmax()), float(outside.mean())
        column = int(abs(unit[at]).argmax())
        where = f"column {column} of action is {rows['action'][at, column]:g} in row {at}"
        if not clip:
            raise UserError(
                f"dataset {name}: {where}, outside [{low[column]:g}, {high[column]:g}]: state the true low and high, "
                "or clip the actions"
            )
        said.append(f"{share:.1%} of the actions lay outside their bounds and were clipped ({where})")
    ends = np.flatnonzero(rows["end"])
    rows["last"] = ends[np.searchsorted(ends, np.arange(len(unit)))].astype(np.int32)
    rows["action"] = np.clip(unit, -1, 1).astype(np.float32)
    bounds = {"low": low.astype(np.float32), "high": high.astype(np.float32)}
    return Dataset(name=name, **rows, **bounds, env=env, notes=tuple(said))


def join(trajectories: Sequence[Mapping[str, Any]], *, name: str, **options: Any) -> Dataset:
    """`build` from single trajectories of T steps: action [T, a], reward [T], terminated [T], and obs [T+1, o], or
    obs and next_obs [T, o], or obs [T, o] alone, of which `unrecorded` makes the best; `options` as for `build`."""
    parts, lost = [], 0
    for i, trajectory in enumerate(trajectories):
        part = {key: np.asarray(value) for key, value in trajectory.items()}
        steps = len(part["action"])
        if len(part["obs"]) not in (steps, steps + 1):
            raise UserError(
                f"dataset {name}: trajectory {i} has {len(part['obs'])} observations and {steps} actions; it needs one "
                "observation more than actions, or as many"
            )
        part["end"] = np.arange(steps) == steps - 1
        if len(part["obs"]) == steps + 1:
            part["obs"], part["next_obs"] = part["obs"][:-1], part["obs"][1:]
        elif "next_obs" not in part:
            part = unrecorded(part)
            lost += steps - len(part["action"])
        parts.append(part)
    parts = [part for part in parts if len(part["action"])]
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
    notes = [*options.pop("notes", ()), *([dropped(lost)] if lost else [])]
    return build(flat, name=name, notes=notes, **options)


def unrecorded(rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows with `next_obs` by shift, where the source has no observation after the last step of a trajectory.

    Such a step is kept where it terminated, as nothing reads its successor then; otherwise it is left out, and the one
    before it ends the trajectory.
    """
    end, terminated = np.asarray(rows["end"], bool), np.asarray(rows["terminated"], bool)
    obs = rows["obs"]
    following = np.concatenate([obs[1:], obs[-1:]])
    following = np.where(end[:, None], obs, following)
    keep = ~end | terminated
    ends = end | np.concatenate([end[1:] & ~keep[1:], [False]])
    return {key: value[keep] for key, value in {**rows, "next_obs": following, "end": ends}.items()}


def dropped(count: int) -> str:
    """The note on rows that `unrecorded` left out."""
    return f"the last step of {count} trajectories has no recorded successor and was left out"


def _checked(name: str, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The six arrays in their types. Raises UserError for what does not fit together or is not finite."""
    kinds = {"obs": 2, "action": 2, "reward": 1, "next_obs": 2, "terminated": 1, "end": 1}
    rows, n = {}, len(arrays["action"])
    if n == 0:
        raise UserError(f"dataset {name} is empty: record at least one trajectory of two steps")
    for key, ndim in kinds.items():
        array = np.asarray(arrays[key])
        if array.dtype.kind not in "biuf":
            raise UserError(f"dataset {name}: {key} holds {array.dtype}, not numbers; convert it")
        if array.ndim != ndim:
            shape = "one number for each step" if ndim == 1 else "rows of numbers; images are not read"
            raise UserError(f"dataset {name}: {key} has shape {list(array.shape)}; it must be {shape}")
        if len(array) != n:
            raise UserError(f"dataset {name}: {key} has {len(array)} rows, action has {n}; each step needs one of both")
        rows[key] = array.astype(bool if key in ("terminated", "end") else np.float32, copy=False)
        bad = ~np.isfinite(rows[key])
        if bad.any():
            row, *column = (int(i) for i in np.argwhere(bad)[0])
            where = f"column {column[0]} of {key}" if column else key
            value = "NaN" if np.isnan(rows[key][row, *column]) else "infinite"
            raise UserError(f"dataset {name}: {where} is {value} in row {row}: repair or leave out its trajectory")
    if rows["obs"].shape != rows["next_obs"].shape:
        width = [rows[key].shape[1] for key in ("obs", "next_obs")]
        raise UserError(f"dataset {name}: obs has {width[0]} columns and next_obs {width[1]}; record both alike")
    return rows


def _bounds(name: str, action: np.ndarray, low: Any, high: Any, said: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Action bounds [a]; where none are stated, the range of the data, never narrower than rounding."""
    dim = action.shape[1]
    if low is not None and high is not None:
        low, high = (np.asarray(bound, np.float64).ravel() for bound in (low, high))
        low, high = (np.broadcast_to(bound, dim) if bound.size == 1 else bound for bound in (low, high))
        if low.shape != (dim,) or high.shape != (dim,):
            raise UserError(
                f"dataset {name}: the bounds have {low.size} and {high.size} numbers, actions {dim}; give one for each"
            )
        if np.isfinite(low).all() and np.isfinite(high).all():
            if not (low < high).all():
                raise UserError(f"dataset {name}: a lower action bound is not below the upper one; give the true ones")
            return low, high
    low, high = action.min(0).astype(np.float64), action.max(0).astype(np.float64)
    said.append("no action bounds are stated: the range of the data became [-1, 1]")
    constant = high - low <= 1e-6 * np.maximum(1.0, abs(low))
    return np.where(constant, low - 1, low), np.where(constant, high + 1, high)
