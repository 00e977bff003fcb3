"""What a dataset may lie in: Minari (HDF5, Arrow, Parquet), OGBench and D4RL arrays, LeRobot, plain `.npz`.

The files are read directly; a package is imported only where its format needs one.
"""

import json
import re
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np

from contraflow.core.ogbench import PREFIX, single_task
from contraflow.core.types import UserError
from contraflow.data.datasets import minari
from contraflow.data.datasets.dataset import Dataset, build, columns, join, same_length, unrecorded

Timing = Literal["pre", "post"]
ALIASES = {
    "observations": "obs",
    "actions": "action",
    "rewards": "reward",
    "next_observations": "next_obs",
    "terminations": "terminated",
    "truncations": "truncated",
}
KNOWN = "a Minari folder or id, a LeRobot folder, or .npz arrays (obs, action, reward, terminated, truncated)"


def load(
    source: str | Path,
    *,
    success: Timing = "pre",
    task: str | None = None,
    low: Any = None,
    high: Any = None,
    clip: bool = False,
    download: bool = True,
) -> Dataset:
    """The dataset in a file or folder, or the Minari dataset of that id; one that is not here is downloaded.

    - `task`: single task of OGBench, such as cube-single-play-singletask-task2-v0, that rewards a file without rewards.
    - `success`, for OGBench files without next_observations: whether a step is rewarded for the state it starts from
      (`pre`, OGBench since 1.2) or leads to (`post`).
    - `low`, `high`: action bounds in place of those that the source states, where they are not empty; `clip`: clip
      actions to the bounds.

    Raises UserError for a source that is not there, not known, incomplete, or does not make a dataset.
    """
    path = Path(source)
    bounds: dict[str, Any] = {"low": low, "high": high, "clip": clip}
    bounds = {key: value for key, value in bounds.items() if value is not None and np.size(value)}
    npz = path.suffix == ".npz"
    if (success != "pre" or task) and not npz:
        raise UserError(f"{source} is no OGBench file: success timing and task are for .npz files of OGBench")
    if npz and path.is_file():
        return from_arrays(_read_npz(path), name=path.stem, success=success, task=task, **bounds)
    if (path / "meta" / "info.json").is_file():
        return _lerobot(path, bounds)
    folder = minari.find(source)
    if folder is None and not path.exists() and download and minari.is_id(source):
        folder = minari.download(str(source))
    if folder is not None:
        parts, options = minari.read(folder)
        return join(parts, **{**options, **bounds})
    if path.exists():
        raise UserError(f"{source} is no dataset that is known: give {KNOWN}")
    raise UserError(f"there is no dataset {source}: give {KNOWN}")


def needs_task(source: str | Path) -> bool:
    """Whether this is a file of OGBench without rewards."""
    path = Path(source)
    if path.suffix != ".npz" or not path.is_file():
        return False
    with suppress(ValueError, OSError, EOFError, zipfile.BadZipFile), np.load(path) as file:
        return {"terminals", "qpos"} <= set(file.files) and "rewards" not in file.files
    return False


def from_arrays(
    arrays: Mapping[str, Any],
    *,
    name: str = "arrays",
    success: Timing = "pre",
    task: str | None = None,
    low: Any = None,
    high: Any = None,
    clip: bool = False,
    env: str | None = None,
) -> Dataset:
    """The dataset in flat arrays, trajectory after trajectory; the names may be those of Minari, OGBench or D4RL.

    Ends are `end`, or `terminated` and `truncated`, or D4RL's `terminals` and `timeouts`, or OGBench's `terminals`
    (ends of trajectories) and `masks` (0 where the value ends). Without next_obs, it is the following row of obs, where
    there is one. Arguments and errors as for `load`.
    """
    rows: dict[str, Any] = {}
    for key, value in arrays.items():
        key, slash, part = key.partition("/")
        at = rows.setdefault(ALIASES.get(key, key), {}) if slash else rows  # obs/image is a part of obs
        at[part if slash else ALIASES.get(key, key)] = value
    for key in ("obs", "action"):
        if key not in rows:
            raise UserError(
                f"dataset {name} has {', '.join(sorted(arrays)) or 'no arrays'}, but no {key}: give {KNOWN}"
            )
    rows = columns(name, rows)
    same_length(name, rows)
    low, high = (rows.get(key) if bound is None else bound for key, bound in (("low", low), ("high", high)))
    env = str(rows["env"]) if env is None and "env" in rows else env
    notes = [str(note) for note in rows.get("notes", ())]
    ogbench = "terminals" in rows and "timeouts" not in rows
    if not ogbench and (success != "pre" or task):
        raise UserError(f"dataset {name} has no OGBench `terminals`: success timing and task are for files of OGBench")
    if ogbench and low is None and high is None:
        low, high = -1.0, 1.0  # of all its environments with continuous actions
    if task:
        task = single_task(task) or task
        rows |= _relabelled(rows, task)
        env = PREFIX + task
    if "timeouts" in rows and "terminals" in rows:
        rows |= {"terminated": rows["terminals"], "truncated": rows["timeouts"]}
    rows = _ogbench(rows, name, success, notes) if ogbench else _plain(rows, name, notes)
    return build(rows, name=name, env=env, low=low, high=high, clip=clip, notes=notes)


def _plain(rows: dict[str, Any], name: str, notes: list[str]) -> dict[str, Any]:
    if "terminated" not in rows or not {"end", "truncated"} & rows.keys():
        raise UserError(
            f"dataset {name} does not say where trajectories end: add `terminated`, and `truncated` or `end`"
        )
    terminated = rows["terminated"].astype(bool)
    end = rows["end"].astype(bool) if "end" in rows else terminated | rows["truncated"].astype(bool)
    rows = _rewarded(rows, notes) | {"terminated": terminated, "end": end}
    return rows if "next_obs" in rows else unrecorded(rows)


