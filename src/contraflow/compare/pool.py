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
from dataclasses import dataclass
from pathlib import Path

from contraflow.compare.board import Board, last_return
from contraflow.compare.matrix import FAILED, LOG, SCHEMA, Cell, failure, grouped, prepare, state, write_json
from contraflow.types import UserError

WAIT = 0.2  # seconds between two looks at the workers
WORKER = (sys.executable, "-m", "contraflow.compare.worker")
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


@dataclass(frozen=True)
class Outcome:
    """How the cells ended: those done before, those done now, those that failed and why."""

    before: int
    done: int
    failed: dict[Cell, str]
    interrupted: bool


def run_cells(
    cells: Sequence[Cell], out: Path, jobs: int, episodes: int, trust: bool, quiet: bool, together: bool = False
) -> Outcome:
    """Train and evaluate all cells that are not done, in order; cells that failed before are tried again.

    With `together`, one worker gets all cells that one program can train. A failing cell does not stop the others.
    After Ctrl-C the workers save and stop; a second one kills them. Raises UserError, before anything runs, if another
    process is at this matrix or a folder is not a cell's.
    """
    with _alone(out):
        status = {cell: "done" if prepare(cell) == "done" else "waiting" for cell in cells}
        before = sum(s == "done" for s in status.values())
        waiting = [cell for cell in cells if status[cell] == "waiting"]
        groups = grouped(waiting, trust) if together else [(cell,) for cell in waiting]
        running: dict[tuple[Cell, ...], subprocess.Popen[bytes]] = {}
        failed: dict[Cell, str] = {}
        with Board(cells, status, quiet) as board:
            most = min(jobs, len(groups))
            board.note(f"{len(cells)} cells, {before} done, {most} process{'es' * (most != 1)} at a time, in {out}")
            try:
                while groups or running:
                    while groups and len(running) < jobs:
                        group = groups.pop(0)
                        running[group] = start(group, episodes, jobs, trust)
                        status |= dict.fromkeys(group, "running")
                    time.sleep(WAIT)
                    for group in [group for group, process in running.items() if process.poll() is not None]:
                        process = running.pop(group)
                        close(process)
                        for cell in group:
                            reason = ended(cell, process.returncode)
                            status[cell] = "done" if reason is None else "failed"
                            if reason is not None:
                                failed[cell] = reason
                            score = last_return(cell.folder)
                            how = "done" if score is None else f"done, last return {score:.1f}"
                            board.note(f"{cell}: {how if reason is None else f'failed: {reason}'}")
                    board.refresh()
            except KeyboardInterrupt:
                board.note(f"stopping: {len(running)} workers save first; Ctrl-C again kills them")
                stop(list(running.values()))
                done = sum(state(cell.folder) == "done" for cell in cells)
                return Outcome(before, done - before, failed, True)
        return Outcome(before, sum(s == "done" for s in status.values()) - before, failed, False)


def start(group: Sequence[Cell], episodes: int, jobs: int, trust: bool) -> subprocess.Popen[bytes]:
    """A worker for the cells. Its standard input ends with this process, and a session of its own keeps Ctrl-C from it:
    both are ours to pass on."""
    command = [*WORKER, *(str(cell.folder.absolute()) for cell in group), str(episodes)]
    environ = dict(os.environ)
    if jobs > 1:
        # One thread each, or they wait for one another; and no process takes three quarters of an accelerator's memory.
        environ["XLA_FLAGS"] = f"{environ.get('XLA_FLAGS', '')} {ONE_THREAD}".strip()
        environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    first, *others = (cell.folder / LOG for cell in group)
    for place in others:
        with place.open("a") as log:
            log.write(f"trained together with others: see {first}\n")
    with first.open("ab") as log:
        return subprocess.Popen(
            command + ["--trust"] * trust,
            env=environ, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def ended(cell: Cell, code: int) -> str | None:
    """Why the worker of a cell failed; None if it did not. A worker that was killed could not say: we do it for it."""
    if state(cell.folder) == "done":
        return None
    if state(cell.folder) != "failed":
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        hint = " (out of memory?)" if code == -9 else ""
        write_json(
            cell.folder / FAILED,
            {"schema": SCHEMA, "reason": f"the worker {how}{hint}; its log is {cell.folder / LOG}"},
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
