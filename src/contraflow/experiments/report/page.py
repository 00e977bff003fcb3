"""The report: one HTML file that needs nothing else, and its charts as PNG files beside it."""

import base64
import io
import os
from collections.abc import Mapping, Sequence
from datetime import date
from html import escape
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from contraflow.core.settings import VERSION, suggest
from contraflow.core.types import UserError
from contraflow.experiments.report import charts, inside, sections
from contraflow.experiments.report.runs import LeftOut, Record, read
from contraflow.experiments.report.scores import Matrix, Scale, Table, collect, matrix, scales
from contraflow.experiments.report.statistics import REPS

_CURVE = "mean over seeds, pointwise 95 % bootstrap interval of that mean. A finished run keeps its last value."
CAPTIONS = {
    "iqm": "Interquartile mean of the scores, over runs and tasks. Below each name, for one action: particles x "
    "evaluations of the actor for each (NFE), and critic calls (Q).",
    "profiles": "Performance profiles: share of runs above a score.",
    "against": "Against the reference: probability of improvement, averaged over tasks, and difference of the IQMs.",
    "efficiency": "Scores of the evaluations during training, over environment steps; pointwise 95 % intervals.",
    "curves-steps": f"Evaluation return against environment steps: {_CURVE}",
    "curves-updates": f"Evaluation return against gradient steps: {_CURVE}",
    "curves-time": f"Evaluation return against wall time: {_CURVE}",
    "by-time": "The regression target by flow time, at the last evaluation: mean, and range over environments.",
    "by-step": "The action law during training: mean, and range over environments.",
    "actions": "Exploratory actions at the end of training, all dimensions together; the grey line is uniform.",
}
CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 64rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: 0; }
h2 { font-size: 1.25rem; margin-top: 2.2rem; border-bottom: 1px solid #bbb; }
figure { margin: 1rem 0; } img { width: 100%; height: auto; } figcaption { color: #444; font-size: .9rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
th, td { padding: .2rem .7rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; } .whole td { white-space: nowrap; }
.note { color: #444; font-size: .9rem; }
.warn { border-left: 4px solid #d55e00; padding-left: .8rem; }
@media print { body { font-size: 10pt; margin: 0; max-width: none; } figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; } .wide { overflow: visible; } table { font-size: 7.5pt; } }
"""


def write_report(
    folder: Path, out: Path, scale: Mapping[str, tuple[float, float]], reference: str | None = None
) -> tuple[list[Path], list[LeftOut]]:
    """Write the page `out` and `<stem>-<chart>.png` beside it; the files, and what was left out of `folder`.

    `scale` gives (low, high) of environments; `reference` is the agent that the others are held against, by default the
    actor-free one. Raises UserError when there is nothing to report, or no agent of that name.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{out} is not the name of a page: give --out a name that ends in .html")
    if out.is_dir():
        raise UserError(f"{out} is a folder: give --out the name of a page")
    records, left = read(folder)
    envs = {record.env for record in records}
    for env in sorted(set(scale) - envs):
        raise UserError(f"the table of scales names {env}, which no finished run has; {suggest(env, envs)}")
    table = collect(records)
    names = sorted({record.agent for record in records})
    if reference is not None and reference not in names:
        raise UserError(f"there is no agent {reference} in {folder}; {suggest(reference, names)}")
    free = [r.agent for r in records if r.cost is not None and r.cost["nfe"] == 0]
    reference = reference or (free or names)[0]
    scaled = scales(records, table, scale)
    data = matrix(table, scaled)
    figures = draw(records, table, data, scaled, reference)
    out.parent.mkdir(parents=True, exist_ok=True)
    pictures = {name: _png(figure) for name, figure in figures.items()}
    files = [out.with_name(f"{out.stem}-{name}.png") for name in pictures]
    for file, png in zip(files, pictures.values(), strict=True):
        _write(file, png)
    _write(out, _page(folder, records, left, table, data, scaled, reference, pictures).encode())
    return [out, *files], left


def draw(
    records: Sequence[Record], table: Table, data: Matrix, scaled: Mapping[str, Scale | None], reference: str
) -> dict[str, Figure]:
    """All charts that the runs have data for, by the names in `CAPTIONS`."""
    look = charts.styles(sorted({record.agent for record in records}))
    out: dict[str, Figure | None] = {}
    with matplotlib.rc_context(charts.STYLE):
        if data.scores:
            out["iqm"] = charts.aggregate(data, table, look)
            out["profiles"] = charts.profiles(data, table, look)
            out["efficiency"] = charts.efficiency(records, data, scaled, look)
        if reference in data.scores and len(data.scores) > 1:
            out["against"] = charts.against(data, table, reference, look)
        for by in charts.AXES:
            out[f"curves-{by}"] = charts.curves(records, by, look)
        out["by-time"] = inside.by_time(records, look)
        out["by-step"] = inside.by_step(records, look)
        out["actions"] = inside.histograms(records, look)
    return {name: figure for name, figure in out.items() if figure is not None}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(charts.STYLE):
        figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _page(
    folder: Path,
    records: Sequence[Record],
    left: Sequence[LeftOut],
    table: Table,
    data: Matrix,
    scaled: Mapping[str, Scale | None],
    reference: str,
    pictures: Mapping[str, bytes],
) -> str:
    agents, envs = sorted({r.agent for r in records}), sorted({r.env for r in records})
    seeds = {r.seed for r in records}
    diagnostics = "".join(_chart(name, pictures) for name in ("by-time", "by-step", "actions"))
    title = escape(folder.resolve().name)
    parts = [
        f"<h1>{title}</h1>",
        f'<p class="note">{len(records)} runs: {len(agents)} agents, {len(envs)} environments, {len(seeds)} seeds. '
        f"contraflow {escape(VERSION)}, {date.today().isoformat()}.</p>",
        sections.left_out(left, data),
        "<h2>Scores</h2>",
        f"<p>Returns: {escape(table.source)}. A step is one decision of the agent: environment steps are counted after "
        f"any action repeat inside the environment. Intervals: 95 %, stratified bootstrap, {REPS:,} resamples of the "
        f"seeds of each task. {sections.few(data)}</p>",
        sections.actor_free(records),
        _chart("iqm", pictures),
        sections.aggregates(table, data, reference),
        _chart("profiles", pictures),
        _chart("against", pictures),
        sections.verdict(table, data, reference),
        "<h2>Returns by task</h2>",
        "<p>Mean ± standard deviation over seeds, in brackets their number.</p>",
        sections.tasks(table, envs),
        sections.best(table, envs),
        "<h3>From returns to scores</h3>",
        sections.scale_table(scaled),
        "<h2>Learning curves</h2>",
        _chart("efficiency", pictures),
        *(_chart(f"curves-{by}", pictures) for by in charts.AXES),
        '<p class="note">Wall time is that of the machine as it was: runs at the same time slow each other down.</p>',
        f"<h2>Diagnostics</h2>{diagnostics}" if diagnostics else "",
        "<h2>Settings</h2>",
        sections.settings(records, agents),
        "<h2>Runs</h2>",
        sections.runs(records, folder),
        "<h2>Machine</h2>",
        sections.machines(records),
    ]
    body = "\n".join(part for part in parts if part)
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<head><meta charset="utf-8"><title>{title}</title>{view}<style>{CSS}</style></head>'
    return f'<!doctype html>\n<html lang="en">{head}\n<body>\n{body}\n</body></html>\n'


def _chart(name: str, pictures: Mapping[str, bytes]) -> str:
    if name not in pictures:
        return ""
    caption = escape(CAPTIONS[name], quote=True)
    code = base64.b64encode(pictures[name]).decode()
    image = f'<img alt="{caption}" src="data:image/png;base64,{code}">'
    return f'<figure id="{name}">{image}<figcaption>{caption}</figcaption></figure>'
