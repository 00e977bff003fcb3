"""The learning curve of one run as a picture."""

from pathlib import Path

from contraflow.core.plotting import drawing
from contraflow.training.log import read_evaluations


def plot_curve(folder: Path, switch: int | None = None) -> Path | None:
    """Write `folder`/curve.png from eval.csv: mean return and range over episodes, and a line at the step of a `switch`
    from recorded data to the environment. None if nothing was evaluated."""
    rows = read_evaluations(folder)
    if not rows:
        return None
    path = folder / "curve.png"
    with drawing(path, 5.5, 3.4) as figure:
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
        if switch is not None and steps[-1] > switch:
            axes.axvline(switch, color="#777777", lw=0.8)
            axes.annotate(
                " online", (switch, 1), xycoords=("data", "axes fraction"), va="top", fontsize=8, color="#777777"
            )
        axes.set_xlabel("environment steps" if switch is None else "gradient steps, then environment steps")
        axes.set_ylabel("evaluation return")
        axes.set_title(folder.name)
        axes.legend()
        axes.grid(alpha=0.3)
    return path
