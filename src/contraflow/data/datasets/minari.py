"""Minari's datasets on disk. Reading takes h5py or pyarrow; only writing and downloading take Minari itself."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from contraflow.core.flatten import ordered_leaves
from contraflow.core.types import UserError

ENV, NOTES = "contraflow_env", "contraflow_notes"
FORMATS = ("hdf5", "arrow", "parquet")
ROOT = "MINARI_DATASETS_PATH"  # the variable that Minari reads


def is_id(source: str | Path) -> bool:
    """Whether `source` has the form of a Minari id, such as D4RL/door/human-v2; "./" before it makes it a path."""
    return re.fullmatch(r"[-\w]+(/[-\w]+)*-v\d+", str(source)) is not None


def root() -> Path:
    """Where Minari keeps datasets on this machine."""
    return Path(os.environ.get(ROOT) or Path.home() / ".minari" / "datasets")


def find(source: str | Path) -> Path | None:
    """The folder with metadata.json of a dataset: given by the folder itself, the one above it, or the id."""
    places = [Path(source), Path(source) / "data"]
    if is_id(source):
        places.append(root() / source / "data")
    for place in places:
        try:
            if "data_format" in json.loads((place / "metadata.json").read_text()):
                return place
        except (OSError, ValueError):
            continue
    return None


def read(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The episodes of the dataset in `folder`, and the options of `join` that its metadata state."""
    meta = json.loads((folder / "metadata.json").read_text())
    name = meta.get("dataset_id") or folder.parent.name
    if meta["data_format"] not in FORMATS:
        raise UserError(f"dataset {name} has the format {meta['data_format']}; only {', '.join(FORMATS)} are read")
    try:
        observation, action = (json.loads(meta.get(f"{key}_space") or "null") for key in ("observation", "action"))
        _check_spaces(name, observation, action)
        reader = _read_hdf5 if meta["data_format"] == FORMATS[0] else partial(_read_arrow, kind=meta["data_format"])
        parts, open_ends = [], 0
        for i, episode in enumerate(reader(folder)):
            missing = {"observations", "actions", "rewards", "terminations", "truncations"} - episode.keys()
            if missing:
                raise UserError(f"dataset {name}: episode {i} has no {min(missing)}; record it with all of them")
            part = {"reward": episode["rewards"], "terminated": episode["terminations"]}
            part |= {"obs": _flat(episode["observations"], observation), "action": _flat(episode["actions"], action)}
            parts.append(part)
            open_ends += not (np.any(episode["terminations"]) or np.any(episode["truncations"]))
    except ImportError as error:
        raise UserError(f'dataset {name} cannot be read ({error}): pip install "contraflow[offline]"') from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"dataset {name} is damaged or of another schema ({error}); create it again") from None
    found = sum(len(part["action"]) for part in parts)
    if len(parts) != meta.get("total_episodes", len(parts)) or found != meta.get("total_steps", found):
        raise UserError(
            f"dataset {name} holds {found} steps in {len(parts)} episodes, its metadata state {meta['total_steps']} "
            f"in {meta['total_episodes']}: download or record it again"
        )
    notes = list(meta.get(NOTES, ()))
    if open_ends:
        notes.append(f"{open_ends} trajectories are marked neither terminated nor truncated: they count as truncated")
    bounds = {key: np.ravel(action[key]) for key in ("low", "high") if action and key in action}
    return parts, {"name": name, "env": meta.get(ENV) or _env(meta), "notes": notes, **bounds}


def _env(meta: dict[str, Any]) -> str | None:
    """The id of a Gymnasium environment, where nothing but the id is needed to make it."""
    spec = json.loads(meta.get("env_spec") or "null") or {}
    plain = spec.get("id") and not spec.get("kwargs") and not spec.get("additional_wrappers")
    return f"gym:{spec['id']}" if plain else None


def _check_spaces(name: str, observation: Any, action: Any) -> None:
    if action is not None and action["type"] != "Box":
        raise UserError(f"dataset {name} has {action['type']} actions; only continuous (Box) ones can be learnt from")
    parts = [observation] if observation else []
    while parts:
        space = parts.pop()
        inner = space.get("subspaces", {})
        parts += inner.values() if isinstance(inner, dict) else inner
        if space["type"] not in ("Box", "MultiBinary", "Dict", "Tuple"):
            raise UserError(f"dataset {name} has {space['type']} observations; numeric arrays (Box) are needed")
        if space.get("dtype") == "uint8" and len(space["shape"]) > 1:
            raise UserError(f"dataset {name} has images, which are not read; use the one with states")


