"""Checkpoints of a run: everything training changes, written whole or not at all (Orbax).

`OUT/checkpoints/<step>/` holds the learner (networks, optimisers, replay, counters) and, for jittable environments, the
environment. Orbax writes to a temporary folder and renames it, so a killed process leaves the previous checkpoint.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PyTree

from contraflow.types import UserError

KEEP = 2
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _manager(folder: Path) -> Any:
    import orbax.checkpoint as ocp  # here, because it takes as long to import as everything else together

    options = ocp.CheckpointManagerOptions(max_to_keep=KEEP, enable_async_checkpointing=False)
    return ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options)


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_saved(tree: PyTree) -> list[Any]:
    """Leaves in order, keys (of simulators that carry one) as their raw data."""
    return [jr.key_data(leaf) if _is_key(leaf) else leaf for leaf in jax.tree.leaves(tree)]


def save(folder: Path, step: int, tree: PyTree) -> None:
    """Write `tree` as the checkpoint of environment step `step`, if that is not there yet."""
    import orbax.checkpoint as ocp

    with _manager(folder) as manager:
        if step not in manager.all_steps():
            manager.save(step, args=ocp.args.StandardSave(_to_saved(tree)), force=True)


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
        raise UserError(
            f"the disk is full ({reasons[0].lower()}): what {folder} holds up to its last checkpoint is kept; free some "
            f"space and run `contraflow resume {folder}`"
        ) from None


def latest(folder: Path) -> int | None:
    """The step of the newest complete checkpoint, or None."""
    if not (folder / "checkpoints").is_dir():
        return None
    with _manager(folder) as manager:
        return manager.latest_step()


def load(folder: Path, step: int, like: PyTree) -> PyTree:
    """The checkpoint of `step` in the structure of `like` (arrays or shapes). Raises UserError if it does not fit."""
    leaves, structure = jax.tree.flatten(like)
    wanted = [
        jax.eval_shape(jr.key_data, leaf) if _is_key(leaf) else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for leaf in leaves
    ]
    import orbax.checkpoint as ocp

    try:
        with _manager(folder) as manager:
            saved = manager.restore(step, args=ocp.args.StandardRestore(wanted))
    except Exception as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise UserError(
            f"checkpoint {step} in {folder} cannot be read ({reason}); delete {folder / 'checkpoints' / str(step)} to fall "
            "back to the one before, or start the run again"
        ) from None
    for have, want in zip(saved, wanted, strict=True):
        if have.shape != want.shape or have.dtype != want.dtype:
            raise UserError(
                f"checkpoint {step} in {folder} holds an array of {have.shape} {have.dtype} where this run needs "
                f"{want.shape} {want.dtype}: it was written by another configuration; start a new run"
            )
    restored = [jr.wrap_key_data(have) if _is_key(leaf) else have for have, leaf in zip(saved, leaves, strict=True)]
    return jax.tree.unflatten(structure, restored)
