"""What a run shows while it goes: a progress bar in a terminal, plain lines elsewhere."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

QUIET_SECONDS = 20.0  # between two plain lines


class Progress:
    """Steps, return, steps per second, time left; one line per evaluation above it."""

    def __init__(self, run: Any, folder: Path, taken: int, quiet: bool, seeds: Sequence[int] = ()):
        """`seeds` are those trained at once, of which `run` is one; step counts are those of each."""
        self._run, self._folder = run, folder
        self._seeds = f"seeds {', '.join(map(str, seeds))}" if seeds else f"seed {run.seed}"
        self._taken = self._first = taken
        self._console = Console(quiet=quiet, highlight=False, markup=False, soft_wrap=True)
        self._live = self._console.is_terminal and not quiet
        self._state = "collecting"
        self._bar = Bar(
            TextColumn("{task.description:<15}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=not self._live,
            expand=True,
        )

    def __enter__(self) -> "Progress":
        run = self._run
        at = f", from step {self._first:,}" if self._first else ""
        self.note(f"{type(run.agent).__name__} on {run.env}, {run.steps:,} steps{at}, {self._seeds}, in {self._folder}")
        self._started = self._spoke = time.monotonic()
        self._bar.start()
        self._task = self._bar.add_task(self._state, total=run.steps, completed=self._first, speed="compiling")
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text)

    def update(self, steps: int, metrics: dict[str, float]) -> None:
        """`steps` taken so far; `metrics` of the last of them."""
        now, run = time.monotonic(), self._run
        self._taken = steps
        if "return" in metrics:
            self._state = f"return {metrics['return']:.1f}"
        elif self._state == "collecting" and steps > getattr(run, "collect", 0):
            self._state = "learning"
        rate = (steps - self._first) / max(now - self._started, 1e-9)
        task = self._bar.tasks[self._task]
        speed = f"{task.speed or rate:,.0f} steps/s"
        self._bar.update(self._task, completed=min(steps, run.steps), description=self._state, speed=speed)
        if not self._live and now - self._spoke > QUIET_SECONDS:
            self._spoke = now
            left = max(run.steps - steps, 0) / max(rate, 1e-9)
            self.note(f"step {steps:>9,}  {self._state:<15} {rate:,.0f} steps/s, {left / 60:.0f} min left")

    def evaluated(self, steps: int, returns: np.ndarray) -> None:
        low, high = returns.min(), returns.max()
        self.note(f"step {steps:>9,}  evaluation return {returns.mean():8.1f}  (min {low:.1f}, max {high:.1f})")
