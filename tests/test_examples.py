"""The scripts in examples/ run as they stand, from a folder of the user's, and learn what they say."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tests.cli_helpers import ENVIRON, ROOT, cli

import contraflow
from contraflow.envs import make
from contraflow.training.evaluate import evaluate
from contraflow.training.run import read_config

EXAMPLES = ROOT / "examples"


def output(name: str, folder: Path) -> str:
    """What the script prints, run in `folder`."""
    script = [sys.executable, EXAMPLES / f"{name}.py"]
    done = subprocess.run(script, cwd=folder, env=ENVIRON, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def number(text: str) -> float:
    (found,) = re.findall(r"mean return (-?[\d.]+)", text)
    return float(found)


def test_custom_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert number(output("custom_agent", tmp_path)) > 0.99
    monkeypatch.syspath_prepend(str(EXAMPLES))
    folder = tmp_path / "runs/example-cross-entropy"
    assert type(read_config(folder, trust="all").agent).__name__ == "CrossEntropy", "named after the file, not __main__"
    assert abs(contraflow.load(folder, trust="all")(np.zeros(1))[0] - 0.5) < 0.1
    assert "CrossEntropy" not in cli("list", "agents")[1]
    assert cli("train", "custom_agent:CrossEntropy", "--trust", "all", "--agent.elite", "2")[0] == 2


@pytest.mark.slow
def test_custom_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Trained on the one in JAX, evaluated on the one in Gymnasium: they are the same task."""
    assert number(output("custom_environment", tmp_path)) > -2
    monkeypatch.syspath_prepend(str(EXAMPLES))
    policy = contraflow.load(tmp_path / "runs/example-chase")
    for name in ("reach", "Chase"):
        env = make(f"custom_environment:{name}", 4, trust="all")
        assert evaluate(policy.agent, policy.state, env, jax.random.key(0), 8).mean() > -2


@pytest.mark.slow
def test_train_rfm(tmp_path: Path):
    text = output("train_rfm", tmp_path)
    actions = np.array(text.rpartition("[")[2].rstrip("]\n").split(), float)
    assert np.allclose(actions, [-0.5, 0.0, 0.5], atol=0.15)
    code = (EXAMPLES / "train_rfm.py").read_text().splitlines()
    assert len([line for line in code if line.strip()]) <= 15
