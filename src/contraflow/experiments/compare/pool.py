"""Workers for the cells of a matrix: at most `jobs` at a time, each a fresh process for one cell or a group of them.

Processes share nothing but the folders: what is done is read off them, so killing any of them, or this one, loses only
the steps since the last checkpoint.
"""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from contraflow.core.types import UserError
from contraflow.experiments.compare.board import Board, last_return
from contraflow.experiments.compare.matrix import (
    FAILED,
    LOG,
    SCHEMA,
    Cell,
    failure,
    grouped,
    prepare,
    state,
    write_json,
)

WAIT = 0.2  # seconds between two looks at the workers
WORKER = (sys.executable, "-m", "contraflow.experiments.compare.worker")
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


@dataclass(frozen=True)
class Outcome:
    """How the cells ended: those done before, those done now, those that failed and why."""

    before: int
    done: int
    failed: dict[Cell, str]
    interrupted: bool


@dataclass(frozen=True)
class Tally:
    """What has come of the cells so far, on a board."""

    status: dict[Cell, str]
    before: int
    board: Board
    failed: dict[Cell, str] = field(default_factory=dict)

    def waiting(self) -> list[Cell]:
        return [cell for cell, status in self.status.items() if status == "waiting"]

    def ended(self, cell: Cell, reason: str | None) -> None:
        """Note that a cell is done, or why it failed."""
        self.status[cell] = "done" if reason is None else "failed"
        if reason is not None:
            self.failed[cell] = reason
        score = last_return(cell.folder)
        how = f"done, last return {score:.1f}" if reason is None and score is not None else self.status[cell]
        self.board.note(f"{cell}: {how if reason is None else f'failed: {reason}'}")

    def outcome(self) -> Outcome:
        return Outcome(self.before, sum(s == "done" for s in self.status.values()) - self.before, self.failed, False)

    def interrupted(self) -> Outcome:
        """After the last worker stopped; some may have come to an end before they were told to."""
        done = sum(state(cell.folder) == "done" for cell in self.status)
        return Outcome(self.before, done - self.before, self.failed, True)


@contextmanager
def tallied(cells: Sequence[Cell], out: Path, quiet: bool) -> Iterator[Tally]:
    """All cells prepared, and this process the only one that looks after them. Raises UserError as `run_cells`."""
    with _alone(out):
        status = {cell: "done" if prepare(cell) == "done" else "waiting" for cell in cells}
        with Board(cells, status, quiet) as board:
            yield Tally(status, sum(s == "done" for s in status.values()), board)


def run_cells(
    cells: Sequence[Cell], out: Path, jobs: int, episodes: int, trust: bool, quiet: bool, together: bool = False
) -> Outcome:
    """Train and evaluate all cells that are not done, in order; cells that failed before are tried again.

    With `together`, one worker gets all cells that one program can train. A failing cell does not stop the others.
    After Ctrl-C the workers save and stop; a second one kills them. Raises UserError, before anything runs, if another
    process is at this matrix or a folder is not a cell's.
    """
    with tallied(cells, out, quiet) as tally:
        waiting = tally.waiting()
        groups = grouped(waiting, trust) if together else [(cell,) for cell in waiting]
        running: dict[tuple[Cell, ...], subprocess.Popen[bytes]] = {}
        most = min(jobs, len(groups))
        processes = f"{most} process{'es' * (most != 1)} at a time, in {out}"
        tally.board.note(f"{len(cells)} cells, {tally.before} done, {processes}")
        try:
            while groups or running:
                while groups and len(running) < jobs:
                    group = groups.pop(0)
                    running[group] = start([cell.folder for cell in group], episodes, trust, jobs > 1)
                    tally.status.update(dict.fromkeys(group, "running"))
                time.sleep(WAIT)
                for group in [group for group, process in running.items() if process.poll() is not None]:
                    process = running.pop(group)
                    close(process)
                    for cell in group:
                        tally.ended(cell, ended(cell, process.returncode))
                tally.board.refresh()
        except KeyboardInterrupt:
            tally.board.note(f"stopping: {len(running)} workers save first; Ctrl-C again kills them")
            stop(list(running.values()))
            return tally.interrupted()
        return tally.outcome()


def start(
    folders: Sequence[Path], episodes: int, trust: bool, one_thread: bool, cwd: Path | None = None
) -> subprocess.Popen[bytes]:
    """A worker for the cells in `folders`. Its standard input ends with this process, and a session of its own keeps
    Ctrl-C from it: both are ours to pass on."""
    command = [*WORKER, *(str(folder.absolute()) for folder in folders), str(episodes)]
    environ = dict(os.environ)
    if one_thread:
        # One thread each, or they wait for one another; and no process takes three quarters of an accelerator's memory.
        environ["XLA_FLAGS"] = f"{environ.get('XLA_FLAGS', '')} {ONE_THREAD}".strip()
        environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    first, *others = (folder / LOG for folder in folders)
    for place in others:
        with place.open("a") as log:
            log.write(f"trained together with others: see {first}\n")
    with first.open("ab") as log:
        return subprocess.Popen(
            command + ["--trust"] * trust,
            env=environ, cwd=cwd, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def ended(cell: Cell, code: int) -> str | None:
    """Why the worker of a cell failed; None if it did not."""
    return concluded(cell, f"the worker {how(code)}")


def how(code: int) -> str:
    """How a process ended that left no word."""
    hint = " (out of memory?)" if code == -9 else ""
    return f"was killed by signal {-code}{hint}" if code < 0 else f"ended with exit code {code}"


def concluded(cell: Cell, reason: str) -> str | None:
    """Why a cell failed; None if it did not. A worker that was killed could not say: `reason` stands in for it."""
    if state(cell.folder) == "done":
        return None
    if state(cell.folder) != "failed":
        write_json(
            cell.folder / FAILED,
            {"schema": SCHEMA, "reason": f"{reason}; its log is {cell.folder / LOG}"},
        )
    return failure(cell.folder)


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Ask all to save and stop, and wait; kill them if Ctrl-C comes meanwhile."""
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
            process.wait()
    for process in processes:
        close(process)


def close(process: subprocess.Popen[bytes]) -> None:
    if process.stdin:
        process.stdin.close()


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Only one process at a time looks after a matrix."""
    with (out / "matrix.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is at work in {out}: wait for it, or choose another --out") from None
        yield
