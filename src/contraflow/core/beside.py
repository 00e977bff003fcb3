"""A function of arrays in a process beside this one.

The function may use any library, its own device included: nothing of it is imported here, and it sees no JAX. The
process ignores Ctrl-C, which is for the one that saves, and ends with it.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any

import numpy as np

from contraflow.core.errors import UserError
from contraflow.core.interrupt import SIGNALS

Function = Callable[..., Any]


class Beside:
    """`build(*args)` returns, in that process, a function of arrays that returns an array. `name` is for messages.

    The process starts with the first call.
    """

    def __init__(self, name: str, build: Callable[..., Function], *args: Any, why: str = ""):
        self.name, self.why = name, why
        self._build, self._args = build, args
        self._pool: ProcessPoolExecutor | None = None

    def submit(self, *arrays: np.ndarray) -> "Future[Any]":
        """Starts a call; `result` returns what came of it."""
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, context, _begin, (self._build, self._args))
        try:
            return self._pool.submit(_call, arrays)
        except BrokenProcessPool:
            raise self._ended() from None

    def result(self, future: "Future[Any]") -> np.ndarray:
        """Returns the array of a call. Raises UserError if the function failed, or its process ended."""
        try:
            array, problem = future.result()
        except BrokenProcessPool:
            raise self._ended() from None
        if problem:
            raise UserError(f"{self.name} failed ({problem}); {self.why or 'it was called with arrays'}")
        return array

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        """Returns the array of one call."""
        return self.result(self.submit(*arrays))

    def close(self) -> None:
        """Ends the process; a later call starts another."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = None

    def _ended(self) -> UserError:
        return UserError(
            f"the process of {self.name} ended without an answer: it needs less memory, or a script that trains needs "
            "`if __name__ == '__main__':`"
        )


_parts: Any = None
_function: Any = None


def _begin(build: Callable[..., Function], args: tuple[Any, ...]) -> None:
    global _parts
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the accelerator is the trainer's
    threading.Thread(target=_follow, daemon=True).start()
    _parts = build, args


def _follow() -> None:
    """Ends this process when the one that started it has ended without saying so."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(0)


def _call(arrays: tuple[np.ndarray, ...]) -> tuple[np.ndarray | None, str]:
    """Returns (array, "") or (None, what went wrong): an exception may be one that cannot be sent."""
    global _function
    try:
        if _function is None:
            build, args = _parts
            _function = build(*args)
        return np.asarray(_function(*arrays)), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
