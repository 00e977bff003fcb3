"""The charts of the diagnostics in a report: what the runs looked like from inside."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from contraflow.experiments.report.charts import Styles, legend, panels
from contraflow.experiments.report.runs import Record

TIMED = {
    "ess": "effective sample size",
    "eta": "control weight η",
    "target_bias": "error of the mean target",
    "reference_ess": "effective sample size of its reference",
}
SPOKEN = {
    "action_std": "standard deviation of actions",
    "saturated": "P(|a| > .95)",
    "action_entropy": "entropy per dimension, nats",
    "q_gap": "spread of Q / temperature",
}


def _diagnostics(record: Record) -> list[dict[str, float]]:
    cut = "diagnostics/"
    return [
        {key.removeprefix(cut): value for key, value in row.items()}
        for row in record.metrics
        if any(key.startswith(cut) for key in row)
    ]


def by_time(records: Sequence[Record], look: Styles) -> Figure | None:
    """ESS, η and target error against flow time at the end of training: mean over runs, range over environments."""
    last = [(record, rows[-1]) for record in records if (rows := _diagnostics(record))]
    names = [name for name in TIMED if any(key.startswith(f"{name}/") for _, row in last for key in row)]
    if not names:
        return None
    figure, axes = panels(len(names))
    for axis, name in zip(axes, names, strict=True):
        for agent in look:
            here = [(r.env, row) for r, row in last if r.agent == agent and any(k.startswith(f"{name}/") for k in row)]
            if not here:
                continue
            times = sorted(float(key.split("/")[1]) for key in here[0][1] if key.startswith(f"{name}/"))
            means = np.array([
                np.mean([[row[f"{name}/{t}"] for t in times] for env, row in here if env == one], axis=0)
                for one in sorted({env for env, _ in here})
            ])  # fmt: skip
            axis.fill_between(times, means.min(0), means.max(0), color=look[agent]["color"], alpha=0.15, lw=0)
            axis.plot(times, means.mean(0), label=agent, ms=5, lw=1.6, **look[agent])
        axis.set_title(TIMED[name])
        axis.set_xlabel("flow time t")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    legend(figure, axes)
    return figure


def by_step(records: Sequence[Record], look: Styles) -> Figure | None:
    """What the action law did during training: mean over runs, range over environments."""
    histories = [(record, rows) for record in records if (rows := _diagnostics(record))]
    names = [n for n in SPOKEN if any(n in row for _, rows in histories for row in rows)]
    if not names:
        return None
    figure, axes = panels(len(names))
    for axis, name in zip(axes, names, strict=True):
        for agent in look:
            by_env: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
            for record, rows in histories:
                points = np.array([(row["step"], row[name]) for row in rows if name in row])
                if record.agent == agent and len(points):
                    by_env.setdefault(record.env, []).append((points[:, 0], points[:, 1]))
            flat = [run for runs in by_env.values() for run in runs]
            if not flat:
                continue
            grid = np.unique(np.concatenate([x for x, _ in flat]))
            means = np.array([np.mean([np.interp(grid, *run) for run in runs], axis=0) for runs in by_env.values()])
            axis.fill_between(grid, means.min(0), means.max(0), color=look[agent]["color"], alpha=0.15, lw=0)
            axis.plot(grid, means.mean(0), label=agent, ms=4, lw=1.6, **look[agent])
        axis.set_title(SPOKEN[name])
        axis.set_xlabel("environment steps")
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.grid(alpha=0.3)
    legend(figure, axes)
    return figure


def histograms(records: Sequence[Record], look: Styles) -> Figure | None:
    """Histogram of exploratory actions, all dimensions together, at the end of training; a panel per environment."""
    last = [(r, rows[-1]) for r in records if (rows := [d for d in _diagnostics(r) if "action_share/0" in d])]
    if not last:
        return None
    envs = sorted({record.env for record, _ in last})
    figure, axes = panels(len(envs))
    for axis, env in zip(axes, envs, strict=True):
        for agent in look:
            rows = [row for r, row in last if r.env == env and r.agent == agent]
            if not rows:
                continue
            bins = sum(key.startswith("action_share/") for key in rows[0])
            share = np.mean([[row[f"action_share/{i}"] for i in range(bins)] for row in rows], axis=0)
            edges = np.linspace(-1, 1, bins + 1)
            style = look[agent]
            axis.stairs(share * bins / 2, edges, color=style["color"], ls=style["ls"], lw=1.6, label=agent)
        axis.axhline(0.5, color="#999999", lw=0.8)
        axis.set_title(env)
        axis.set_xlabel("action")
        axis.set_ylabel("density")
    legend(figure, axes)
    return figure
