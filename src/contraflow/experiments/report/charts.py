"""The charts of a report: matplotlib figures on white."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from contraflow.core import plotting
from contraflow.experiments.report.runs import Record
from contraflow.experiments.report.scores import Method, Table
from contraflow.experiments.report.statistics import Estimate, estimate, improvement, iqm, iqm_difference, profile
from contraflow.policy.best_of import ONE, UNIFORM
from contraflow.runtime.variants import OWN

RULES = {OWN: "o", ONE: "s", UNIFORM: "X"}
SWITCH: Any = {"xycoords": ("data", "axes fraction"), "va": "top", "fontsize": 8, "color": "#777777"}
WIDTH = 9.0  # inches, for every chart
CURVE = "mean over seeds, pointwise 95 % bootstrap interval of that mean. A finished run keeps its last value."
CAPTIONS = {
    "iqm": "Interquartile mean of the scores, over runs and tasks. Below each name, for one action: particles x "
    "evaluations of the actor for each (NFE), and critic calls (Q).",
    "profiles": "Performance profiles: share of runs above a score.",
    "against": "Against the reference: probability of improvement, averaged over tasks, and difference of the IQMs.",
    "efficiency": "Scores of the evaluations during training, over environment steps; pointwise 95 % intervals.",
    "curves-steps": f"Evaluation return against environment steps: {CURVE}",
    "curves-updates": f"Evaluation return against gradient steps: {CURVE}",
    "curves-time": f"Evaluation return against wall time: {CURVE}",
    "success-steps": "Share of episodes with success against environment steps: mean over seeds, as above.",
    "success-updates": "Share of episodes with success against gradient steps: mean over seeds, as above.",
    "by-time": "The regression target by flow time, at the last evaluation: mean, and range over environments.",
    "by-step": "The distribution of actions during training: mean, and range over environments.",
    "actions": "Exploratory actions at the end of training, all dimensions together; the grey line is uniform.",
}
AXES = {"steps": "environment steps", "updates": "gradient steps", "time": "minutes of wall time"}
TIMED = {
    "ess": "effective sample size", "eta": "control weight η", "target_bias": "error of the mean target",
    "reference_ess": "effective sample size of its reference",
}  # fmt: skip
STEPPED = {
    "action_std": "standard deviation of actions", "saturated": "P(|a| > .95)",
    "action_entropy": "entropy per dimension, nats", "q_gap": "spread of Q / temperature",
}  # fmt: skip
Styles = Mapping[str, dict[str, Any]]
Line = tuple[np.ndarray, Estimate]
Panels = dict[str, dict[str, Line]]
"""title -> agent -> (x, values with a band)"""
Sample = tuple[str, str, str, Any, Any]
"""title, agent, environment, x, y: the data of one run for a panel"""


def draw(records: Sequence[Record], table: Table, reference: str) -> dict[str, Figure]:
    """Draws all charts that the runs have data for, by the names in `CAPTIONS`."""
    look = styles(sorted({record.agent for record in records}))
    methods = [method for method in table.methods if method.name in table.scores]
    out: dict[str, Figure | None] = {}
    with matplotlib.rc_context(plotting.STYLE):
        if methods:
            rows = {f"{m.name}\n{m.effort}": (m, [estimate(iqm, table.scores[m.name])]) for m in methods}
            label = "interquartile mean of the scores"
            out["iqm"] = _bars(rows, {f"{label}, 95 % interval (stratified bootstrap)": None}, look)
            shares = _profiles(table, methods)
            out["profiles"] = _lines({"": shares}, look, "score", "share of runs above it", marker="")
            out["efficiency"] = _lines({"": dict(_efficiency(records, table, look))}, look, AXES["steps"], label)
        if reference in table.scores and len(methods) > 1:
            pairs = {m: (table.scores[m.name], table.scores[reference]) for m in methods if m.name != reference}
            rows = {m.name: (m, [estimate(f, *p) for f in (improvement, iqm_difference)]) for m, p in pairs.items()}
            label = f"probability that a run is better\nthan one of {reference}"
            out["against"] = _bars(rows, {label: 0.5, f"IQM minus that of {reference}": 0.0}, look)
        for by, label in AXES.items():
            switches = _switches(records, by)
            out[f"curves-{by}"] = _lines(_curves(records, by), look, label, "evaluation return", switches=switches)
            if by != "time":
                won = _curves(records, by, "success")
                out[f"success-{by}"] = _lines(won, look, label, "success", bottom=-0.02, switches=switches)
        out["by-time"] = _lines(_over_environments(_timed(records)), look, "flow time t", bottom=0.0)
        out["by-step"] = _lines(_over_environments(_stepped(records)), look, "environment steps")
        shares = _over_environments(_shares(records))
        out["actions"] = _lines(shares, look, "action", "density", level=0.5, marker="", drawstyle="steps-mid")
    return {name: figure for name, figure in out.items() if figure is not None}


def styles(agents: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns colour, dash and marker of each agent for all charts."""
    return {agent: plotting.look(i) for i, agent in enumerate(sorted(agents))}


