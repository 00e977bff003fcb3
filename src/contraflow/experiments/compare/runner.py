"""Runs the workers of a matrix, on this machine or as tasks of a Ray cluster.

Workers share only the folders, which record what is done. Killing any worker, or this process, loses only the steps
since the last checkpoint.
"""

import importlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from contraflow.core.files import locked, write_json
from contraflow.core.settings import SCHEMA
from contraflow.core.trust import Trust
from contraflow.core.types import UserError
from contraflow.experiments import bridge
from contraflow.experiments.compare import matrix
from contraflow.experiments.compare.board import board, last_return
from contraflow.experiments.compare.matrix import FAILED, LOG, Cell, failure, state
from contraflow.training import checkpoint

WAIT = 0.2  # seconds between two checks of the workers
WORKER = (sys.executable, "-P", "-m", "contraflow.experiments.compare.worker")
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
RETRIES = 3  # by Ray, of a cell with a killed worker or a dead node; a cell that failed would fail again
LOOK = 1.0  # seconds between two checks of the tasks and their folders, which may be far away
REACH = 5.0  # seconds to wait for an address to answer
Group = tuple[Cell, ...]
Running = dict[Any, Group]


@dataclass(frozen=True)
class Outcome:
    """The result of the cells: how many were done before, how many are done now, and which failed and why."""

    before: int
    done: int
    failed: dict[Cell, str]
    interrupted: bool = False


@runtime_checkable
class Runner(Protocol):
    """A context in which workers run; it gets at most `limit` workers at a time."""

    @property
    def limit(self) -> int: ...

    def __enter__(self) -> str:
        """Returns in words how many run at a time. Raises UserError if none can."""
        ...

    def __exit__(self, *error: Any) -> None: ...

    def start(self, group: Group, episodes: int, trust: Trust) -> Any:
        """Starts a worker for the cells and returns a handle on it."""

    def ended(self, running: Running) -> list[Any]:
        """Waits a moment and returns the workers that have ended."""
        ...

    def reasons(self, worker: Any, group: Group) -> list[str | None]:
        """Returns why each cell of an ended worker failed; None for a cell that is done."""
        ...

    def stop(self, running: Running, force: bool) -> None:
        """Tells the workers to save and stop; with `force`, kills them."""


def run_cells(
    cells: Sequence[Cell], out: Path, runner: Runner, episodes: int, trust: Trust = "", quiet: bool = False,
    together: bool = False,
) -> Outcome:  # fmt: skip
    """Trains and evaluates all cells that are not done, in order; cells that failed before are tried again.

    With `together`, one worker gets all cells that one program can train. A failing cell does not stop the others.
    After Ctrl-C the workers save and stop; a second Ctrl-C kills them. Raises UserError, before anything runs, if
    another process works on this matrix or a folder does not belong to a cell.
    """
    with runner as words, locked(out):
        status = {cell: "done" if matrix.prepare(cell, trust) == "done" else "waiting" for cell in cells}
        before, failed = sum(s == "done" for s in status.values()), {}
        todo = [cell for cell in cells if status[cell] == "waiting"]
        waiting = grouped(todo, trust) if together else [(cell,) for cell in todo]
        running: Running = {}
        with board(status, quiet) as shown:
            shown.note(f"{len(cells)} cells, {before} done, {words}, in {out}")
            try:
                while waiting or running:
                    while waiting and len(running) < runner.limit:
                        group = waiting.pop(0)
                        running[runner.start(group, episodes, trust)] = group
                    for worker in runner.ended(running):
                        group = running.pop(worker)
                        for cell, reason in zip(group, runner.reasons(worker, group), strict=True):
                            status[cell], score = "failed" if reason else "done", last_return(cell.folder)
                            failed |= {cell: reason} if reason else {}
                            last = "" if score is None else f", last return {score:.1f}"
                            shown.note(f"{cell}: {f'failed: {reason}' if reason else f'done{last}'}")
                    for cell in (cell for group in running.values() for cell in group):
                        status[cell] = "running" if matrix.at_work(cell.folder) else "waiting"
                    shown.refresh()
            except KeyboardInterrupt:
                shown.note("stopping: the workers save first; Ctrl-C again kills them")
                _stop(runner, running)
                # Some may have ended before they were told to stop.
                return Outcome(before, sum(state(c.folder) == "done" for c in cells) - before, failed, True)
    return Outcome(before, sum(s == "done" for s in status.values()) - before, failed)


def _stop(runner: Runner, running: Running) -> None:
    for force in (False, True):
        try:
            runner.stop(running, force)
            while running:
                for worker in runner.ended(running):
                    del running[worker]
            return
        except KeyboardInterrupt:
            continue


def grouped(cells: Sequence[Cell], trust: Trust) -> list[Group]:
    """Groups the cells that one program can train: one agent on one environment written in JAX, at the same step.

    Seeds at different steps, and cells of other environments, form groups of one.
    """
    groups: dict[Any, list[Cell]] = {}
    for cell in cells:
        # The start counts as checkpoint 0, even before it is written.
        alike = (cell.agent, cell.env, checkpoint.latest(cell.folder) or 0)
        groups.setdefault(alike if bridge.in_jax(cell.env, trust) else cell, []).append(cell)
    return [tuple(group) for group in groups.values()]


