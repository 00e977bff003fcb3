"""Progress of a comparison: a live table in a terminal, plain lines elsewhere."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from contraflow.experiments.compare.matrix import Cell, steps_taken
from contraflow.training.log import read_evaluations

QUIET_SECONDS = 60.0  # minimum between two plain lines
STATES = ("done", "running", "waiting", "failed")


@dataclass
class Board:
    """The progress display of a comparison."""

    console: Console
    live: Live | None
    status: Mapping[Cell, str]
    spoke: float

    def note(self, text: str) -> None:
        """Prints a line that stays."""
        self.console.print(text)

    def refresh(self) -> None:
        """Updates the display; without a terminal, prints a plain line now and then."""
        if self.live:
            self.live.refresh()
        elif time.monotonic() - self.spoke > QUIET_SECONDS:
            self.spoke = time.monotonic()
            running = [f"{c} at step {steps_taken(c.folder):,}" for c, s in self.status.items() if s == "running"]
            self.note(f"{_done(self.status)}; {'; '.join(running)}")


@contextmanager
def board(status: Mapping[Cell, str], quiet: bool) -> Iterator[Board]:
    """Yields the display of a comparison: live in a terminal, plain lines elsewhere, silent if `quiet`."""
    console = Console(quiet=quiet, highlight=False, markup=False, soft_wrap=True)
    live = Live(console=console, auto_refresh=False, get_renderable=lambda: table(status))
    if not console.is_terminal:
        yield Board(console, None, status, time.monotonic())
        return
    with live:
        yield Board(console, live, status, time.monotonic())
        live.refresh()


def _done(status: Mapping[Cell, str]) -> str:
    return f"{sum(s == 'done' for s in status.values())} of {len(status)} cells done"


def table(status: Mapping[Cell, str]) -> Table:
    """Returns a row per agent and environment: seeds by state, steps of the running ones, their last returns."""
    out = Table("agent", "environment", title=_done(status), title_justify="left")
    for name in (*STATES, "steps", "last returns"):
        out.add_column(name, justify="right")
    rows: dict[tuple[str, str], list[Cell]] = {}
    for cell in sorted(status, key=lambda c: (c.env, c.agent, c.seed)):
        rows.setdefault((cell.agent, cell.env), []).append(cell)
    for names, cells in rows.items():
        count = Counter(status[cell] for cell in cells)
        steps = [f"{steps_taken(cell.folder):,}" for cell in cells if status[cell] == "running"]
        returns = [f"{last:.1f}" for cell in cells if (last := last_return(cell.folder)) is not None]
        out.add_row(*names, *(str(count[s] or "") for s in STATES), " ".join(steps), " ".join(returns))
    return out


def last_return(folder: Path) -> float | None:
    """Returns the mean return of the latest evaluation, or None."""
    try:
        return read_evaluations(folder)[-1]["return_mean"]
    except (ValueError, LookupError, TypeError):  # none yet, or a line that is being written
        return None