def _figure(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).ravel())


def _bars(rows: Mapping[str, tuple[Method, list[Estimate]]], zeros: Mapping[str, float | None], look: Styles) -> Figure:
    """Draws a row for each method and a column for each quantity with its interval; `zeros` marks no difference."""
    figure, axes = _figure(1, len(zeros), 1.3 + 0.36 * len(rows), sharey=True)
    for i, (axis, (label, zero)) in enumerate(zip(axes, zeros.items(), strict=True)):
        for y, (method, estimates) in enumerate(rows.values()):
            e, style = estimates[i], {"color": look[method.agent]["color"]}
            if np.isfinite(e.low):
                axis.plot([float(e.low), float(e.high)], [y, y], lw=2.5, solid_capstyle="butt", **style)
            axis.plot([float(e.value)], [y], RULES.get(method.rule, "D"), ms=8, mec="white", mew=0.8, **style)
        if zero is not None:
            axis.axvline(zero, color="#777777", lw=1)
        if zero == 0.5:
            axis.set_xlim(-0.03, 1.03)
        axis.set_xlabel(label)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(rows)), list(rows), fontsize=8.5)
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    return figure


def _lines(
    panels: Panels,
    look: Styles,
    x: str,
    y: str = "",
    level: float | None = None,
    bottom: float | None = None,
    switches: Mapping[str, set[float]] = MappingProxyType({}),
    **style: Any,
) -> Figure | None:
    """Draws a panel for each title, two or three in a row, with one legend; returns None if there are no lines.

    `switches` says by title where runs went online.
    """
    panels = {title: lines for title, lines in panels.items() if lines}
    if not panels:
        return None
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure, axes = _figure(rows, columns, 4.0 if "" in panels else 0.8 + 2.5 * rows)
    handles: dict[str, Any] = {}
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        for agent, (places, values) in lines.items():
            mine = look[agent] | ({"marker": ""} if len(places) > 30 else {}) | style
            axis.fill_between(places, values.low, values.high, color=mine["color"], alpha=0.15, lw=0)
            (handles[agent],) = axis.plot(places, values.value, lw=1.6, ms=4, **mine)
        if level is not None:
            axis.axhline(level, color="#999999", lw=0.8)
        for place in switches.get(title, ()):
            axis.axvline(place, color="#777777", lw=0.8)
            axis.annotate(" online", (place, 1), **SWITCH)
        axis.set(title=title, xlabel=x, ylabel=y)
        axis.set_ylim(bottom=bottom)
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.ticklabel_format(axis="x", style="sci", scilimits=(-2, 4))
    names = sorted(handles)
    place = {"loc": "outside lower center", "ncols": min(5, len(names)), "frameon": False}
    figure.legend([handles[name] for name in names], names, **place)
    return figure


def _profiles(table: Table, methods: Sequence[Method]) -> dict[str, Line]:
    """Returns the share of runs with a score above each level, by agent, each acting by its own rule."""
    own = {m.agent: table.scores[m.name] for m in methods if m.rule == OWN}
    low, high = min(s.min() for s in own.values()), max(s.max() for s in own.values())
    margin = 0.05 * max(high - low, 0.1)
    levels = np.linspace(min(low, 0.0) - margin, high + margin, 201)
    return {a: (levels, estimate(lambda s: profile(s, levels), scores, reps=2_000)) for a, scores in own.items()}


def _switches(records: Sequence[Record], by: str) -> dict[str, set[float]]:
    """Returns where the runs of each environment went online."""
    out: dict[str, set[float]] = {}
    for record in records:
        if (place := record.switch(by)) is not None:
            out.setdefault(record.env, set()).add(place)
    return out


