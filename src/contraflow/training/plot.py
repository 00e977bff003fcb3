"""The learning curve of one run as a picture."""

from pathlib import Path

from contraflow.training.log import read_evaluations


def plot_curve(folder: Path) -> Path | None:
    """Write `folder`/curve.png from eval.csv: mean return and range over episodes. None if nothing was evaluated."""
    rows = read_evaluations(folder)
    if not rows:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [row["step"] for row in rows]
    axes.fill_between(
        steps,
        [r["return_min"] for r in rows],
        [r["return_max"] for r in rows],
        alpha=0.2,
        lw=0,
        label="range of episodes",
    )
    axes.plot(steps, [row["return_mean"] for row in rows], marker="o", ms=3, label="mean")
    axes.set_xlabel("environment steps")
    axes.set_ylabel("evaluation return")
    axes.set_title(folder.name, fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    path = folder / "curve.png"
    figure.savefig(path, dpi=150)
    return path