@dataclass(frozen=True)
class Local:
    """Processes on this machine, with one thread each if there may be several."""

    limit: int

    def __enter__(self) -> str:
        return f"at most {self.limit} process{'es' * (self.limit != 1)} at a time"

    def __exit__(self, *error: Any) -> None: ...

    def start(self, group: Group, episodes: int, trust: Trust) -> subprocess.Popen[bytes]:
        return start([cell.folder for cell in group], episodes, trust, self.limit > 1)

    def ended(self, running: Running) -> list[subprocess.Popen[bytes]]:
        time.sleep(WAIT)
        over = [process for process in running if process.poll() is not None]
        for process in over:
            process.communicate()  # closes its input
        return over

    def reasons(self, worker: subprocess.Popen[bytes], group: Group) -> list[str | None]:
        return [concluded(cell.folder, how(worker.returncode)) for cell in group]

    def stop(self, running: Running, force: bool) -> None:
        for process in running:
            process.kill() if force else process.terminate()


def start(
    folders: Sequence[Path], episodes: int, trust: Trust, one_thread: bool, cwd: Path | None = None
) -> subprocess.Popen[bytes]:
    """Starts a worker for the cells in `folders`.

    Its standard input ends with this process, and a session of its own shields it from Ctrl-C, so this process forwards
    both.
    """
    command = [*WORKER, *(str(folder.absolute()) for folder in folders), str(episodes), trust]
    environ = dict(os.environ)
    if one_thread:
        # One thread each, or they wait for each other; and no process may take three quarters of a GPU's memory.
        environ["XLA_FLAGS"] = f"{environ.get('XLA_FLAGS', '')} {ONE_THREAD}".strip()
        environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    first, *others = (folder / LOG for folder in folders)
    for place in others:
        with place.open("a") as log:
            log.write(f"trained together with others: see {first}\n")
    with first.open("ab") as log:
        return subprocess.Popen(
            command, env=environ, cwd=cwd, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
        )


def how(code: int) -> str:
    """Says how a worker ended that left no reason."""
    hint = " (out of memory?)" if code == -9 else ""
    return f"the worker was killed by signal {-code}{hint}" if code < 0 else f"the worker ended with exit code {code}"


def concluded(folder: Path, reason: str) -> str | None:
    """Returns why a cell failed, or None if it did not; `reason` is recorded for a worker that was killed."""
    if state(folder) == "done":
        return None
    if state(folder) != "failed":
        write_json(folder / FAILED, {"schema": SCHEMA, "reason": f"{reason}; its log is {folder / LOG}"})
    return failure(folder)


class OnRay:
    """Tasks of the Ray cluster at `address`, one CPU each; Ray schedules them and retries those that were killed.

    `address` is `host:port`, "auto" (the cluster that runs on this machine) or "local" (a new one, for this call). The
    matrix and the current folder must have the same paths on all nodes, and this process must run on one of them.
    """

    limit = sys.maxsize  # Ray queues the tasks that have no place yet

    def __init__(self, address: str):
        self.address = address

    def __enter__(self) -> str:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            self._ray: Any = importlib.import_module("ray")
        except ImportError:
            raise UserError('--ray needs Ray: pip install "contraflow[ray]"') from None
        host, colon, port = self.address.rpartition(":")
        try:
            if "://" in self.address or (self.address not in ("auto", "local") and not (host and port.isdigit())):
                raise ValueError("an address is host:port, auto or local")
            if colon:  # Ray itself would retry for minutes and then kill this process
                socket.create_connection((host, int(port)), REACH).close()
            self._ray.init(self.address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, OverflowError, RuntimeError, ValueError, self._ray.exceptions.RayError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"--ray {self.address}: no cluster that this machine could join ({reason}): "
                "start one with `ray start --head`, or give `--ray local`"
            ) from None
        self._task = self._ray.remote(num_cpus=1, max_retries=RETRIES, retry_exceptions=[ChildProcessError])(attempt)
        return f"on {self._ray.cluster_resources().get('CPU', 0):.0f} CPUs of Ray ({self.address})"

    def __exit__(self, *error: Any) -> None:
        self._ray.shutdown()

    def start(self, group: Group, episodes: int, trust: Trust) -> Any:
        (cell,) = group
        return self._task.options(name=str(cell)).remote(cell.folder.absolute(), Path.cwd(), episodes, trust)

    def ended(self, running: Running) -> list[Any]:
        return self._ray.wait(list(running), num_returns=len(running), timeout=LOOK)[0]

    def reasons(self, worker: Any, group: Group) -> list[str | None]:
        try:  # trust the result of the task: over a network, the folder seen here may be out of date
            return [self._ray.get(worker)]
        except self._ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            plain = isinstance(cause, (ChildProcessError, self._ray.exceptions.RayError))
            words = ("" if plain else f"{type(cause).__name__}: ") + " ".join(str(cause).split())
            return [concluded(group[0].folder, words[:400])]

    def stop(self, running: Running, force: bool) -> None:
        for task in running:
            self._ray.cancel(task, force=force)


def attempt(folder: Path, cwd: Path, episodes: int, trust: Trust) -> str | None:
    """A Ray task: runs a worker in `folder`, started in `cwd`; returns why the cell failed, or None when it is done.

    The lock of the cell admits one worker at a time. If Ray gives up a node and retries the cell elsewhere while the
    first worker is alive, the second one waits, then continues from the last checkpoint or finds the result. Raises
    ChildProcessError, after which Ray tries again, if the worker ended without a result.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # Ray hides no GPU from tasks that did not request one
    process = start([folder], episodes, trust, one_thread=True, cwd=cwd)
    try:
        while process.poll() is None:
            time.sleep(WAIT)  # a cancelled task is interrupted here, but not inside process.wait()
    finally:
        process.terminate()
        process.wait()
        process.communicate()
    now = state(folder)
    if now not in ("done", "failed"):
        raise ChildProcessError(how(process.returncode))
    return failure(folder) if now == "failed" else None