def _curves(records: Sequence[Record], by: str, value: str = "return_mean") -> Panels:
    """Returns means over runs with a pointwise bootstrap band, from where all have a value; linear in between.

    A finished run keeps its last value, because a fast one may end before a slow one is evaluated for the first time.
    """
    panels: Panels = {}
    for env, agent in sorted({(record.env, record.agent) for record in records}):
        curves = [r.curve(by, value) for r in records if (r.env, r.agent) == (env, agent)]
        if runs := [curve for curve in curves if curve is not None]:
            grid = np.unique(np.concatenate([x for x, _ in runs]))
            grid = grid[grid >= max(x[0] for x, _ in runs)]
            values = np.stack([np.interp(grid, *run) for run in runs])
            panels.setdefault(env, {})[agent] = grid, estimate(lambda s: s.mean(-2), values, reps=1_000)
    return panels


def _efficiency(records: Sequence[Record], table: Table, agents: Iterable[str]) -> Iterator[tuple[str, Line]]:
    """Yields the IQM of scores during training, over all runs and tasks, against environment steps."""
    for agent in agents:
        runs = {(r.env, r.seed): curve for r in records if r.agent == agent and (curve := r.curve("steps")) is not None}
        seeds = sorted({seed for _, seed in runs if all((env, seed) in runs for env in table.tasks)})
        used = [(table.tasks[env], *runs[env, seed]) for seed in seeds for env in table.tasks]
        grid = np.unique(np.concatenate([x for _, x, _ in used])) if used else np.zeros(0)
        grid = grid[[max(x[0] for _, x, _ in used) <= at <= min(x[-1] for _, x, _ in used) for at in grid]]
        if grid.size:
            values = [scale(np.interp(grid, x, y)) for scale, x, y in used]
            scores = np.array(values).reshape(len(seeds), len(table.tasks), grid.size)
            at = [estimate(iqm, scores[..., i], reps=1_000) for i in range(grid.size)]
            yield agent, (grid, Estimate(*np.array([[e.value, e.low, e.high] for e in at], float).T))


def _over_environments(samples: Iterable[Sample]) -> Panels:
    """Returns means over runs, with the range over environments as a band."""
    panels: Any = {}
    for title, agent, env, x, y in samples:
        panels.setdefault(title, {}).setdefault(agent, {}).setdefault(env, []).append((x, y))
    for lines in panels.values():
        for agent, by_env in lines.items():
            grid = np.unique(np.concatenate([x for runs in by_env.values() for x, _ in runs]))
            means = np.array([np.mean([np.interp(grid, *run) for run in runs], axis=0) for runs in by_env.values()])
            lines[agent] = grid, Estimate(means.mean(0), means.min(0), means.max(0))
    return panels


def _timed(records: Sequence[Record]) -> Iterator[Sample]:
    """Yields ESS, η and target error against flow time at the end of training."""
    for name, title in TIMED.items():
        for r in (r for r in records if r.diagnostics):
            points = {float(k.split("/")[1]): v for k, v in r.diagnostics[-1].items() if k.startswith(f"{name}/")}
            if points:
                yield title, r.agent, r.env, *map(np.array, zip(*sorted(points.items()), strict=True))


def _stepped(records: Sequence[Record]) -> Iterator[Sample]:
    """Yields statistics of the action distribution during training."""
    for name, title in STEPPED.items():
        for r in records:
            if points := [(row["step"], row[name]) for row in r.diagnostics if name in row]:
                yield title, r.agent, r.env, *np.array(points, float).T


def _shares(records: Sequence[Record]) -> Iterator[Sample]:
    """Yields densities of exploring actions at the end of training, all dimensions together, per environment."""
    for r in sorted(records, key=lambda r: r.env):
        row = r.diagnostics[-1] if r.diagnostics else {}
        share = np.array([row[f"action_share/{i}"] for i in range(sum(key.startswith("action_share/") for key in row))])
        if n := len(share):
            places = np.clip((2 * np.arange(-1, n + 1) + 1) / n - 1, -1, 1)  # the centres and both ends
            yield r.env, r.agent, r.env, places, np.pad(share, 1, "edge") * n / 2