def _flat(tree: Any, space: Any) -> np.ndarray:
    """[T, d]: the parts in the order of the environments."""
    leaves = [np.asarray(leaf) for leaf in ordered_leaves(_observed(tree, space or {}))]
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


def _observed(tree: Any, space: Mapping[str, Any]) -> Any:
    """What a file holds as a value of its space: entries of a tuple lie in a dict, as _index_0 (HDF5) or 0 (Arrow)."""
    if not isinstance(tree, dict):
        return tree
    parts = space.get("subspaces")
    if parts is None:  # no space is stated
        parts = [{}] * len(tree) if all(key.startswith("_index_") for key in tree) else {key: {} for key in tree}
    if isinstance(parts, list):
        order = sorted(tree, key=lambda key: int(key.removeprefix("_index_")))
        return tuple(_observed(tree[key], part) for key, part in zip(order, parts, strict=True))
    return {key: _observed(tree[key], part) for key, part in parts.items()}


def _read_hdf5(folder: Path) -> list[dict[str, Any]]:
    import h5py

    def tree(node: Any) -> Any:
        return node[()] if isinstance(node, h5py.Dataset) else {key: tree(node[key]) for key in node}

    with h5py.File(folder / "main_data.hdf5", "r") as file:
        order = sorted(map(str, file), key=lambda key: int(key.removeprefix("episode_")))
        groups: list[Any] = [file[key] for key in order]
        return [{key: tree(group[key]) for key in group if key != "infos"} for group in groups]


def _read_arrow(folder: Path, kind: str) -> list[dict[str, Any]]:
    """One folder for each episode; a row more than steps, for the last observation."""
    import pyarrow
    import pyarrow.dataset

    def tree(column: Any) -> Any:
        kind: Any = column.type
        if pyarrow.types.is_struct(kind):
            return {field.name: tree(column.field(i)) for i, field in enumerate(kind)}
        if pyarrow.types.is_fixed_size_list(kind):
            return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
        return column.to_numpy(zero_copy_only=False)

    episodes = []
    for place in sorted((p for p in folder.iterdir() if p.name.isdecimal()), key=lambda p: int(p.name)):
        files = sorted(str(file) for file in place.glob(f"*.{kind}"))
        table = pyarrow.dataset.dataset(files, format=kind).to_table().combine_chunks()
        columns = {name: tree(table[name].combine_chunks()) for name in table.column_names if name != "infos"}
        steps = slice(None, table.num_rows - 1)
        episodes.append({key: value if key == "observations" else _cut(value, steps) for key, value in columns.items()})
    return episodes


def _cut(tree: Any, steps: slice) -> Any:
    return {key: _cut(value, steps) for key, value in tree.items()} if isinstance(tree, dict) else tree[steps]


def download(id: str) -> Path:
    """Fetch the dataset `id` whole or not at all; returns its folder. Raises UserError when it cannot be fetched."""
    with staging(root()) as (stage, minari):
        try:
            minari.download_dataset(id)
            if find(stage / id) is None:
                raise OSError("nothing arrived")
        except Exception as error:  # network, remote, version, a missing client: whatever the transport raises
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise UserError(
                f"there is no dataset {id} here and it could not be downloaded ({reason}): check the id and the "
                "network, or copy it to this machine and give its folder"
            ) from None
        group(stage)
        return move(stage, id, stage.parent / id) / "data"


@contextmanager
def staging(top: Path) -> Iterator[tuple[Path, Any]]:
    """(folder, Minari): an empty folder in `top` that Minari takes for its own; gone afterwards."""
    minari = package()
    top.mkdir(parents=True, exist_ok=True)
    stage, before = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=top.resolve())), os.environ.get(ROOT)
    os.environ[ROOT] = str(stage)
    try:
        yield stage, minari
    finally:
        os.environ.pop(ROOT) if before is None else os.environ.update({ROOT: before})
        shutil.rmtree(stage, ignore_errors=True)


def move(stage: Path, id: str, place: Path) -> Path:
    """Put the staged dataset in its place."""
    place.parent.mkdir(parents=True, exist_ok=True)
    return (stage / id).rename(place)


def group(stage: Path) -> None:
    """Copy the files by which Minari knows a group of datasets, where it has none yet."""
    for file in stage.rglob("namespace_metadata.json"):
        copy = stage.parent / file.relative_to(stage)
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)


def package() -> Any:
    try:
        import h5py  # noqa: F401 - what Minari writes with
        import minari
        import PIL  # noqa: F401 - Minari imports it without requiring it
    except ImportError as error:
        raise UserError(f'Minari datasets need more packages ({error}): pip install "contraflow[offline]"') from None
    return minari
