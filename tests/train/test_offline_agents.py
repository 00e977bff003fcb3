"""Whole runs of offline agents: on data alone and on into an environment, in chunks of actions, and used afterwards."""

from pathlib import Path

import numpy as np
import pytest
from tests.contract.cases import TABLE

from contraflow import OfflineToOnline, Run, train
from contraflow.runtime.policy import load

NAMES = ["dql", pytest.param("dac", marks=pytest.mark.slow), pytest.param("rql", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty steps of the probe obs-action, in trajectories of four."""
    rows, end = np.linspace(-1, 1, 41, dtype=np.float32)[:, None], np.arange(40) % 4 == 3
    file = tmp_path_factory.mktemp("data") / "rows.npz"
    np.savez(
        file, obs=rows[:-1], next_obs=rows[1:], action=np.sin(9 * rows[:-1]), reward=np.ones(40, np.float32),
        terminated=end & False, end=end, low=np.array([-1.0]), high=np.array([1.0]),
    )  # fmt: skip
    return file


@pytest.mark.parametrize("name", NAMES)
def test_offline_and_then_online_in_chunks(name: str, data: Path, tmp_path: Path):
    """Chunks of two are learned from, carried out and learned from again; the policy of the run acts."""
    source = OfflineToOnline(
        str(data), "probe:obs-action", offline_steps=20, num_envs=2, batch_size=8, buffer_size=64, horizon=2
    )
    run = Run(TABLE[name], source, steps=40, eval_every=20, eval_episodes=2, log_every=10, trackers=())
    result = train(run, tmp_path / "run", quiet=True)
    assert result.steps >= 40 and np.isfinite(result.returns).all()
    actions = load(tmp_path / "run")(np.linspace(-1, 1, 3, dtype=np.float32)[:, None])
    assert actions.shape == (3, 2, 1) and np.abs(actions).max() <= 1
