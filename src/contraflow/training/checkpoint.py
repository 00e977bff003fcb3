"""Checkpoints of a run: everything that training changes, by name, written atomically (Orbax).

`OUT/checkpoints/<step>/` holds the learner (networks, optimisers, replay, counters) and, for jittable environments, the
environment. Each array is stored under the path of its leaf, `learner/agent/critic/layers/0/weight`. A state with
reordered fields is therefore still read correctly, and one with renamed fields is refused. Orbax writes to a temporary
folder and renames it. `contents.json` is written last and makes the checkpoint complete. It holds names and shapes, the
settings, and digests that reveal later damage, because Orbax does not notice a flipped bit.
"""

import hashlib
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PyTree

from contraflow.core.errors import UserError
from contraflow.core.files import full_disk, read_json, write_json
from contraflow.core.settings import SCHEMA, first_difference

KEEP = 2
CONTENTS = "contents.json"
RENAMED: dict[str, str] = {}
"""Maps names of arrays in checkpoints of older releases to their present names."""


@contextmanager
def _manager(folder: Path) -> Iterator[Any]:
    """Yields Orbax's manager without its log: errors are raised, so its threads need not report them too."""
    import orbax.checkpoint as ocp  # imported here, because it takes as long as everything else together

    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    options = ocp.CheckpointManagerOptions(max_to_keep=KEEP, enable_async_checkpointing=False)
    try:
        with ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options) as manager:
            yield manager
    finally:
        logger.setLevel(level)


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves of a tree by their paths, `learner/agent/...`."""
    leaves = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert len(named) == len(leaves), "two leaves have one name"
    return named


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _signature(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}"


def save(folder: Path, step: int, tree: PyTree, about: dict[str, Any]) -> None:
    """Writes `tree` as the checkpoint of step `step`, unless it exists, with `about` (JSON) beside it.

    Raises UserError if the disk has no room for it.
    """
    import orbax.checkpoint as ocp

    if step in steps(folder):
        return
    # Keys (held by some simulators) are stored as raw data; empty arrays are left out, because Orbax refuses them.
    arrays = {n: jr.key_data(x) if _is_key(x) else x for n, x in named_leaves(tree).items() if x.size}
    at = _place(folder, step)
    shutil.rmtree(at, ignore_errors=True)  # left by a process that died while writing
    with _manager(folder) as manager:
        _check_room(folder, list(arrays.values()))
        manager.save(step, args=ocp.args.StandardSave(arrays), force=True)
    signatures = {name: _signature(x) for name, x in arrays.items()}
    write_json(at / CONTENTS, {"schema": SCHEMA, "arrays": signatures, "files": _digests(at)} | about)


def load(folder: Path, step: int, like: PyTree, about: dict[str, Any]) -> PyTree:
    """Returns the checkpoint of `step` in the structure of `like` (arrays or shapes).

    Raises UserError if it is damaged or does not fit; the message names the setting that differs from `about`.
    """
    contents = _contents(folder, step)
    wanted = {n: jax.eval_shape(jr.key_data, x) if _is_key(x) else x for n, x in named_leaves(like).items() if x.size}
    names: list[str] = list(contents["arrays"])
    stored = {RENAMED.get(name, name): name for name in names}
    _check_fit(folder, step, contents, wanted, stored, about)
    digests = _digests(_place(folder, step))
    for name, digest in contents["files"].items():
        if digests.get(name) != digest:
            raise _unreadable(folder, step, f"{name} is {'damaged' if name in digests else 'missing'}")
    import orbax.checkpoint as ocp

    shapes = {stored[name]: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in wanted.items()}
    try:
        with _manager(folder) as manager:
            saved = manager.restore(step, args=ocp.args.StandardRestore(shapes))
    except Exception as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise _unreadable(folder, step, reason) from None

    def restored(name: str, leaf: Any) -> Any:
        if not leaf.size:
            return jnp.zeros(leaf.shape, leaf.dtype)
        return jr.wrap_key_data(saved[stored[name]]) if _is_key(leaf) else saved[stored[name]]

    return jax.tree.unflatten(jax.tree.structure(like), [restored(*item) for item in named_leaves(like).items()])


def latest(folder: Path) -> int | None:
    """Returns the step of the newest complete checkpoint, or None."""
    return max(steps(folder), default=None)


def steps(folder: Path) -> list[int]:
    """Returns the steps of the complete checkpoints, in order. Raises UserError for those of the first release.

    It looks at file names only. Opening Orbax would start JAX and claim a GPU in processes that only supervise others.
    """
    places = [p for p in (folder / "checkpoints").glob("*") if p.is_dir() and p.name.isdecimal()]
    for place in places:
        if (place / "seal.json").exists():
            raise UserError(
                f"the checkpoints in {folder} are of an older release, which stored arrays without names: continue the "
                "run with that release, or start a new one"
            )
    return sorted(int(place.name) for place in places if (place / CONTENTS).exists())


def _place(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / str(step)


def _contents(folder: Path, step: int) -> dict[str, Any]:
    try:
        contents = read_json(_place(folder, step) / CONTENTS)
        newer = contents["schema"] > SCHEMA
        if newer or not (isinstance(contents["arrays"], dict) and isinstance(contents["files"], dict)):
            raise ValueError
    except (UserError, ValueError, KeyError, TypeError):
        raise _unreadable(folder, step, f"{CONTENTS} is damaged, or of a newer release") from None
    return contents


def _check_fit(
    folder: Path, step: int, contents: Any, wanted: dict[str, Any], stored: dict[str, str], about: dict[str, Any]
) -> None:
    """Raises UserError for a checkpoint from other data, other settings or another version of the code."""
    if contents.get("data") != about.get("data"):
        raise UserError(
            f"the dataset or frozen policy of {folder} is not the one that checkpoint {step} was trained with: restore "
            "it, or start a new run"
        )
    have = {name: contents["arrays"][old] for name, old in stored.items()}
    want = {name: _signature(x) for name, x in wanted.items()}
    if have == want:
        return
    name = next(n for n in (*want, *have) if have.get(n) != want.get(n))
    if name not in have:
        what = f"lacks {name}"
    elif name not in want:
        what = f"holds {name}, which this run does not have"
    else:
        what = f"holds {name} as {have[name]} where this run needs {want[name]}"
    changed = first_difference(contents.get("settings"), about.get("settings"))
    why = f"; {changed[0]} was {changed[1]} and is {changed[2]}" if changed else "; it is from another version"
    raise UserError(f"checkpoint {step} in {folder} does not fit: it {what}{why}: start a new run")


def _digests(at: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(at.rglob("*")):
        if path.is_file() and path.name != CONTENTS:
            with path.open("rb") as file:
                digests[path.relative_to(at).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _unreadable(folder: Path, step: int, reason: str) -> UserError:
    return UserError(
        f"checkpoint {step} in {folder} cannot be read ({reason}); delete {_place(folder, step)} to fall back to the "
        "one before, or start the run again"
    )


def _check_room(folder: Path, arrays: list[Any]) -> None:
    """Raises UserError before writing if the disk has no room, rather than failing in the middle."""
    usage, needed = shutil.disk_usage(folder), sum(x.nbytes for x in arrays) + 2**20
    if usage.total > 0 and usage.free < needed:
        raise full_disk(folder, f"a checkpoint takes up to {needed / 1e6:,.0f} MB, {usage.free / 1e6:,.0f} MB are free")
