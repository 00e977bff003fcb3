"""What a comparison shows while it goes: a live table in a terminal, plain lines elsewhere."""

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from contraflow.experiments.compare.matrix import Cell, steps_taken
from contraflow.training.log import read_evaluations

QUIET_SECONDS = 60.0  # between two plain lines


class Board:
    """One row per agent and environment: how many seeds are done, how far those at work are, the last returns."""

    def __init__(self, status: Mapping[Cell, str], quiet: bool):
        self._status, self._spoke = status, time.monotonic()
        self._console = Console(quiet=quiet, highlight=False, markup=False, soft_wrap=True)
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None

    def __enter__(self) -> "Board":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._live:
            self._live.update(self.table(), refresh=True)
            self._live.stop()

    def note(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text)

    def refresh(self) -> None:
        """Show how things stand; a plain line now and then where there is no terminal."""
        if self._live:
            self._live.update(self.table(), refresh=True)
        elif time.monotonic() - self._spoke > QUIET_SECONDS:
            self._spoke = time.monotonic()
            running = [f"{c} at step {steps_taken(c.folder):,}" for c, s in self._status.items() if s == "running"]
            self.note(f"{self._done()}; {'; '.join(running)}")

    def _done(self) -> str:
        return f"{sum(s == 'done' for s in self._status.values())} of {len(self._status)} cells done"

    def table(self) -> Table:
        table = Table("agent", "environment", title=self._done(), title_justify="left")
        for name in (*(states := ("done", "running", "waiting", "failed")), "steps", "last returns"):
            table.add_column(name, justify="right")
        rows: dict[tuple[str, str], list[Cell]] = {}
        for cell in sorted(self._status, key=lambda c: (c.env, c.agent, c.seed)):
            rows.setdefault((cell.agent, cell.env), []).append(cell)
        for names, cells in rows.items():
            count = Counter(self._status[cell] for cell in cells)
            steps = [f"{steps_taken(cell.folder):,}" for cell in cells if self._status[cell] == "running"]
            returns = [f"{last:.1f}" for cell in cells if (last := last_return(cell.folder)) is not None]
            table.add_row(*names, *(str(count[s] or "") for s in states), " ".join(steps), " ".join(returns))
        return table


def last_return(folder: Path) -> float | None:
    """The mean return of the last evaluation so far."""
    try:
        rows = read_evaluations(folder)
        return rows[-1]["return_mean"] if rows else None
    except (ValueError, KeyError, TypeError):  # a line that is just being written
        return None
