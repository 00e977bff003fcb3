"""What the tests of datasets share: a small one with known answers, and the same in the formats of others."""

import json
from pathlib import Path

import numpy as np
import pytest

from contraflow.data.datasets.dataset import Dataset, join

LENGTHS = (3, 1, 4)


def trajectories():
    """Observation [10 i + t, -t] at step t of trajectory i, reward t + 1, action between -2 and 4; the second ends."""
    for i, length in enumerate(LENGTHS):
        t = np.arange(length + 1)
        obs = np.stack([10.0 * i + t, -t], 1)
        action = np.linspace(-2, 4, sum(LENGTHS))[sum(LENGTHS[:i]) :][:length, None]
        terminated = np.arange(length) == (length - 1 if i == 1 else -1)
        yield {"obs": obs, "action": action, "reward": t[1:].astype(float), "terminated": terminated}


def analytic(**options) -> Dataset:
    return join(list(trajectories()), name="known", **({"low": [-2], "high": [4]} | options))


def assert_same(data: Dataset, wanted: Dataset, *, rounding: float = 0.0):
    for key in ("obs", "reward", "next_obs", "terminated", "end", "known"):
        np.testing.assert_array_equal(getattr(data, key), getattr(wanted, key), key)
    for key in ("action", "low", "high"):
        np.testing.assert_allclose(getattr(data, key), getattr(wanted, key), rtol=0, atol=rounding, err_msg=key)
    assert (data.env, data.stated) == (wanted.env, wanted.stated)


def flat(*without: str, **change) -> dict:
    data = analytic()
    keys = ("obs", "reward", "next_obs", "terminated", "end", "low", "high")
    arrays = {key: getattr(data, key) for key in keys} | {"action": data.raw_action} | change
    return {key: value for key, value in arrays.items() if key not in without}


def changed(**change) -> dict:
    return flat() | change


def spoilt(key: str, row: int, value: float) -> dict:
    array = np.array(flat()[key])
    array[row] = value
    return changed(**{key: array})


def ogbench(**more) -> dict:
    """Two trajectories of 3 and 2 steps, a row for each state; success in the third state of the first."""
    terminals = np.array([0, 0, 0, 1, 0, 0, 1], np.float32)
    reached = np.array([0, 0, 1, 0, 0, 0, 1])
    obs = np.arange(14, dtype=np.float32).reshape(7, 2)
    action = np.linspace(-1, 1, 7)[:, None]
    return {
        "observations": obs, "actions": action, "terminals": terminals, "rewards": reached - 1.0, "masks": 1.0 - reached
    } | more  # fmt: skip


def lerobot(folder: Path, *without: str, frames: int | None = None, **change) -> Path:
    """The analytic data as LeRobot lays them out, over two files and not in order."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    data = analytic()
    episode = np.repeat(np.arange(3), LENGTHS)
    columns = {
        "observation.state": list(data.obs), "action": list(data.raw_action), "episode_index": episode,
        "frame_index": np.concatenate([np.arange(n) for n in LENGTHS]), "next.reward": data.reward,
        "next.done": data.terminated, "index": np.arange(8),
    } | change  # fmt: skip
    table = pyarrow.table({key: value for key, value in columns.items() if key not in without})
    (folder / "meta").mkdir(parents=True)
    (folder / "data" / "chunk-000").mkdir(parents=True)
    info = {"codebase_version": "v3.0", "total_frames": 8 if frames is None else frames, "features": {}}
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    parquet.write_table(table.slice(4), folder / "data" / "chunk-000" / "file-000.parquet")
    parquet.write_table(table.slice(0, 4), folder / "data" / "chunk-000" / "file-001.parquet")
    return folder
