"""Checkpoints of a run: everything training changes, written whole or not at all (Orbax).

`OUT/checkpoints/<step>/` holds the learner (networks, optimisers, replay, counters) and, for jittable environments, the
environment. Orbax writes to a temporary folder and renames it, so a killed process leaves the previous checkpoint.
Digests written after that show later damage.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PyTree

from contraflow.core.types import UserError

KEEP = 2
SEAL = "seal.json"  # digests of the files and shapes of the arrays of a checkpoint
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def _manager(folder: Path) -> Iterator[Any]:
    """Orbax without its log: what goes wrong is raised, its threads need not tell of it as well."""
    import orbax.checkpoint as ocp  # here, because it takes as long to import as everything else together

    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    options = ocp.CheckpointManagerOptions(max_to_keep=KEEP, enable_async_checkpointing=False)
    try:
        with ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options) as manager:
            yield manager
    finally:
        logger.setLevel(level)


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_saved(tree: PyTree) -> list[Any]:
    """Leaves in order, keys (of simulators that carry one) as their raw data, without the empty arrays of simulators,
    which Orbax refuses."""
    return [jr.key_data(leaf) if _is_key(leaf) else leaf for leaf in jax.tree.leaves(tree) if leaf.size]


def save(folder: Path, step: int, tree: PyTree) -> None:
    """Write `tree` as the checkpoint of environment step `step`, if that is not there yet."""
    import orbax.checkpoint as ocp

    saved = _to_saved(tree)
    with _manager(folder) as manager:
        if step in manager.all_steps():
            return
        _check_room(folder, saved)
        manager.save(step, args=ocp.args.StandardSave(saved), force=True)
    at = _place(folder, step)
    seal = {"arrays": [_signature(x) for x in saved], "files": _digests(at)}
    (at / SEAL).write_text(json.dumps(seal, indent=1))


def _place(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / str(step)


def _signature(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}"


def _digests(at: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(at.rglob("*")):
        if path.is_file() and path.name != SEAL:
            with path.open("rb") as file:
                digests[path.relative_to(at).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _check_seal(folder: Path, step: int, wanted: list[Any]) -> None:
    """Refuse a checkpoint that is damaged, or not this run's, before Orbax opens it.

    Orbax reports such failures from threads of its own, long after. A checkpoint without a seal (the process died
    between the two) is left to it all the same.
    """
    at = _place(folder, step)
    if not (at / SEAL).exists():
        return
    try:
        seal = json.loads((at / SEAL).read_text())
        have, files = list(seal["arrays"]), dict(seal["files"])
    except (ValueError, KeyError, TypeError):
        raise _unreadable(folder, step, f"{SEAL} is damaged") from None
    digests = _digests(at)
    for name, digest in files.items():
        if digests.get(name) != digest:
            raise _unreadable(folder, step, f"{name} is {'damaged' if name in digests else 'missing'}")
    want = [_signature(x) for x in wanted]
    if have != want:
        pairs = [f"{h} where this run needs {w}" for h, w in zip(have, want, strict=False) if h != w]
        raise UserError(
            f"checkpoint {step} in {folder} was written by another configuration (it holds "
            f"{pairs[0] if pairs else f'{len(have)} arrays where this run needs {len(want)}'}): start a new run"
        )


def _unreadable(folder: Path, step: int, reason: str) -> UserError:
    return UserError(
        f"checkpoint {step} in {folder} cannot be read ({reason}); delete {_place(folder, step)} to fall back to the "
        "one before, or start the run again"
    )


def _check_room(folder: Path, arrays: list[Any]) -> None:
    """Refuse to begin what the disk cannot hold, rather than to break off in the middle."""
    usage, needed = shutil.disk_usage(folder), sum(x.nbytes for x in arrays) + 2**20
    if usage.total > 0 and usage.free < needed:
        raise _full(folder, f"a checkpoint takes up to {needed / 1e6:,.0f} MB, {usage.free / 1e6:,.0f} MB are free")


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Turn what comes of a full disk (or quota, or file limit), by whatever library, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reasons = [os.strerror(n) for n in FULL if getattr(error, "errno", None) == n or os.strerror(n) in str(error)]
        if not reasons:
            raise
        raise _full(folder, reasons[0].lower()) from None


def _full(folder: Path, reason: str) -> UserError:
    return UserError(
        f"the disk is full ({reason}): what {folder} holds up to its last checkpoint is kept; free some space and run "
        f"`contraflow resume {folder}`"
    )


def latest(folder: Path) -> int | None:
    """The step of the newest complete checkpoint, or None."""
    return max(steps(folder), default=None)


def steps(folder: Path) -> list[int]:
    """The steps of the complete checkpoints that are kept, in order."""
    # By their names, which incomplete ones do not have yet: opening Orbax would start JAX, and with it claim a GPU, in
    # processes that only look after others.
    places = (folder / "checkpoints").glob("*")
    return sorted(int(place.name) for place in places if place.is_dir() and place.name.isdecimal())


def load(folder: Path, step: int, like: PyTree) -> PyTree:
    """The checkpoint of `step` in the structure of `like` (arrays or shapes). Raises UserError if it does not fit."""
    leaves, structure = jax.tree.flatten(like)
    wanted = [
        jax.eval_shape(jr.key_data, leaf) if _is_key(leaf) else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for leaf in leaves
        if leaf.size
    ]
    _check_seal(folder, step, wanted)
    import orbax.checkpoint as ocp

    try:
        with _manager(folder) as manager:
            saved = manager.restore(step, args=ocp.args.StandardRestore(wanted))
    except Exception as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise _unreadable(folder, step, reason) from None
    arrays = iter(saved)
    restored = [next(arrays) if leaf.size else jnp.zeros(leaf.shape, leaf.dtype) for leaf in leaves]
    restored = [jr.wrap_key_data(have) if _is_key(leaf) else have for have, leaf in zip(restored, leaves, strict=True)]
    return jax.tree.unflatten(structure, restored)
