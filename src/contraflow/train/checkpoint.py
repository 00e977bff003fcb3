"""Checkpoints of a run: everything training changes, written whole or not at all (Orbax).

`OUT/checkpoints/<step>/` holds the learner (networks, optimisers, replay, counters) and, for jittable environments, the
environment. Orbax writes to a temporary folder and renames it, so a killed process leaves the previous checkpoint.
"""

import errno
from pathlib import Path
from typing import Any

import jax
import jax.random as jr
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from contraflow.types import UserError

KEEP = 2


def _manager(folder: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=KEEP, enable_async_checkpointing=False)
    return ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options)


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_saved(tree: PyTree) -> list[Any]:
    """Leaves in order, keys (of simulators that carry one) as their raw data."""
    return [jr.key_data(leaf) if _is_key(leaf) else leaf for leaf in jax.tree.leaves(tree)]


def save(folder: Path, step: int, tree: PyTree) -> None:
    """Write `tree` as the checkpoint of environment step `step`. Raises UserError when the disk is full."""
    try:
        with _manager(folder) as manager:
            manager.save(step, args=ocp.args.StandardSave(_to_saved(tree)), force=True)
    except Exception as error:
        if "No space left" in str(error) or getattr(error, "errno", None) == errno.ENOSPC:
            raise UserError(
                f"the disk is full: checkpoint {step} was not written to {folder}; free some space and run "
                f"`contraflow resume {folder}`"
            ) from None
        raise


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
