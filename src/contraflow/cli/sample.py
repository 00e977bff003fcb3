"""`contraflow sample TARGET`: train flows on an unnormalised density and compare them with exact samples."""

from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from contraflow.cli.flags import read_flags
from contraflow.sampling.compare import Settings, compare, interval
from contraflow.sampling.distances import DISTANCES


def sample_command(args: list[str]) -> int:
    """Runs `contraflow sample TARGET`; returns the exit code."""
    settings = read_flags(Settings, args, prog="contraflow sample", description=Settings.__doc__)
    console = Console(emoji=False, markup=False, highlight=False)  # or `module:ring:` would become an emoji
    with Progress(console=console, disable=not settings.progress) as bar:
        tasks = {}

        def report(method: str, step: int, loss: float) -> None:
            if method not in tasks:
                tasks[method] = bar.add_task(method, total=settings.steps)
            bar.update(tasks[method], completed=min(step, settings.steps), description=f"{method:8s} loss {loss:.3g}")

        results = compare(settings, report)
    print_table(console, settings, results)
    console.print(f"written: {settings.folder}/results.json, {settings.folder}/samples.png", soft_wrap=True)
    return 0


def print_table(console: Console, settings: Settings, results: dict[str, Any]) -> None:
    """Prints one row per method and number of solver steps, and the floor; ± is half a 95 % bootstrap interval."""

    def cells(rows: list[dict[str, Any]]) -> list[str]:
        out = []
        for name in DISTANCES:
            mean, low, high = interval([row[name] for row in rows])
            digits = 4 if name == "mmd2" else 3
            spread = "" if len(rows) == 1 else f" ± {(high - low) / 2:.{digits}f}"
            out.append(f"{mean:.{digits}f}{spread}")
        return out

    console.print(f"\n{settings.target}: distance to {settings.points} exact samples, {settings.seeds} seed(s)")
    console.print(f"K = {settings.samples}, {results['density_calls']:,} density calls per flow")
    modes = ["modes"] if "modes" in results["rows"][0] else []
    table = Table("method", "steps", "sliced W", "MMD^2", "Sinkhorn", *modes, box=box.SIMPLE_HEAD, pad_edge=False)
    for method in dict.fromkeys(row["method"] for row in results["rows"]):
        for steps in settings.solver_steps:
            rows = [r for r in results["rows"] if (r["method"], r["solver_steps"]) == (method, steps)]
            found = [f"{np.mean([r['modes'] for r in rows]):.0%}" for _ in modes]
            table.add_row(method, str(steps), *cells(rows), *found)
    table.add_section()
    table.add_row("exact", "", *cells(results["floor"]))
    console.print(table)
    if "fab" in results["log_z"]:
        estimates = ", ".join(f"{value:.2f}" for value in results["log_z"]["fab"])
        console.print(f"log Z by fab: {estimates}; exact: {results['log_z']['exact']:.2f}")
