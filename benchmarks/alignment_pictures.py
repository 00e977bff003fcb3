"""Pictures of what benchmarks/alignment.py trained.

python benchmarks/alignment_pictures.py curves                       # docs/img/alignment.png
python benchmarks/alignment_pictures.py gallery --runs runs/align    # docs/img/digits.png
"""

from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from alignment import FRONTIER
from common import DATA, read

from contraflow.core.plotting import drawing, look
from contraflow.policy.artifact import load_policy

PANELS = (("mixture2d", "moved", "reward"), ("digits", "spread", "approved"))
LABELS = {
    "moved": "KL from the reference, nats", "reward": "reward", "spread": "spread within a class, of that of the data",
    "approved": "share approved by the judge",
}  # fmt: skip
SHOWN = ("", "rfm-align", "nft", "awm", "flow-grpo", "mix-grpo", "rwr")


def curves(file: Path) -> None:
    """Mean curves of training: reward over divergence from the reference, and approval over what is left of variety."""
    rows = read(file)
    names = [m for m in dict.fromkeys(row["method"] for row in rows) if m != FRONTIER]
    with drawing(DATA.parent / "img" / "alignment.png", 9.0, 4.2) as figure:
        axes = figure.subplots(1, 2)
        for ax, (name, across, up) in zip(axes, PANELS, strict=True):
            mine = [row for row in rows if row["problem"] == name]
            if exact := [row for row in mine if row["method"] == FRONTIER]:
                ax.plot([r[across] for r in exact], [r[up] for r in exact], color="0.6", lw=4, zorder=0, label=FRONTIER)
            for i, method in enumerate(names):
                of = [row for row in mine if row["method"] == method]
                counts = sorted({row["rewards"] for row in of})
                point = lambda c, n, of=of: np.mean([row[c] for row in of if row["rewards"] == n])
                xs, ys = ([point(c, n) for n in counts] for c in (across, up))
                ax.plot(xs, ys, ms=3, lw=1, label=method, **look(i))
            ax.set(title=name, xlabel=LABELS[across], ylabel=LABELS[up])
        axes[0].set(xlim=(-0.2, 7.0), ylim=(0.15, 1.02))
        axes[1].invert_xaxis()
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=7)


def gallery(runs: Path) -> None:
    """Digits before alignment and after six methods, two of each class from the same noise."""
    cond = jnp.repeat(jnp.eye(10), 2, 0)
    keys = jr.split(jr.key(3), 20)
    with drawing(DATA.parent / "img" / "digits.png", 9.0, 0.62 * len(SHOWN)) as figure:
        axes = figure.subplots(len(SHOWN), 1)
        for ax, method in zip(axes, SHOWN, strict=True):
            folder = runs / (f"digits-{method}" if method else "digits/policy")
            x = jax.vmap(load_policy(folder)[0])(cond, keys)
            ax.imshow(np.asarray(x).reshape(20, 8, 8).transpose(1, 0, 2).reshape(8, 160), cmap="gray", vmin=-1, vmax=1)
            ax.set(xticks=(), yticks=())
            ax.set_ylabel(method or "before", rotation=0, ha="right", va="center", fontsize=9)


def main(what: Literal["curves", "gallery"], /, runs: Path = Path("runs/align")) -> None:
    curves(DATA / "alignment.csv") if what == "curves" else gallery(runs)


if __name__ == "__main__":
    tyro.cli(main)
