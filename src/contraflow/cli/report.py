"""`contraflow report`: one page over many runs."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from contraflow.experiments.report.page import write_report
from contraflow.experiments.report.scores import read_scales


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
    options = tyro.cli(Report, prog="contraflow report", args=args)
    scale = read_scales(options.scores) if options.scores else {}
    files, left = write_report(options.folder, options.out, scale, options.against)
    for item in left:
        print(f"left out  {item.place}: {item.reason}")
    print(f"report    {shlex.quote(str(files[0]))}, and {len(files) - 1} charts beside it")
    return 0
