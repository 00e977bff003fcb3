"""The charts of a report: matplotlib figures on white, in colours (Okabe and Ito) that colour-blind readers and grey
printers can tell apart together with line styles and markers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from contraflow.experiments.report.runs import Record
from contraflow.experiments.report.scores import Matrix, Scale, Table
from contraflow.experiments.report.statistics import Estimate, estimate, improvement, iqm, iqm_difference, profile
from contraflow.runtime.variants import ONE, OWN, UNIFORM

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vP*X"
RULES = {OWN: "o", ONE: "s", UNIFORM: "X"}
STYLE: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}
WIDTH = 9.0  # inches; every chart is as wide
Styles = Mapping[str, dict[str, Any]]


def styles(agents: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, dash and marker of each agent, the same in every chart; colour and dash together tell 28 agents apart."""
    return {
        agent: {
            "color": COLOURS[i % len(COLOURS)],
            "ls": DASHES[(i + 2 * (i // len(COLOURS))) % len(DASHES)],
            "marker": MARKERS[i % len(MARKERS)],
        }
        for i, agent in enumerate(sorted(agents))
    }


def _figure(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def panels(count: int) -> tuple[Figure, list[Any]]:
    """A figure with `count` panels, two or three in a row."""
    columns = 2 if count == 4 else min(count, 3)
    rows = -(-count // columns)
    figure, axes = _figure(rows, columns, 0.8 + 2.5 * rows)
    flat = list(axes.ravel())
    for axis in flat[count:]:
        axis.remove()
    return figure, flat[:count]


def legend(figure: Figure, axes: Sequence[Any]) -> None:
    """One legend below, of all that any panel shows."""
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        labels = sorted(entries)
        handles = [entries[label] for label in labels]
        figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False)


def _bar(axis: Any, y: float, value: Estimate, **style: Any) -> None:
    if np.isfinite(value.low):
        axis.plot([float(value.low), float(value.high)], [y, y], lw=2.5, color=style["color"], solid_capstyle="butt")
    axis.plot([float(value.value)], [y], ls="", ms=8, mec="white", mew=0.8, **style)


def aggregate(data: Matrix, table: Table, look: Styles) -> Figure:
    """IQM of the scores of every method with its interval, and what one action costs."""
    methods = [m for m in table.methods if m.name in data.scores]
    figure, ((axis,),) = _figure(1, 1, 1.2 + 0.36 * len(methods))
    for y, method in enumerate(methods):
        style = {"color": look[method.agent]["color"], "marker": RULES.get(method.rule, "D")}
        _bar(axis, y, estimate(iqm, data.scores[method.name]), **style)
    axis.set_yticks(range(len(methods)), [f"{m.name}\n{m.effort}" for m in methods], fontsize=8.5)
    axis.set_ylim(len(methods) - 0.4, -0.6)
    axis.set_xlabel("interquartile mean of the scores, 95 % interval (stratified bootstrap)")
    axis.grid(axis="x", alpha=0.3)
    return figure


def profiles(data: Matrix, table: Table, look: Styles) -> Figure:
    """Share of runs with a score above each level, by agent, with its own rule."""
    figure, ((axis,),) = _figure(1, 1, 4.0)
    own = {m.agent: data.scores[m.name] for m in table.methods if m.rule == OWN and m.name in data.scores}
    low, high = min(s.min() for s in own.values()), max(s.max() for s in own.values())
    margin = 0.05 * max(high - low, 0.1)
    levels = np.linspace(min(low, 0.0) - margin, high + margin, 201)
    for agent, scores in own.items():
        at = estimate(lambda s: profile(s, levels), scores, reps=2_000)
        color, ls = look[agent]["color"], look[agent]["ls"]
        axis.fill_between(levels, at.low, at.high, color=color, alpha=0.15, lw=0)
        axis.plot(levels, at.value, color=color, ls=ls, lw=1.8, label=agent)
    axis.set_xlabel("score")
    axis.set_ylabel("share of runs above it")
    axis.set_ylim(-0.02, 1.02)
    axis.grid(alpha=0.3)
    legend(figure, [axis])
    return figure


def against(data: Matrix, table: Table, reference: str, look: Styles) -> Figure:
    """Every method against the reference: probability of improvement, and difference of the IQMs."""
    base = data.scores[reference]
    methods = [m for m in table.methods if m.name in data.scores and m.name != reference]
    figure, ((left, right),) = _figure(1, 2, 1.3 + 0.36 * len(methods), sharey=True)
    for y, method in enumerate(methods):
        style = {"color": look[method.agent]["color"], "marker": RULES.get(method.rule, "D")}
        _bar(left, y, estimate(improvement, data.scores[method.name], base), **style)
        _bar(right, y, estimate(iqm_difference, data.scores[method.name], base), **style)
    left.set_yticks(range(len(methods)), [m.name for m in methods], fontsize=8.5)
    left.set_ylim(len(methods) - 0.4, -0.6)
    left.set_xlim(-0.03, 1.03)
    left.axvline(0.5, color="#777777", lw=1)
    right.axvline(0.0, color="#777777", lw=1)
    left.set_xlabel(f"probability that a run is better\nthan one of {reference}")
    right.set_xlabel(f"IQM minus that of {reference}")
    for axis in (left, right):
        axis.grid(axis="x", alpha=0.3)
    return figure


def _curve(axis: Any, runs: Sequence[tuple[np.ndarray, np.ndarray]], style: Mapping[str, Any], label: str) -> None:
    """Mean over runs with a pointwise bootstrap band, from where all have a value; linear between evaluations.

    A run that is finished keeps its last value: a fast one may end before a slow one is evaluated for the first time.
    """
    grid = np.unique(np.concatenate([x for x, _ in runs]))
    grid = grid[grid >= max(x[0] for x, _ in runs)]
    values = np.stack([np.interp(grid, x, y) for x, y in runs])
    band = estimate(lambda s: s.mean(-2), values, reps=1_000)
    axis.fill_between(grid, band.low, band.high, color=style["color"], alpha=0.15, lw=0)
    few = {"marker": style["marker"], "ms": 4} if grid.size <= 30 else {}
    axis.plot(grid, band.value, color=style["color"], ls=style["ls"], lw=1.6, label=label, **few)


AXES: dict[str, tuple[str, Callable[[Record, dict[str, float]], float]]] = {
    "steps": ("environment steps", lambda record, row: row["step"]),
    "updates": ("gradient steps", lambda record, row: record.updates(row["step"])),
    "time": ("minutes of wall time", lambda record, row: row["seconds"] / 60),
}


def curves(records: Sequence[Record], by: str, look: Styles) -> Figure:
    """Evaluation return during training against `by`, a panel for each environment."""
    name, place = AXES[by]
    envs = sorted({record.env for record in records})
    figure, axes = panels(len(envs))
    for axis, env in zip(axes, envs, strict=True):
        for agent in look:
            runs = [r for r in records if r.env == env and r.agent == agent]
            lines = [
                (
                    np.array([place(r, row) for row in r.evaluations]),
                    np.array([row["return_mean"] for row in r.evaluations]),
                )
                for r in runs
            ]
            if lines:
                _curve(axis, lines, look[agent], agent)
        axis.set_title(env)
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.ticklabel_format(axis="x", style="sci", scilimits=(-2, 4))
        axis.set_xlabel(name)
        axis.set_ylabel("evaluation return")
    legend(figure, axes)
    return figure


def efficiency(records: Sequence[Record], data: Matrix, scale: Mapping[str, Scale | None], look: Styles) -> Figure:
    """IQM over all runs and tasks of the scores of the evaluations during training, against environment steps."""
    figure, ((axis,),) = _figure(1, 1, 4.0)
    for agent in look:
        runs = {(r.env, r.seed): r for r in records if r.agent == agent}
        seeds = sorted({seed for _, seed in runs if all((env, seed) in runs for env in data.tasks)})
        used = [runs[env, seed] for seed in seeds for env in data.tasks]
        if not used:
            continue
        grid = np.unique([row["step"] for r in used for row in r.evaluations])
        low, high = (f(r.evaluations[i]["step"] for r in used) for f, i in ((max, 0), (min, -1)))
        grid = grid[(grid >= low) & (grid <= high)]
        if not grid.size:
            continue
        values = [_scored(r, grid, scale[r.env]) for r in used]
        scores = np.array(values).reshape(len(seeds), len(data.tasks), grid.size)
        at = [estimate(iqm, scores[..., i], reps=1_000) for i in range(grid.size)]
        low, value, high = np.array([[a.low, a.value, a.high] for a in at], float).T
        axis.fill_between(grid, low, high, color=look[agent]["color"], alpha=0.15, lw=0)
        axis.plot(grid, value, label=agent, ms=4, lw=1.6, **look[agent])
    axis.set_xlabel("environment steps")
    axis.set_ylabel("interquartile mean of the scores")
    axis.grid(alpha=0.3)
    legend(figure, [axis])
    return figure


def _scored(record: Record, grid: np.ndarray, scale: Scale | None) -> np.ndarray:
    """Scores of the evaluations of a run, at the steps of `grid`."""
    assert scale is not None, "tasks of the matrix have a scale"
    steps, returns = ([row[name] for row in record.evaluations] for name in ("step", "return_mean"))
    return scale(np.interp(grid, steps, returns))
