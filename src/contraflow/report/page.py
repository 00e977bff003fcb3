"""The report: one HTML file that needs nothing else, and its charts as PNG files beside it."""

import base64
import io
import os
from collections.abc import Mapping, Sequence
from datetime import date
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from contraflow.config import VERSION, suggest
from contraflow.report import charts, inside
from contraflow.report.runs import LeftOut, Record, read
from contraflow.report.scores import Matrix, Scale, Table, collect, matrix, scales
from contraflow.report.statistics import REPS, Estimate, estimate, improvement, iqm, iqm_difference
from contraflow.runtime.variants import OWN
from contraflow.types import UserError

FAIR = (
    "steps", "collect", "num_envs", "updates", "batch_size", "n_step", "eval_every", "eval_episodes", "agent.width",
    "agent.depth", "agent.decay_steps", "agent.max_grad_norm", "agent.critic",
)  # fmt: skip
"""What a fair comparison wants the same for all, with all that lies below."""
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
ENOUGH = 5  # seeds, for a verdict
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
        _left_out(left, data),
        "<h2>Scores</h2>",
        f"<p>Returns: {escape(table.source)}. A step is one decision of the agent: environment steps are counted after "
        f"any action repeat inside the environment. Intervals: 95 %, stratified bootstrap, {REPS:,} resamples of the "
        f"seeds of each task. {_few(data)}</p>",
        _actor_free(records),
        _chart("iqm", pictures),
        _aggregates(table, data, reference),
        _chart("profiles", pictures),
        _chart("against", pictures),
        _verdict(table, data, reference),
        "<h2>Returns by task</h2>",
        "<p>Mean ± standard deviation over seeds, in brackets their number.</p>",
        _tasks(table, envs),
        _best(table, envs),
        "<h3>From returns to scores</h3>",
        _scales(scaled),
        "<h2>Learning curves</h2>",
        _chart("efficiency", pictures),
        *(_chart(f"curves-{by}", pictures) for by in charts.AXES),
        '<p class="note">Wall time is that of the machine as it was: runs at the same time slow each other down.</p>',
        f"<h2>Diagnostics</h2>{diagnostics}" if diagnostics else "",
        "<h2>Settings</h2>",
        _settings(records, agents),
        "<h2>Runs</h2>",
        _runs(records, folder),
        "<h2>Machine</h2>",
        _machines(records),
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


