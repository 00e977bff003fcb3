"""The report: one self-contained HTML file, and its charts as PNG files beside it."""

import base64
import io
from collections.abc import Mapping
from datetime import date
from pathlib import Path

import jinja2
import matplotlib
from matplotlib.figure import Figure

from contraflow.core import plotting
from contraflow.core.files import make_folder, replacing
from contraflow.core.settings import suggest, version
from contraflow.core.types import UserError
from contraflow.experiments.report import charts, statistics, tables
from contraflow.experiments.report.runs import Record, read
from contraflow.experiments.report.scores import collect, plural

ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
MOST = 12  # pictures of samples
ENVIRONMENT.filters["plural"] = plural


def write_report(
    folder: Path, out: Path, scale: Mapping[str, tuple[float, float]], reference: str | None = None
) -> tuple[list[Path], dict[str, str]]:
    """Writes the page `out` and `<stem>-<chart>.png` beside it.

    Returns the files, and what was left out of `folder` with the reasons. `scale` gives (low, high) of environments.
    `reference` is the agent that the others are compared with, by default the one without an actor. Raises UserError
    when there is nothing to report, or no agent of that name.
    """
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise UserError(f"{out} cannot be the page: give --out a file name that ends in .html")
    records, left = read(folder)
    agents, envs = sorted({r.agent for r in records}), sorted({r.env for r in records})
    for env in sorted(set(scale) - set(envs)):
        raise UserError(f"the table of scales names {env}, which no finished run has; {suggest(env, envs)}")
    if reference is not None and reference not in agents:
        raise UserError(f"there is no agent {reference} in {folder}; {suggest(reference, agents)}")
    free = [r.agent for r in records if r.cost is not None and r.cost["nfe"] == 0]
    reference = reference or (free or agents)[0]
    make_folder(out.parent)
    table = collect(records, scale)
    pictures = {name: _png(figure) for name, figure in charts.draw(records, table, reference).items()}
    page = ENVIRONMENT.get_template("page.html").render(
        title=folder.resolve().name, version=version(), date=date.today().isoformat(), folder=folder, left=left,
        agents=agents, free=free, envs=envs, records=records, table=table, reference=reference, tables=tables,
        pictures={name: base64.b64encode(png).decode() for name, png in pictures.items()},
        samples=_samples(records),
        fewest=min(map(len, table.scores.values()), default=0), statistics=statistics, captions=charts.CAPTIONS,
    )  # fmt: skip
    contents = {out.with_name(f"{out.stem}-{name}.png"): png for name, png in pictures.items()} | {out: page.encode()}
    for file, content in contents.items():
        try:
            with replacing(file) as temporary:
                temporary.write_bytes(content)
        except OSError as error:
            raise UserError(f"{file} cannot be written ({error.strerror or error}): choose another --out") from None
    return list(contents), left


def _samples(records: list[Record]) -> list[tuple[str, str]]:
    """Returns (what is shown, picture) of runs that aligned a flow and left samples of before and after."""
    files = [(r, r.folder / "before_after.png") for r in records]
    files = [(r, file) for r, file in files if file.is_file()][:MOST]
    return [(f"{r.agent}, {r.env}, seed {r.seed}", base64.b64encode(file.read_bytes()).decode()) for r, file in files]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(plotting.STYLE):
        figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()
