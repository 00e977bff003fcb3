"""The real worker: what it leaves behind, in this process and, killed, in its own."""

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from tests.cli_helpers import COMMAND, ENVIRON, TINY, Guess, cli

from contraflow import RFM
from contraflow.agents.cost import Cost, acting_cost
from contraflow.envs import make
from contraflow.experiments.compare import worker
from contraflow.experiments.compare.matrix import FAILED, FINAL, state
from contraflow.policy.select import First
from contraflow.presets import PRESETS
from contraflow.rl.critics import Critics
from contraflow.training import run as driver
from contraflow.training.artifact import save_policy
from contraflow.training.log import read_evaluations
from contraflow.training.run import write_config

GUESS = replace(TINY, agent=Guess(), env="probe:constant")


def folder_of(run, tmp_path: Path) -> Path:
    folder = tmp_path / "cell"
    folder.mkdir()
    write_config(run, folder)
    return folder


def test_what_a_worker_leaves(tmp_path: Path):
    folder = folder_of(GUESS, tmp_path)
    (folder / FAILED).write_text('{"reason": "the last time"}')
    assert worker.work([folder], 3, True) == 0
    final = json.loads((folder / FINAL).read_text())
    rows = {(row["policy"], row["rule"]): row for row in final["evaluations"]}
    assert set(rows) == {("last", "own"), ("best", "own"), ("random", "own")}
    assert all(len(row["returns"]) == 3 for row in rows.values())
    assert {"python", "jax", "contraflow"} <= set(final["versions"]) and final["machine"]["cores"]
    assert state(folder) == "done" and not (folder / FAILED).exists()
    before = (folder / FINAL).stat().st_mtime_ns, (folder / "metrics.jsonl").stat().st_mtime_ns
    assert worker.work([folder], 3, True) == 0
    assert before == ((folder / FINAL).stat().st_mtime_ns, (folder / "metrics.jsonl").stat().st_mtime_ns)


def test_random_actions_are_random(tmp_path: Path):
    """Reward -(a - 1/2)^2 has the mean -7/12 under uniform actions; the agent always gives tanh(bias)."""
    run = replace(GUESS, env="tests.cli_helpers:pointer")
    folder = folder_of(run, tmp_path)
    assert worker.work([folder], 200, True) == 0
    rows = {row["policy"]: row for row in json.loads((folder / FINAL).read_text())["evaluations"]}
    random = rows["random"]["returns"]
    assert abs(sum(random) / 200 / 5 + 7 / 12) < 0.06  # std of one reward .56, 1000 of them
    assert len(set(rows["last"]["returns"])) == 1 and rows["last"]["cost"] is None


def test_a_failure_leaves_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folder = folder_of(replace(GUESS, agent=Guess(explode_at=3)), tmp_path)
    assert worker.work([folder], 1, True) == 1
    reason = json.loads((folder / FAILED).read_text())["reason"]
    assert reason.startswith("guess_loss became inf between steps") and "\n" not in reason
    assert "Traceback" not in capsys.readouterr().err and state(folder) == "failed"

    def broken(*args, **options):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(worker, "resume", broken)
    assert worker.work([folder], 1, True) == 1
    assert json.loads((folder / FAILED).read_text())["reason"] == "ZeroDivisionError: a bug"
    assert "Traceback" in capsys.readouterr().err, "its log says where"


def test_an_interrupted_cell_is_not_failed_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = folder_of(GUESS, tmp_path)
    real = driver.epoch

    def stopped(*args):
        out = real(*args)
        os.kill(os.getpid(), signal.SIGTERM)
        return out

    with monkeypatch.context() as patch:
        patch.setattr(driver, "epoch", stopped)
        assert worker.work([folder], 1, True) == 130
    assert state(folder) == "started" and not (folder / FINAL).exists()
    assert worker.work([folder], 1, True) == 0
    assert [row["step"] for row in read_evaluations(folder)] == [20, 40]


