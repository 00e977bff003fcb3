"""The process of one cell, or of several at once: `python -m ...compare.worker FOLDER... EPISODES TRUSTED`.

The process continues the run in FOLDER, evaluates it, and leaves `final.json`, or `failed.json` with the reason. One
program trains the runs in several folders, which differ only in their seeds. The process saves and stops on SIGTERM and
when its standard input ends, which happens when the process that started it dies.
"""

import fcntl
import importlib.metadata
import os
import platform
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import jax

from contraflow.core.files import write_json
from contraflow.core.settings import SCHEMA
from contraflow.core.trust import Trust
from contraflow.core.types import UserError
from contraflow.experiments.bridge import final_evaluations
from contraflow.experiments.compare.matrix import FAILED, FINAL, LOCK
from contraflow.training.run import Result, resume_together

SEED = 12_345  # of the evaluation after training: episodes not seen in training, the same for every cell of a task
PACKAGES = (
    "contraflow", "jax", "jaxlib", "equinox", "optax", "numpy", "envpool", "gymnasium", "mujoco", "dm_control",
    "playground", "minari",
)  # fmt: skip
DONE, BROKEN, INTERRUPTED = 0, 1, 130


def work(folders: Sequence[Path], episodes: int, trust: Trust) -> int:
    """Trains and evaluates; returns 0 if all are done, 1 if one failed, or 130 if stopped and saved."""
    with ExitStack() as stack:
        for folder in folders:
            stack.enter_context(_alone(folder))
        todo = [folder for folder in folders if not (folder / FINAL).exists()]
        for folder in todo:
            (folder / FAILED).unlink(missing_ok=True)
        outcomes = zip(todo, _train(todo, trust), strict=True)
        return max((_finish(folder, outcome, episodes, trust) for folder, outcome in outcomes), default=DONE)


def _train(folders: list[Path], trust: Trust) -> list[Result | Exception]:
    """Returns for each folder the result of its training, or the exception that ended it."""
    try:
        return list(resume_together(folders, trust=trust).values()) if folders else []
    except Exception as error:
        _trace(error)
        return [error] * len(folders)


def _finish(folder: Path, outcome: Result | Exception, episodes: int, trust: Trust) -> int:
    """Evaluates the trained run and writes final.json, or failed.json with the reason; returns the exit code."""
    if isinstance(outcome, Result):
        if outcome.interrupted:
            return INTERRUPTED
        try:
            rows = final_evaluations(folder, episodes, SEED, trust)
            final = {"schema": SCHEMA, "episodes": episodes, "seed": SEED, "evaluations": rows}
            write_json(folder / FINAL, final | {"machine": machine(), "versions": versions()})
            return DONE
        except Exception as error:
            _trace(error)
            outcome = error
    name = "" if isinstance(outcome, UserError) else f"{type(outcome).__name__}: "
    write_json(folder / FAILED, {"schema": SCHEMA, "reason": name + " ".join(str(outcome).split())[:400]})
    return BROKEN


def _trace(error: Exception) -> None:
    """Writes the traceback to the log, unless the message was written for the user."""
    if not isinstance(error, UserError):
        traceback.print_exception(error)


def machine() -> dict[str, Any]:
    """Describes the machine of the run, without host or user names."""
    device, cpu = jax.devices()[0], platform.processor()
    with suppress(OSError, StopIteration):  # not Linux
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "system": f"{platform.system()} {platform.machine()}", "cpu": cpu, "cores": os.cpu_count(),
        "device": f"{device.platform}: {device.device_kind}", "flags": os.environ.get("XLA_FLAGS", ""),
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that affect a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other process works on the cell: after a kill, an orphan may still be saving."""
    with (folder / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _stop_with_parent() -> None:
    """Makes this process save and stop when its standard input ends."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main(args: list[str]) -> int:
    _stop_with_parent()
    *folders, episodes, trust = args
    return work([Path(folder) for folder in folders], int(episodes), trust)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
