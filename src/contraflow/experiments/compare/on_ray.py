"""The cells of a matrix as tasks of a Ray cluster: Ray says where and when, and tries again what was killed.

A task does what the pool does: it starts a worker in the cell's folder and waits for it. The folder lies at the same
path on all nodes, and its lock lets one worker in at a time. So when Ray gives a node up and tries the cell elsewhere
while the first worker is still alive, the second waits, and goes on from the last checkpoint or finds the result.
"""

import importlib
import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from contraflow.core.types import UserError
from contraflow.experiments.compare.matrix import Cell, at_work, failure, state
from contraflow.experiments.compare.pool import WAIT, Outcome, concluded, how, start, stop, tallied

RETRIES = 3  # of a cell whose worker was killed, whose node died; one that failed would fail again
LOOK = 1.0  # seconds between two looks at the folders, which may be far away
REACH = 5.0  # seconds in which an address answers


def run_on_ray(cells: Sequence[Cell], out: Path, address: str, episodes: int, trust: bool, quiet: bool) -> Outcome:
    """Train and evaluate all cells that are not done as tasks of the Ray cluster at `address`, one CPU each.

    `address` is `host:port`, "auto" (the cluster that runs on this machine) or "local" (a new one, for this call).
    `out` and the current folder must lie at the same paths on all nodes, and this must run on one of them. A failing
    cell does not stop the others. After Ctrl-C the workers save and stop; a second one kills them. Raises UserError,
    before anything runs, if Ray is not installed, no cluster answers, another process is at this matrix or a folder is
    not a cell's.
    """
    with _connected(address) as ray, tallied(cells, out, quiet) as tally:
        task = ray.remote(num_cpus=1, max_retries=RETRIES, retry_exceptions=[ChildProcessError])(attempt)
        cpus = ray.cluster_resources().get("CPU", 0)
        tally.board.note(f"{len(cells)} cells, {tally.before} done, on {cpus:.0f} CPUs of Ray ({address}), in {out}")
        running: dict[Any, Cell] = {}
        try:
            for cell in tally.waiting():
                reference = task.options(name=str(cell)).remote(cell.folder.absolute(), Path.cwd(), episodes, trust)
                running[reference] = cell
            while running:
                for reference in ray.wait(list(running), num_returns=len(running), timeout=LOOK)[0]:
                    cell = running.pop(reference)
                    tally.ended(cell, _result(ray, reference, cell))
                for cell in running.values():
                    tally.status[cell] = "running" if at_work(cell.folder) else "waiting"
                tally.board.refresh()
        except KeyboardInterrupt:
            tally.board.note("stopping: the workers save first; Ctrl-C again kills them")
            _stop(ray, list(running))
            return tally.interrupted()
        return tally.outcome()


def attempt(folder: Path, cwd: Path, episodes: int, trust: bool) -> str | None:
    """The task: a worker in `folder`, started in `cwd`. Why the cell failed; None when it is done.

    Raises ChildProcessError, after which Ray tries again, if the worker ended without a word.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # Ray hides no GPU from tasks that asked for none
    process = start([folder], episodes, trust, one_thread=True, cwd=cwd)
    try:
        while process.poll() is None:
            time.sleep(WAIT)  # a cancelled task is interrupted here, but not inside process.wait()
    finally:
        stop([process])
    now = state(folder)
    if now not in ("done", "failed"):
        raise ChildProcessError(f"the worker {how(process.returncode)}")
    return failure(folder) if now == "failed" else None


def _result(ray: Any, reference: Any, cell: Cell) -> str | None:
    """What the task says. It is believed: over a network the folder may look here as it was a while ago."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        name = "" if isinstance(cause, (ChildProcessError, ray.exceptions.RayError)) else f"{type(cause).__name__}: "
        return concluded(cell, (name + " ".join(str(cause).split()))[:400])


def _stop(ray: Any, references: list[Any]) -> None:
    """Ask all to save and stop, and wait; kill them if Ctrl-C comes meanwhile."""
    try:
        for reference in references:
            ray.cancel(reference)
        if references:
            ray.wait(references, num_returns=len(references))
    except KeyboardInterrupt:
        for reference in references:
            ray.cancel(reference, force=True)
        ray.wait(references, num_returns=len(references), timeout=LOOK)


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Ray, connected to the cluster at `address`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise UserError('--ray needs Ray: pip install "contraflow[ray]"') from None
    host, colon, port = address.rpartition(":")
    try:
        if "://" in address or (address not in ("auto", "local") and not (host and port.isdigit())):
            raise ValueError("an address is host:port, auto or local")
        if colon:  # Ray itself asks for minutes, and then kills this process
            socket.create_connection((host, int(port)), REACH).close()
        ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, OverflowError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--ray {address}: no cluster that this machine could join ({reason}): start one with `ray start --head`, "
            "or give `--ray local`"
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()