def test_the_cost_of_an_action():
    assert acting_cost(PRESETS["rfm"].agent) == Cost(32, 4, 32)
    assert acting_cost(RFM(greedy=First(3))) == Cost(3, 4, 0)
    assert acting_cost(PRESETS["dpmd"].agent) == Cost(10, 20, 10)
    assert acting_cost(PRESETS["dacer"].agent) == Cost(1, 20, 0)
    assert acting_cost(PRESETS["td3"].agent) == Cost(1, 1, 0)
    assert acting_cost(PRESETS["rfm-paper"].agent) == Cost(32, 10, 32)
    assert acting_cost(PRESETS["rfm-cartpole"].agent) == Cost(32, 6, 32)
    assert acting_cost(PRESETS["sac"].agent) == Cost(1, 1, 0)
    assert acting_cost(PRESETS["sir"].agent) == Cost(32, 0, 32)
    assert acting_cost(Guess()) is None


def test_a_flow_is_evaluated_with_one_particle_and_without_its_actor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Which agents are evaluated; their returns are the business of other tests."""
    agent, spec = RFM(width=8, depth=1, critic=Critics(width=8, depth=1)), make(TINY.env).spec
    states = [agent.init(jax.random.key(seed), spec) for seed in (0, 1)]
    for name, trained in zip(("policy", "best"), states, strict=True):
        save_policy(tmp_path / name, agent, spec, TINY.env, trained)
    seen, critics = [], []

    def evaluated(agent, state, env, key, episodes):
        seen.append(agent)
        critics.append(jax.tree.leaves(state.critic))
        return [0.0] * episodes

    monkeypatch.setattr(worker, "evaluate", evaluated)
    rows = worker.final_evaluations(tmp_path, 2, False)
    wanted = [
        ("last", "own"),
        ("last", "one particle"),
        ("last", "uniform actions"),
        ("best", "own"),
        ("random", "own"),
    ]
    assert [(row["policy"], row["rule"]) for row in rows] == wanted
    costs = [
        row["cost"] and (row["cost"]["particles"], row["cost"]["nfe"], row["cost"]["critic_calls"]) for row in rows
    ]
    assert costs == [(32, 4, 32), (1, 4, 0), (32, 0, 32), (32, 4, 32), None]
    assert seen[1].greedy.particles == 1 and seen[2].greedy.particles == 32
    for found, trained in zip(critics[:4], [states[0]] * 3 + [states[1]], strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(found, jax.tree.leaves(trained.critic), strict=True))


ARGS = [
    "compare", "--agents", "tests.cli_helpers:Guess", "--envs", "probe:constant", "--seeds", "2", "--steps", "600",
    "--collect", "10", "--num-envs", "2", "--batch-size", "8", "--buffer-size", "64", "--eval-every", "100",
    "--eval-episodes", "1", "--log-every", "50", "--jobs", "1", "--final-episodes", "2", "--quiet", "--trust",
]  # fmt: skip


@pytest.mark.slow
def test_a_killed_matrix_continues(tmp_path: Path):
    """kill -9 in the second cell: the first is not repeated, the second goes on from its checkpoint."""
    command = [*COMMAND, *ARGS, "--out", str(tmp_path / "m")]
    cells = [tmp_path / "m/Guess/probe-constant" / f"seed{seed}" for seed in (0, 1)]
    first = subprocess.Popen(command, env=ENVIRON, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not any(row["step"] >= 100 for row in read_evaluations(cells[1])):
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.02)
    finally:
        first.kill()
        first.wait()
    assert state(cells[0]) == "done" and state(cells[1]) == "started"
    before, history = (cells[0] / FINAL).stat().st_mtime_ns, read_evaluations(cells[1])
    code, out, _ = cli(*ARGS, "--out", tmp_path / "m")
    assert code == 0 and "2 of 2 cells done, 1 of them now, 0 failed" in out
    assert (cells[0] / FINAL).stat().st_mtime_ns == before
    rows = read_evaluations(cells[1])
    assert [row["step"] for row in rows] == list(range(100, 601, 100)), "every evaluation once"
    assert rows[0] == history[0], "that of before the kill, its seconds included"
