"""`contraflow report`: one page over many runs."""

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
    """One page over the finished runs of a comparison, or of any folder that holds runs.

    A PNG of each chart lies beside it.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of `contraflow compare`, or one that holds runs."""
    out: Path = Path("report.html")
    """The page; it needs no other file."""
    against: str | None = None
    """The agent that the others are held against; None is the actor-free one, or the first."""
    scores: Path | None = None
    """CSV with the columns env,low,high: the returns that become the scores 0 and 1."""


def report_command(args: list[str]) -> int:
    """`contraflow report DIR`: write the page, and say what was left out of it; the exit code."""
    options = read_flags(Report, args, prog="contraflow report")
    scale = read_scales(options.scores) if options.scores else {}
    files, left = write_report(options.folder, options.out, scale, options.against)
    for place, reason in left.items():
        print(f"left out  {place}: {reason}")
    *charts, page = files
    print(f"report    {shlex.quote(str(page))}, and {plural(len(charts), 'chart')} beside it")
    return 0
