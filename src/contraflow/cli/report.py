"""`contraflow report`: one page about many runs."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from contraflow.cli.settings import read_flags
from contraflow.experiments.report.page import write_report
from contraflow.experiments.report.scores import plural, read_scales


@dataclass(frozen=True)
class Report:
    """Write one page about the finished runs of a comparison, or of any folder that holds runs.

    Each chart is also written as a PNG file next to the page.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of `contraflow compare`, or any folder that holds runs."""
    out: Path = Path("report.html")
    """The page; it needs no other file."""
    against: str | None = None
    """The agent that the others are compared with; None is the one without an actor, or else the first."""
    scores: Path | None = None
    """CSV with the columns env,low,high: the returns that correspond to the scores 0 and 1."""


def report_command(args: list[str]) -> int:
    """Runs `contraflow report DIR`: writes the page and prints what was left out; returns the exit code."""
    options = read_flags(Report, args, prog="contraflow report")
    scale = read_scales(options.scores) if options.scores else {}
    files, left = write_report(options.folder, options.out, scale, options.against)
    for place, reason in left.items():
        print(f"left out  {place}: {reason}")
    *charts, page = files
    print(f"report    {shlex.quote(str(page))}, and {plural(len(charts), 'chart')} beside it")
    return 0
