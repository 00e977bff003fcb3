"""The picture of a comparison: samples on the density, and the trajectories of the samples."""

from collections.abc import Sequence
from pathlib import Path as File
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from contraflow.core.plotting import drawing
from contraflow.sampling.targets import Target

INK, DOT, START, ROUTE = "#1b2a41", "#c8102e", "#7a869a", "#3f6fb5"


def plot_comparison(file: File, target: Target, panels: Sequence[tuple[str, Any, Any]], box: float) -> None:
    """Writes a PNG with one column per panel (title, samples [n, d], trajectories [m, steps + 1, d] or None).

    The axes are the two coordinates that the target shows.
    """
    view = _view(target, box)
    line = jnp.linspace(-view, view, 300)
    table = jnp.stack(jnp.meshgrid(line, line), -1)
    density = np.asarray(jax.vmap(jax.vmap(target.plane))(table))
    first, second = target.shown
    density = np.exp(density - density.max())
    with drawing(file, 2.3 * len(panels), 5.0) as figure:
        axes = figure.subplots(2, len(panels), sharex=True, sharey=True, squeeze=False)
        for (top, bottom), (title, samples, routes) in zip(axes.T, panels, strict=True):
            for axis in (top, bottom):
                axis.contourf(line, line, density, levels=np.linspace(0.02, 1.0, 8), cmap="Blues", alpha=0.75)
                axis.set(xlim=(-view, view), ylim=(-view, view), aspect="equal", xticks=(), yticks=())
            dots = np.asarray(samples)[:1200, target.shown]
            top.plot(*dots.T, ".", ms=2.2, mew=0, color=DOT, alpha=0.65, rasterized=True)
            top.set_title(title, fontsize=9.5, color=INK)
            if routes is None:
                bottom.text(0, 0, "no closed form", ha="center", va="center", fontsize=8, color=INK)
                continue
            routes = np.asarray(routes)[:, :, target.shown]
            for route in routes:
                bottom.plot(*route.T, color=ROUTE, lw=0.6, alpha=0.7)
            bottom.plot(*routes[:, 0].T, "o", ms=2.2, mfc="white", mec=START, mew=0.6, label="noise, $t = 0$")
            bottom.plot(*routes[:, -1].T, "o", ms=2.4, mew=0, color=DOT, label="sample, $t = 1$")
        plane = "" if target.dim == 2 else f", $x_{{{first + 1}}}$ and $x_{{{second + 1}}}$"
        axes[0, 0].set_ylabel(f"samples on the density{plane}", fontsize=9, color=INK)
        axes[1, 0].set_ylabel("trajectories", fontsize=9, color=INK)
        handles, labels = axes[1, -1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)


def _view(target: Target, box: float) -> float:
    """Returns half the side of the smallest square that holds the target and the noise, at most `box`."""
    points = jnp.abs(target.sample(jax.random.key(0), 2000)[:, target.shown])
    return min(box, max(2.8, 1.05 * float(jnp.max(points))))
