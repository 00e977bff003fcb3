"""One style for every plot. matplotlib is imported when a plot is made, because that takes longer than all else.

The colours are those of Okabe and Ito. Colours, dashes and markers together stay distinguishable for colour-blind
readers and in grey prints.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
DASHES, MARKERS = ("-", "--", "-.", ":"), "osD^vP*X"
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 10,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": f"cycler('color', {list(COLOURS)})",
    "savefig.dpi": 200,
}


def look(i: int) -> dict[str, Any]:
    """Colour, dash and marker of line `i`, as arguments of `Axes.plot`; the first 28 differ in colour or dash."""
    n = len(COLOURS)
    dash = DASHES[(i + 2 * (i // n)) % len(DASHES)]
    return {"color": COLOURS[i % n], "linestyle": dash, "marker": MARKERS[i % len(MARKERS)]}


@contextmanager
def drawing(path: Path, width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure of that many inches, which is written to `path` when the block ends."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(path)
