"""What a comparison shows while it goes: a live table in a terminal, plain lines elsewhere."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
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

    def __init__(self, cells: Sequence[Cell], status: Mapping[Cell, str], quiet: bool):
        self._cells, self._status = cells, status
        self._console = Console(quiet=quiet, highlight=False, markup=False, soft_wrap=True)
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._spoke = time.monotonic()

    def __enter__(self) -> "Board":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._live:
            self._live.update(self._table(), refresh=True)
            self._live.stop()

    def note(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text)

    def refresh(self) -> None:
        """Show how things stand; a plain line now and then where there is no terminal."""
        now = time.monotonic()
        if self._live:
            self._live.update(self._table(), refresh=True)
        elif now - self._spoke > QUIET_SECONDS:
            self._spoke = now
            running = [c for c in self._cells if self._status[c] == "running"]
            places = "; ".join(f"{c} at step {steps_taken(c.folder) or 0:,}" for c in running)
            self.note(f"{self._count('done')} of {len(self._cells)} done; {places}")

    def _count(self, status: str) -> int:
        return sum(s == status for s in self._status.values())

    def _table(self) -> Table:
        table = Table(title=f"{self._count('done')} of {len(self._cells)} cells done", title_justify="left")
        for name in ("agent", "environment"):
            table.add_column(name)
        for name in ("done", "running", "waiting", "failed", "steps", "last returns"):
            table.add_column(name, justify="right")
        rows: dict[tuple[str, str], list[Cell]] = {}
        for cell in sorted(self._cells, key=lambda c: (c.env, c.agent, c.seed)):
            rows.setdefault((cell.agent, cell.env), []).append(cell)
        for (agent, env), cells in rows.items():
            count = Counter(self._status[cell] for cell in cells)
            running = [cell for cell in cells if self._status[cell] == "running"]
            steps = " ".join(f"{steps_taken(cell.folder) or 0:,}" for cell in running)
            returns = [last for cell in cells if (last := last_return(cell.folder)) is not None]
            table.add_row(
                agent, env, *(str(count[s]) if count[s] else "" for s in ("done", "running", "waiting", "failed")),
                steps, " ".join(f"{r:.1f}" for r in returns),
            )  # fmt: skip
        return table


def last_return(folder: Path) -> float | None:
    """The mean return of the last evaluation so far."""
    try:
        rows = read_evaluations(folder)
        return rows[-1]["return_mean"] if rows else None
    except (ValueError, KeyError, TypeError):  # a line that is just being written
        return None
