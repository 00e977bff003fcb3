"""A dataset to disk: Minari's folders, or plain arrays."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from contraflow.core.flatten import leaf_names, ordered_leaves
from contraflow.core.types import UserError
from contraflow.data.datasets import minari
from contraflow.data.datasets.dataset import Dataset


def check_target(target: str | Path) -> Path:
    """Where a new dataset will be written. Raises UserError when that exists already or Minari is missing."""
    place = minari.root() / target if minari.is_id(target) else Path(target)
    if place.exists():
        raise UserError(f"{place} already exists; choose another name for the dataset")
    if place.suffix != ".npz":
        minari.package()
    return place


def write(data: Dataset, target: str | Path, kind: str = "hdf5", algorithm: str | None = None) -> Path:
    """Write a dataset whole or not at all; returns where: a Minari id in Minari's folder, or the path.

    `kind` is Minari's data format; a path that ends in .npz takes plain arrays instead, and no package. Minari keeps
    one observation more than steps: the successor within a trajectory must be the next row, and the last be known.
    Bounds that are not stated are not written.
    """
    place = check_target(target)
    npz = place.suffix == ".npz"
    if not npz and not data.known.all():
        raise UserError(
            f"dataset {data.name} lacks the successor of {int((~data.known).sum())} steps, which Minari's formats "
            "need: write it as .npz"
        )
    if not npz and data.human is not None:
        raise UserError(
            f"dataset {data.name} says where a person took over, which Minari's formats cannot: write it as .npz"
        )
    if not npz and not isinstance(data.observation, int):
        raise UserError(f"dataset {data.name} has images, which are not written in Minari's formats: write it as .npz")
    try:
        return _write_npz(data, place) if npz else _write_minari(data, target, place, kind, algorithm)
    except OSError as error:
        raise UserError(f"{place} cannot be written ({error}); choose another place") from None


def _write_minari(data: Dataset, target: str | Path, place: Path, kind: str, algorithm: str | None) -> Path:
    id = str(target) if minari.is_id(target) else f"{re.sub('[^A-Za-z0-9]', '-', place.stem).strip('-') or 'data'}-v0"
    with minari.staging(minari.root() if minari.is_id(target) else place.parent) as (stage, package):
        from gymnasium.spaces import Box

        low, high = (data.low, data.high) if data.stated else (0 * data.low - np.inf, 0 * data.high + np.inf)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it misses an author and a permalink
            package.create_dataset_from_buffers(
                id,
                _episodes(data),
                observation_space=Box(-np.inf, np.inf, (data.obs.shape[1],), np.float32),
                action_space=Box(low, high, dtype=np.float32),
                algorithm_name=algorithm,
                data_format=kind,
                jpeg_encoding=False,
            )
        file = stage / id / "data" / "metadata.json"
        meta = json.loads(file.read_text()) | {minari.ENV: data.env, minari.NOTES: list(data.notes)}
        file.write_text(json.dumps(meta))
        if minari.is_id(target):
            minari.group(stage)
        return minari.move(stage, id, place)


def _episodes(data: Dataset) -> list[Any]:
    from minari.data_collector import EpisodeBuffer

    episodes, action, truncated = [], data.raw_action, data.end & ~data.terminated
    for start, length in zip(data.starts, data.lengths, strict=True):
        part: Any = slice(start, start + length)
        fields: dict[str, Any] = {
            "observations": np.concatenate([data.obs[part], data.next_obs[part][-1:]]),
            "actions": action[part],
            "rewards": data.reward[part],
            "terminations": data.terminated[part],
            "truncations": truncated[part],
        }
        episodes.append(EpisodeBuffer(**fields))
    return episodes


def _write_npz(data: Dataset, place: Path) -> Path:
    keys = (*data.recorded, "low", "high") if data.stated else data.recorded
    arrays: dict[str, Any] = {}
    for key in keys:
        leaves = zip(leaf_names(getattr(data, key)), ordered_leaves(getattr(data, key)), strict=False)
        arrays |= {f"{key}/{name}": leaf for name, leaf in leaves} or {key: getattr(data, key)}
    arrays |= {"action": data.raw_action, "notes": np.array(data.notes, str)}
    if data.env:
        arrays["env"] = np.array(data.env)
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
        return temporary.rename(place)
    finally:
        temporary.unlink(missing_ok=True)
