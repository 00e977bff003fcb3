"""Samples of a flow as a picture: images under conditions, or points in the plane over the data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import jax.random as jr
import numpy as np

from contraflow.core.plotting import COLOURS, drawing
from contraflow.core.types import PRNGKey
from contraflow.envs.align.generation import Problem
from contraflow.policy.base import Policy, act_batch

ROWS, EACH, POINTS = 10, 8, 1500


def samples(policy: Policy, cond: Any, key: PRNGKey) -> Any:
    """Returns a sample [n, d] in [-1, 1] for each condition [n, c]."""
    return jnp.clip(act_batch(policy, cond, key, 0), -1.0, 1.0)


def draw(problem: Problem, policies: Mapping[str, Policy], path: Path, key: PRNGKey) -> Path | None:
    """Writes a panel for each policy, by title, with the same noise in all. None if there is no picture of samples."""
    shape = getattr(problem, "shape", None)
    if shape is None and problem.sizes[0] != 2:
        return None
    k_cond, k_draw = jr.split(key)
    drawn = np.asarray(jnp.stack([problem.condition(k) for k in jr.split(k_cond, 64)]))
    cond = np.unique(drawn, axis=0)[::-1][:ROWS]
    height = 3.6 if shape is None else 0.2 + 3.4 * len(cond) / EACH
    with drawing(path, 3.4 * len(policies), height) as figure:
        grid = figure.subplots(1, len(policies), squeeze=False)[0]
        for axes, (title, policy) in zip(grid, policies.items(), strict=True):
            axes.set_title(title)
            if shape is None:
                _points(axes, problem, np.asarray(samples(policy, np.resize(cond, (POINTS, cond.shape[1])), k_draw)))
                continue
            x = np.asarray(samples(policy, np.repeat(cond, EACH, 0), k_draw))
            x = getattr(problem, "images", lambda x: x)(x).reshape(len(cond), EACH, *shape)
            x = np.pad(x, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=np.nan)
            axes.imshow(x.transpose(0, 2, 1, 3).reshape(len(cond) * (shape[0] + 1), -1), cmap="gray", vmin=-1, vmax=1)
            axes.set_axis_off()
    return path


def _points(axes: Any, problem: Problem, x: np.ndarray) -> None:
    data = problem.data()
    if data is not None:
        axes.hist2d(*data[1].T, bins=80, range=[[-1, 1], [-1, 1]], cmap="Greys")
    axes.scatter(*x.T, s=2, color=COLOURS[1], alpha=0.5, lw=0)
    axes.set(xlim=(-1, 1), ylim=(-1, 1), aspect="equal")
