"""Every preset that learns values from a dataset goes on online, with chunks of actions."""

import json
from pathlib import Path

import numpy as np
import pytest
from tests.contract.cases import shrunk

from contraflow import OfflineToOnline, Run, train
from contraflow.agents import presets

NAMES = [name for name, preset in presets().items() if preset.needs == "dataset" and hasattr(preset.agent, "gamma")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty random steps of a pendulum's sizes, in trajectories of 20 that are cut off."""
    rng = np.random.default_rng(0)
    obs = rng.standard_normal((61, 3)).astype(np.float32)
    file = tmp_path_factory.mktemp("data") / "rows.npz"
    np.savez(
        file, obs=obs[:-1], next_obs=obs[1:], action=rng.uniform(-1, 1, (60, 1)).astype(np.float32),
        reward=-np.ones(60, np.float32), terminated=np.zeros(60, bool), end=np.arange(60) % 20 == 19,
        low=np.array([-1.0]), high=np.array([1.0]),
    )  # fmt: skip
    return file


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_offline_and_then_online_in_chunks(name: str, data: Path, tmp_path: Path):
    """Twelve gradient steps on the data, then twelve steps of three actions, with half of each batch from the data."""
    source = OfflineToOnline(
        str(data), "jax:pendulum", offline_steps=12, num_envs=2, batch_size=8, buffer_size=64, horizon=3
    )
    rates = {"eval_every": 48, "log_every": 6, "eval_episodes": 2, "trackers": ()}
    result = train(Run(shrunk(presets()[name].agent), source, steps=48, **rates), tmp_path, quiet=True)
    assert result.steps == 48 and np.isfinite(result.returns).all()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    learned = [line for line in lines if "critic_loss" in line]
    assert {line["step"] <= 12 for line in learned} == {True, False}
    assert all(np.isfinite(v) for line in learned for v in line.values() if isinstance(v, float))