def _ogbench(rows: dict[str, Any], name: str, success: Timing, notes: list[str]) -> dict[str, Any]:
    """With next_observations, or with a row for each state, of which the last of a trajectory is no step."""
    if "reward" in rows and "masks" not in rows:
        raise UserError(
            f"dataset {name}: `terminals` may end a trajectory or the value; add OGBench's `masks` or D4RL's `timeouts`"
        )
    rows = _rewarded(rows, notes)
    end = rows["terminals"].astype(bool)
    over = rows["masks"] == 0 if "masks" in rows else np.zeros(len(end), bool)
    if "masks" not in rows:
        notes.append("no masks are recorded: nothing terminates")
    if "next_obs" in rows:
        if success == "post":
            raise UserError(f"dataset {name} has its timing built in: post needs the file without next_observations")
        return rows | {"terminated": over, "end": end}
    if not end.any():
        raise UserError(f"dataset {name} marks no end of a trajectory in {len(end)} rows: add them to `terminals`")
    steps = np.flatnonzero(~end[:-1])
    at = steps + (success == "post")
    return {
        "obs": rows["obs"][steps],
        "next_obs": rows["obs"][steps + 1],
        "action": rows["action"][steps],
        "reward": rows["reward"][at],
        "terminated": over[at],
        "end": end[steps + 1],
    }


def _rewarded(rows: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    if "reward" in rows:
        return rows
    notes.append("no rewards are recorded: all are 0")
    return rows | {"reward": np.zeros(len(rows["action"]), np.float32)}


def _relabelled(rows: dict[str, Any], task: str) -> dict[str, Any]:
    """Rewards and masks of every state under a single-task id of OGBench."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # dm_control looks for a display
            import gymnasium
            import ogbench  # noqa: F401 - registers its environments
            from ogbench.relabel_utils import relabel_dataset
    except ImportError as error:
        raise UserError(f'rewards of {task} need OGBench ({error}): pip install "contraflow[ogbench]"') from None
    if "qpos" not in rows:
        raise UserError(f"rewards of {task} need the array qpos: use the file of OGBench as it was published")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Gymnasium's about float64 bounds
            env = gymnasium.make(task)
            relabel_dataset(task, env, rows)
            env.close()
    except (gymnasium.error.Error, AssertionError, KeyError) as error:
        raise UserError(
            f"{task} is no single-task id of OGBench ({error}): like cube-single-singletask-task1-v0"
        ) from None
    return {"reward": rows["rewards"], "masks": rows["masks"]}


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged or no array file ({error}); write it with numpy.savez") from None


def _lerobot(path: Path, bounds: dict[str, Any]) -> Dataset:
    """Columns observation.state, observation.environment_state if any, and action of a LeRobot folder (v2, v3).

    `next.done` counts as termination. There is no observation after the last step of an episode.
    """
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f'{path} needs pyarrow: pip install "contraflow[offline]"') from None
    try:
        info = json.loads((path / "meta" / "info.json").read_text())
        table = pyarrow.concat_tables([parquet.read_table(file) for file in sorted((path / "data").rglob("*.parquet"))])
    except (ValueError, OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} is incomplete or damaged ({error}); download or record it again") from None
    missing = {"observation.state", "action", "episode_index"} - set(table.column_names)
    if missing:
        found = ", ".join(name for name in table.column_names if re.search("observation|action|index", name))
        raise UserError(
            f"{path} has no column {min(missing)} (it has {found}): its features must be states and actions"
        )
    if table.num_rows != info.get("total_frames", table.num_rows):
        raise UserError(
            f"{path} holds {table.num_rows} of the {info['total_frames']} frames that it states: download it again"
        )
    order = "frame_index" if "frame_index" in table.column_names else "index"
    table = table.sort_by([("episode_index", "ascending"), (order, "ascending")])

    compute: Any = pyarrow.compute  # made when it is imported

    def column(name: str) -> np.ndarray:
        """[n, k]; k = 1 for a number in each row, or a list of one."""
        values, missing = table[name].combine_chunks(), table[name].null_count
        while hasattr(values, "flatten") and hasattr(values.type, "value_type") and not missing:
            if len(compute.list_value_length(values).unique()) > 1:
                raise UserError(f"{path} has lists of different lengths in {name}; repair or leave out their episodes")
            values = values.flatten()
            missing = values.null_count
        if missing:
            raise UserError(f"{path} has empty entries in {name}; repair or leave out their episodes")
        return values.to_numpy(zero_copy_only=False).reshape(table.num_rows, -1)

    features = info.get("features", {})
    pictures = [name for name, feature in features.items() if feature.get("dtype") in ("video", "image")]
    notes = [f"{', '.join(pictures)} of LeRobot are not read: observations are the states alone"] if pictures else []
    states = ["observation.state", "observation.environment_state"]
    rows = {"action": column("action")}
    rows["obs"] = np.concatenate([column(name) for name in states if name in table.column_names], axis=1)
    for key, name in (("reward", "next.reward"), ("terminated", "next.done")):
        if name in table.column_names:
            rows[key] = column(name)
    rows = _rewarded(rows, notes)
    if "terminated" not in rows:
        notes.append("no next.done is recorded: nothing terminates")
        rows["terminated"] = np.zeros(table.num_rows, bool)
    breaks = np.flatnonzero(np.diff(column("episode_index")[:, 0])) + 1
    split = {key: np.split(value, breaks) for key, value in rows.items()}
    parts = [{key: split[key][i] for key in split} for i in range(len(breaks) + 1)]
    return join(parts, name=path.name, notes=notes, **bounds)
