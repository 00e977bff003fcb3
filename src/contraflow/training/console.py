"""Progress of a run: a progress bar in a terminal, plain lines elsewhere."""

import time
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from contraflow.training.evaluate import margin

QUIET_SECONDS = 20.0  # minimum between two plain lines


class Progress:
    """Shows steps, return, steps per second and time left, with one line per evaluation above the bar.

    The speed is measured since the last change of state and excludes the first epoch, which compiles.
    """

    def __init__(self, header: str, total: int, taken: int, quiet: bool):
        self._header, self._total = header, total
        self._console = Console(quiet=quiet, highlight=False, markup=False, soft_wrap=True)
        self._live = self._console.is_terminal and not quiet
        self._taken, self._state, self._return = taken, "compiling", None
        self._since: tuple[float, int] | None = None
        self._bar = Bar(
            TextColumn("{task.description:<15}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._live,
            expand=True,
        )

    def __enter__(self) -> "Progress":
        self.note(self._header)
        self._spoke = time.monotonic()
        self._bar.start()
        self._task = self._bar.add_task(self._state, total=self._total, completed=self._taken, speed="")
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text)

    def update(self, state: str, steps: int, metrics: dict[str, float]) -> None:
        """Updates the bar after `steps` in total, the last ones in `state`, with their `metrics`."""
        now = time.monotonic()
        if state != self._state:
            self._state, self._since = state, (now, steps)
        self._taken = steps
        self._return = metrics.get("return", self._return)
        shown = state if self._return is None else f"return {self._return:.1f}"
        speed = self._speed(now)
        self._bar.update(self._task, completed=min(steps, self._total), description=shown, speed=speed)
        if not self._live and now - self._spoke > QUIET_SECONDS:
            self._spoke = now
            self.note(f"step {steps:>9,}  {shown:<15} {speed}".rstrip())

    def _speed(self, now: float) -> str:
        """Returns steps per second and the time left, once they can be estimated."""
        assert self._since is not None
        began, first = self._since
        if self._taken == first:
            return ""
        rate = (self._taken - first) / max(now - began, 1e-9)
        minutes, seconds = divmod(round(max(self._total - self._taken, 0) / rate), 60)
        return f"{rate:,.0f} steps/s, {minutes} min {seconds:02d} s left"

    def evaluated(self, steps: int, returns: np.ndarray, success: np.ndarray | None = None) -> None:
        """Prints an evaluation: [episodes] of one policy, or [S, episodes] of one for each seed."""
        many = returns.ndim > 1 and len(returns) > 1
        sample = returns.mean(1) if many else returns.ravel()
        what = f"{len(returns)} seeds of {returns.shape[1]} episodes" if many else f"{sample.size} episodes"
        spread = f" +- {margin(sample):.1f}" if sample.size > 1 else ""
        self.note(
            f"step {steps:>9,}  evaluation return {sample.mean():8.1f}{spread}  ({what}, min {sample.min():.1f}, "
            f"max {sample.max():.1f})" + ("" if success is None else f"  success {success.mean():.0%}")
        )
