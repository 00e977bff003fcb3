"""The tables and sentences of the report, each a piece of HTML made of finished runs."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from contraflow.experiments.report.runs import LeftOut, Record
from contraflow.experiments.report.scores import Matrix, Scale, Table
from contraflow.experiments.report.statistics import Estimate, estimate, improvement, iqm, iqm_difference
from contraflow.runtime.variants import OWN

FAIR = (
    "steps", "collect", "num_envs", "updates", "batch_size", "n_step", "eval_every", "eval_episodes", "agent.width",
    "agent.depth", "agent.decay_steps", "agent.max_grad_norm", "agent.critic",
)  # fmt: skip
"""What a fair comparison wants the same for all, with all that lies below."""
ENOUGH = 5  # seeds, for a verdict


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


def left_out(left: Sequence[LeftOut], data: Matrix) -> str:
    """What was not taken, and why."""
    rows = [[item.place, item.reason] for item in left] + [["aggregates", note] for note in data.notes]
    if not rows:
        return "<p>Nothing was left out.</p>"
    return f'<div class="warn"><h2>Left out</h2>{_html(["what", "why"], rows)}</div>'


def few(data: Matrix) -> str:
    """A warning where intervals are too narrow to be believed."""
    counts = {len(scores) for scores in data.scores.values()}
    if counts and min(counts) < ENOUGH:
        return f"Some agents have only {min(counts)} complete seeds: intervals of fewer than {ENOUGH} are too narrow."
    return ""


def actor_free(records: Sequence[Record]) -> str:
    """A warning where nothing shows what a critic does alone."""
    if any(r.cost is not None and r.cost["nfe"] == 0 for r in records):
        return ""
    return '<p class="warn">No run here is of the actor-free agent `sir`: nothing shows what a critic does alone.</p>'


def aggregates(table: Table, data: Matrix, reference: str) -> str:
    """Interquartile means of the scores, and against `reference`, with intervals."""
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


def verdict(table: Table, data: Matrix, reference: str) -> str:
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


def tasks(table: Table, envs: Sequence[str]) -> str:
    """Mean and standard deviation of returns by task."""
    rows = [[m.name, m.effort, *(_cell(table.returns[m.name].get(env)) for env in envs)] for m in table.methods]
    return _html(["agent and rule", "one action", *_breakable(envs)], rows, whole=True)


def _breakable(envs: Sequence[str]) -> list[str]:
    """Ids that a narrow column may break after their prefix."""
    return [env.replace(":", ": ") for env in envs]


def best(table: Table, envs: Sequence[str]) -> str:
    """The same table for the best policy of each run, where that was evaluated."""
    own = {m.agent: m.effort for m in table.methods if m.rule == OWN}
    rows = [[a, own.get(a, ""), *(_cell(by_env.get(e)) for e in envs)] for a, by_env in sorted(table.best.items())]
    text = "<p>The best policy of each run by its own evaluations, on the same fresh episodes:</p>"
    return text + _html(["agent", "one action", *_breakable(envs)], rows, whole=True) if rows else ""


def scale_table(scaled: Mapping[str, Scale | None]) -> str:
    """The returns that are score 0 and 1, by task."""
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


def settings(records: Sequence[Record], agents: Sequence[str]) -> str:
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


def runs(records: Sequence[Record], folder: Path) -> str:
    """One row for each run."""
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


def machines(records: Sequence[Record]) -> str:
    """Machines and package versions, each with the number of runs that had it."""
    lines: dict[str, int] = {}
    for record in records:
        machine = record.final.get("machine") if record.final else None
        text = "not recorded" if not machine else ", ".join(f"{k}: {v}" for k, v in machine.items() if v)
        text += "; " + ", ".join(f"{k} {v}" for k, v in _versions(record).items())
        lines[text] = lines.get(text, 0) + 1
    return _html(["runs", "machine and versions"], [[str(n), text] for text, n in sorted(lines.items())], (0,))