def _html(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = (), whole: bool = False) -> str:
    """A table; the columns in `numbers` are set to the right, with `whole` no cell is broken into lines."""

    def line(tag: str, cells: Sequence[str]) -> str:
        marks = [' class="n"' if i in numbers else "" for i in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{m}>{escape(c)}</{tag}>" for m, c in zip(marks, cells, strict=True)) + "</tr>"

    body = line("th", head) + "".join(line("td", row) for row in rows)
    return f'<div class="wide{" whole" if whole else ""}"><table>{body}</table></div>'


def _n(value: float) -> str:
    """Four significant digits, thousands in full."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _interval(e: Estimate) -> str:
    inside = f" [{float(e.low):.3f}, {float(e.high):.3f}]" if np.isfinite(e.low) else " (one run: no interval)"
    return f"{float(e.value):.3f}{inside}"


def _left_out(left: Sequence[LeftOut], data: Matrix) -> str:
    rows = [[item.place, item.reason] for item in left] + [["aggregates", note] for note in data.notes]
    if not rows:
        return "<p>Nothing was left out.</p>"
    return f'<div class="warn"><h2>Left out</h2>{_html(["what", "why"], rows)}</div>'


def _few(data: Matrix) -> str:
    counts = {len(scores) for scores in data.scores.values()}
    if counts and min(counts) < ENOUGH:
        return f"Some agents have only {min(counts)} complete seeds: intervals of fewer than {ENOUGH} are too narrow."
    return ""


def _actor_free(records: Sequence[Record]) -> str:
    if any(r.cost is not None and r.cost["nfe"] == 0 for r in records):
        return ""
    return '<p class="warn">No run here is of the actor-free agent `sir`: nothing shows what a critic does alone.</p>'


def _aggregates(table: Table, data: Matrix, reference: str) -> str:
    rows = []
    for method in table.methods:
        if method.name not in data.scores:
            continue
        scores, row = data.scores[method.name], [method.name, method.effort]
        row += [str(len(scores)), _interval(estimate(iqm, scores))]
        if reference in data.scores:
            same = method.name == reference
            base = data.scores[reference]
            row += ["", ""] if same else [
                _interval(estimate(iqm_difference, scores, base)), _interval(estimate(improvement, scores, base))
            ]  # fmt: skip
        rows.append(row)
    if not rows:
        return "<p>There is no task that all agents have finished, so nothing can be averaged over tasks.</p>"
    head = ["agent and rule", "one action", "seeds", "IQM"]
    head += [f"minus {reference}", f"better than {reference}"] if reference in data.scores else []
    return _html(head, rows, (2,))


def _verdict(table: Table, data: Matrix, reference: str) -> str:
    """Who is better than the reference, and who has not been shown to be."""
    lines = []
    for method in table.methods:
        if method.rule != OWN or method.name == reference or method.name not in data.scores:
            continue
        if reference not in data.scores:
            break
        gap = estimate(iqm_difference, data.scores[method.name], data.scores[reference])
        word = "has not been shown to differ from"
        if min(len(data.scores[method.name]), len(data.scores[reference])) < ENOUGH:
            word = f"has too few seeds (fewer than {ENOUGH}) for a verdict against"
        elif gap.low > 0 or gap.high < 0:
            word = "is ahead of" if gap.low > 0 else "is behind"
        lines.append(f"<li>{escape(method.name)} {word} {escape(reference)}: {_interval(gap)} in IQM.</li>")
    return f"<ul>{''.join(lines)}</ul>" if lines else ""


def _cell(values: Mapping[int, float] | None) -> str:
    if not values:
        return "-"
    numbers = np.array(list(values.values()))
    spread = f" ± {_n(float(numbers.std(ddof=1)))}" if len(numbers) > 1 else ""
    return f"{_n(float(numbers.mean()))}{spread} ({len(numbers)})"


def _tasks(table: Table, envs: Sequence[str]) -> str:
    rows = [[m.name, m.effort, *(_cell(table.returns[m.name].get(env)) for env in envs)] for m in table.methods]
    return _html(["agent and rule", "one action", *_breakable(envs)], rows, whole=True)


def _breakable(envs: Sequence[str]) -> list[str]:
    """Ids that a narrow column may break after their prefix."""
    return [env.replace(":", ": ") for env in envs]


def _best(table: Table, envs: Sequence[str]) -> str:
    """The same table for the best policy of each run, where that was evaluated."""
    own = {m.agent: m.effort for m in table.methods if m.rule == OWN}
    rows = [[a, own.get(a, ""), *(_cell(by_env.get(e)) for e in envs)] for a, by_env in sorted(table.best.items())]
    text = "<p>The best policy of each run by its own evaluations, on the same fresh episodes:</p>"
    return text + _html(["agent", "one action", *_breakable(envs)], rows, whole=True) if rows else ""


def _scales(scaled: Mapping[str, Scale | None]) -> str:
    rows = [
        [env, _n(s.low), _n(s.high), s.reason] if s else [env, "", "", "all returns are the same"]
        for env, s in scaled.items()
    ]
    return _html(["task", "0 is", "1 is", "why"], rows, (1, 2))


def _flat(value: Any, where: str = "") -> dict[str, str]:
    """Dotted names of nested settings; the kind of a part stands under its own name."""
    if isinstance(value, dict):
        out = {where: str(value["kind"])} if where and "kind" in value else {}
        for key, inner in value.items():
            if key != "kind":
                out |= _flat(inner, f"{where}.{key}".lstrip("."))
        return out
    if isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        return {k: v for i, inner in enumerate(value) for k, v in _flat(inner, f"{where}.{i}").items()}
    return {where: str(value)}


def _settings(records: Sequence[Record], agents: Sequence[str]) -> str:
    """What is the same for all, what is not though it should be, and what only some agents have."""
    by_agent: dict[str, dict[str, set[str]]] = {agent: {} for agent in agents}
    for record in records:
        for name, value in _flat(record.settings).items():
            if name not in ("env", "seed", "trackers"):
                by_agent[record.agent].setdefault(name, set()).add(value)
    names = list(dict.fromkeys(name for agent in agents for name in by_agent[agent]))
    own = {record.agent for record in records if record.own}
    head = ["setting", *(f"{agent} (own settings)" if agent in own else agent for agent in agents)]
    shared, unfair, others = [], [], []
    for name in names:
        cells = [" | ".join(sorted(by_agent[agent].get(name, {"-"}))) for agent in agents]
        present = {cell for cell in cells if cell != "-"}
        if any(name == fair or name.startswith(f"{fair}.") for fair in FAIR) and len(present) > 1:
            unfair.append([name, *cells])
        elif len(present) == 1 and "-" not in cells and "|" not in cells[0]:
            shared.append([name, cells[0]])
        else:
            others.append([name, *cells])
    out = ""
    if unfair:
        text = "<p><b>Not the same for all</b>, though a fair comparison would want it:</p>"
        out += f'<div class="warn">{text}{_html(head, unfair)}</div>'
    elif len(agents) > 1:
        out += "<p>Critic, widths, batch, updates per step, clipping and evaluation are the same for all agents.</p>"
    if shared:
        out += f"<h3>The same for all</h3>{_html(['setting', 'value'], shared)}"
    return out + (f"<h3>By agent</h3>{_html(head, others)}" if others else "")


def _versions(record: Record) -> dict[str, str]:
    found = dict(record.final.get("versions", {})) if record.final else {}
    return {"contraflow": record.version} | found


def _runs(records: Sequence[Record], folder: Path) -> str:
    rows = []
    for r in records:
        last = r.evaluations[-1]
        versions = ", ".join(f"{k} {v}" for k, v in _versions(r).items() if k in ("contraflow", "jax", "python"))
        rows.append(
            [
                r.folder.relative_to(folder).as_posix(), r.agent, r.env, str(r.seed), f"{last['step']:,.0f}",
                f"{r.updates(last['step']):,.0f}", f"{last['seconds'] / 60:.1f}", _n(last["return_mean"]), versions,
            ]
        )  # fmt: skip
    head = ["folder", "agent", "environment", "seed", "steps", "updates", "minutes", "last evaluation", "versions"]
    return _html(head, rows, (3, 4, 5, 6, 7))


def _machines(records: Sequence[Record]) -> str:
    """Machines and package versions, each with the number of runs that had it."""
    lines: dict[str, int] = {}
    for record in records:
        machine = record.final.get("machine") if record.final else None
        text = "not recorded" if not machine else ", ".join(f"{k}: {v}" for k, v in machine.items() if v)
        text += "; " + ", ".join(f"{k} {v}" for k, v in _versions(record).items())
        lines[text] = lines.get(text, 0) + 1
    return _html(["runs", "machine and versions"], [[str(n), text] for text, n in sorted(lines.items())], (0,))
