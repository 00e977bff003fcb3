"""The progress bar."""

from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress as Bar, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Progress:
    """Steps, return, steps per second, time left; one line per evaluation above it."""

    def __init__(self, run: Any, quiet: bool):
        self._run = run
        self._console = Console(quiet=quiet)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=quiet,
        )

    def __enter__(self) -> "Progress":
        self._bar.start()
        self._task = self._bar.add_task("collecting", total=self._run.steps, speed="")
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()

    def update(self, steps: int, metrics: dict[str, float]) -> None:
        task = self._bar.tasks[0]
        speed = f"{task.speed:.0f} steps/s" if task.speed else ""
        text = f"return {metrics['return']:.1f}" if "return" in metrics else task.description
        self._bar.update(self._task, completed=min(steps, self._run.steps), description=text, speed=speed)

    def evaluated(self, steps: int, returns: np.ndarray) -> None:
        self._console.print(
            f"step {steps:>9,}  evaluation return {returns.mean():8.1f}  (min {returns.min():.1f}, max {returns.max():.1f})"
        )
