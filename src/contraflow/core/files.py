"""Atomic file writes, folders locked by one process, and messages for a full disk."""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from contraflow.core.errors import UserError

LOCK = ".lock"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which replaces `path` at the end.

    A reader, or a crash, sees either the old file or the whole new one. After an exception `path` is unchanged.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # otherwise a power cut could leave the new name without content
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path` atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Writes `data` as JSON to `path` atomically."""
    write_text(path, json.dumps(data, indent=1))


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file. Raises UserError if it cannot be read or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise UserError(f"{path} is not valid JSON: {error}") from None


def make_folder(folder: Path, flag: str = "--out") -> list[Path]:
    """Creates `folder` and its parents, and returns those that did not exist, from the top down.

    Raises UserError, naming the `flag` that gave the folder, if it cannot be created.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be created ({error.strerror or error}): choose another {flag}") from None
    return missing[::-1]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks `folder` for this process. Raises UserError, naming the process that holds the lock, if there is one."""
    path = folder / LOCK
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            file.close()
            raise UserError(
                f"another process (pid {owner}) is using {folder}: wait for it to end, or stop it"
            ) from None
        if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            break
        file.close()  # removed by its last owner between the two calls
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Turns the errors that any library raises on a full disk (or quota, or file limit) into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Libraries written in C++ keep the system's message but lose the error number.
        reasons = [os.strerror(n) for n in FULL if getattr(error, "errno", None) == n or os.strerror(n) in str(error)]
        if not reasons:
            raise
        raise full_disk(folder, reasons[0].lower()) from None


def full_disk(folder: Path, reason: str) -> UserError:
    """Returns the error for a disk that is full while a run is written to `folder`."""
    return UserError(
        f"the disk is full ({reason}): {folder} is kept up to its last checkpoint; free some space and run "
        f"`contraflow resume {folder}`"
    )
