"""Files written whole or not at all; folders that one process works in; what a full disk says."""

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
    """A place to write to, beside `path`, which it replaces at the end: a reader, or a crash, sees the old file or the
    whole new one. After an exception `path` stays as it was."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # or a power cut may leave the new name with no content
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, indent=1))


def read_json(path: Path) -> Any:
    """What `path` holds. Raises UserError if it cannot be read or is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        raise UserError(f"{path} is not valid JSON: {error}") from None


def make_folder(folder: Path, flag: str = "--out") -> list[Path]:
    """Make `folder` and its parents; those that were not there, from the top down. Raises UserError, with the `flag`
    that named it, if it cannot be made."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror or error}): choose another {flag}") from None
    return missing[::-1]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one process works in `folder`. Raises UserError, naming the other, if there is one."""
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
                f"another process (pid {owner}) is at work in {folder}: wait until it ends, or stop it"
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
    """Turn what comes of a full disk (or quota, or file limit), by whatever library, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Libraries that write from C++ keep the text of the system and lose its number.
        reasons = [os.strerror(n) for n in FULL if getattr(error, "errno", None) == n or os.strerror(n) in str(error)]
        if not reasons:
            raise
        raise full_disk(folder, reasons[0].lower()) from None


def full_disk(folder: Path, reason: str) -> UserError:
    return UserError(
        f"the disk is full ({reason}): what {folder} holds up to its last checkpoint is kept; free some space and run "
        f"`contraflow resume {folder}`"
    )
