"""Handling of SIGINT and SIGTERM.

A command runs within `guard`. Until a run has something to lose, a signal ends the process at once, even while it
imports or compiles. Python's own handlers would wait for the main thread, and an exception raised there could be
swallowed by a callback or hit a compiler at work. Later, within `noted`, the first signal sets a flag that the loop
reads between two steps, and the second one ends the process.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 130  # exit code of a process ended by Ctrl-C


class Notice:
    """True once a signal has been noted. `started` says whether there is something to save."""

    def __init__(self, started: bool):
        self.started = started
        self._received = False

    def __bool__(self) -> bool:
        return self._received

    def take(self) -> bool:
        """Notes a signal; returns False if it must end the process."""
        if self._received or not self.started:
            return False
        self._received = True
        print("interrupt noted; saving after this step (again to stop at once)", file=sys.stderr, flush=True)
        return True


class Guard:
    """Handles signals in a separate thread until `release`."""

    def __init__(self):
        self.notice: Notice | None = None
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # Without a handler the system would act itself; the thread learns of signals through the file descriptor.
        numbers = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, lambda number, frame: None) for number in numbers}
        self._fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(read,), daemon=True).start()

    def _watch(self, read: int) -> None:
        while received := os.read(read, 64):
            for number in received:
                if number in self._before and (self.notice is None or not self.notice.take()):
                    end()
        os.close(read)

    def release(self) -> None:
        """Restores the previous handling of signals: Ctrl-C raises KeyboardInterrupt."""
        global _guard
        if _guard is self:
            _guard = None
            signal.set_wakeup_fd(self._fd)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            os.close(self._write)


_guard: Guard | None = None


@contextmanager
def guard() -> Iterator[Guard | None]:
    """Guards the main thread of a command; does nothing in other threads or within another guard."""
    global _guard
    if _guard is not None or threading.current_thread() is not threading.main_thread():
        yield None
        return
    _guard = own = Guard()
    try:
        yield own
    finally:
        own.release()


@contextmanager
def noted() -> Iterator[Notice]:
    """Notes the first signal within, once `started` is set.

    Without a guard it notes from the start, and a second signal is handled as before.
    """
    if _guard is not None:
        own, before = _guard, _guard.notice
        own.notice = notice = Notice(started=False)
        try:
            yield notice
        finally:
            own.notice = before
        return
    notice = Notice(started=True)
    previous = {}

    def handler(number, frame):
        if not notice.take():
            signal.signal(number, previous[number])
            signal.raise_signal(number)

    if threading.current_thread() is threading.main_thread():
        previous = {n: signal.signal(n, handler) for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield notice
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def end() -> None:
    """Ends the process at once, without the interpreter's cleanup: a compiler or a simulator may be at work."""
    with suppress(Exception):
        sys.stdout.flush()
        if sys.stdout.isatty():
            sys.stdout.write("\x1b[?25h\n")  # a progress bar hides the cursor
            sys.stdout.flush()
        sys.stderr.write("contraflow: interrupted\n")
        sys.stderr.flush()
    os._exit(INTERRUPTED)
