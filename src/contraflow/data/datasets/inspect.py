"""What a dataset holds, and what about it may be wrong."""

import numpy as np

from contraflow.core.bounds import ROUNDING, range_text
from contraflow.core.observation import shown
from contraflow.data.datasets.dataset import Dataset

SATURATED, SHOWN = 0.1, 8  # share of actions at a bound that is worth a word; columns that are named


def summary(data: Dataset) -> list[tuple[str, str]]:
    """(label, text) lines: sizes, returns, ends and ranges."""
    lengths, returns, reward = data.lengths, data.returns, data.reward
    terminated, cut = int((data.end & data.terminated).sum()), int((data.end & ~data.terminated).sum())
    inside = int((data.terminated & ~data.end).sum())
    extra = f"; {inside:,} terminated rows within trajectories" if inside else ""
    vectors = isinstance(data.observation, int)
    spread = f"std {returns.std():.4g}  min {returns.min():.4g}  max {returns.max():.4g}"
    return [
        ("dataset", data.name),
        ("environment", data.env or "not stated"),
        ("rows", f"{len(data):,}"),
        ("trajectories", f"{len(lengths):,} of {lengths.min()} to {lengths.max()} steps, mean {lengths.mean():.1f}"),
        ("returns", f"mean {returns.mean():.4g}  {spread}"),
        ("ends", f"{terminated:,} terminated, {cut:,} truncated{extra}"),
        ("rewards", f"{reward.min():.4g} to {reward.max():.4g}, mean {reward.mean():.4g}"),
        ("observations", shown(data.observation) + (f": {_ranges(data.obs)}" if vectors else "")),
        ("actions", f"{data.action.shape[1]}: {_ranges(data.raw_action)}"),
        ("bounds", range_text(data.low, data.high) + ("" if data.stated else " (not stated: the range of the data)")),
    ]


def problems(data: Dataset) -> list[str]:
    """What had to be assumed, and what training might trip over."""
    found = list(data.notes)
    vectors = isinstance(data.observation, int)
    for what, rows in (("observation", data.obs), ("action", data.action))[not vectors :]:
        constant = np.flatnonzero(np.ptp(rows, axis=0) <= 1e-6 * np.maximum(1, abs(rows[0])))
        if constant.size:
            found.append(f"{what} columns that never vary: {', '.join(map(str, constant[:SHOWN]))}{_more(constant)}")
    saturated = float((abs(data.action) >= 1 - ROUNDING).mean())
    if saturated > SATURATED:
        found.append(f"{saturated:.0%} of the action values lie at a bound; tanh policies have no density there")
    if not data.terminated.any():
        found.append("nothing terminates: right only where no episode ends but by its time limit")
    if data.reward.min() == data.reward.max():
        found.append(f"every reward is {data.reward[0]:g}")
    if not vectors:
        return found
    within = np.flatnonzero(~data.end & data.known)
    scale = data.moments()[1]
    jumps = (abs(data.next_obs[within] - data.obs[within + 1]) > 1e-3 * scale).any(1)
    if jumps.any():
        found.append(
            f"after {int(jumps.sum())} rows (the first is {within[jumps.argmax()]}) next_obs is not the following obs: "
            "ends of trajectories are missing, or rows are not in time order"
        )
    return found


def _ranges(rows: np.ndarray) -> str:
    return range_text(rows.min(0), rows.max(0))


def _more(columns: np.ndarray) -> str:
    return f" and {len(columns) - SHOWN} more" if len(columns) > SHOWN else ""
