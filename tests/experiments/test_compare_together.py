"""Seeds that one program trains: which cells make a group, and what a worker leaves of each of them."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tests.cli_helpers import COMMAND, ENVIRON, Guess, cli
from tests.train.test_seeds import assert_same_run

from contraflow import UserError
from contraflow.envs.probe import ObsAction
from contraflow.experiments.compare import worker
from contraflow.experiments.compare.matrix import FAILED, FINAL, Cell, Settings, failure, grouped, plan, prepare, state
from contraflow.training import checkpoint, seeds
from contraflow.training.log import read_evaluations
from contraflow.training.run import Result

SETTINGS = Settings(
    steps=40, collect=10, num_envs=2, batch_size=8, buffer_size=64, eval_every=20, eval_episodes=2, log_every=10
)
RTOL, ATOL = 2e-3, 2e-4  # as in tests/train/test_seeds.py


def cells_in(out: Path, *envs: str, seeds: int = 3, agents: tuple[str, ...] = ("guess",)) -> list[Cell]:
    cells = plan(dict.fromkeys(agents, Guess()), envs or ["probe:obs-action"], seeds, SETTINGS, frozenset(), out)
    for cell in cells:
        prepare(cell)
    return cells


def names(groups: list[tuple[Cell, ...]]) -> list[str]:
    return [" ".join([group[0].agent, group[0].env, *(str(cell.seed) for cell in group)]) for group in groups]


# which cells make a group


def mine(num_envs: int, seed: int) -> ObsAction:
    return ObsAction(num_envs)


def broken(num_envs: int, seed: int) -> ObsAction:
    raise ZeroDivisionError


HERE = "tests.experiments.test_compare_together"


def test_seeds_of_one_agent_on_one_environment_make_a_group(tmp_path: Path):
    cells = cells_in(tmp_path, "probe:action", "bandit:linear/3", f"{HERE}:mine", seeds=2, agents=("a", "b"))
    pairs = ["probe:action", "bandit:linear/3", f"{HERE}:mine"]
    assert names(grouped(cells, True)) == [f"{agent} {env} 0 1" for env in pairs for agent in "ab"]


def test_environments_that_are_not_written_in_jax_keep_one_process_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    gymnasium = pytest.importorskip("gymnasium")
    built = []
    monkeypatch.setattr(gymnasium, "make", lambda *args, **options: built.append(args))
    envs = ["gym:Pendulum-v1", "Pendulum-v1", "envpool:HopperHop-v1", "tests.cli_helpers:pointer", f"{HERE}:broken"]
    cells = cells_in(tmp_path, *envs, "probe:action", seeds=2)
    wanted = [f"guess {env} 0" for env in envs] + ["guess probe:action 0 1"] + [f"guess {env} 1" for env in envs]
    assert names(grouped(cells, True)) == wanted
    assert built == [], "nothing is built to tell"


def test_seeds_that_have_parted_are_not_trained_together(tmp_path: Path):
    cells = cells_in(tmp_path, seeds=6)
    for cell, steps in zip(cells, ([], [0], [20], [20, 40], [0, 20], [60]), strict=True):
        for step in steps:
            (cell.folder / f"checkpoints/{step}").mkdir(parents=True)
    (cells[0].folder / "checkpoints/40.orbax-checkpoint-tmp-1").mkdir(parents=True)
    groups = ["guess probe:obs-action 0 1", "guess probe:obs-action 2 4"]
    assert names(grouped(cells, False)) == [*groups, "guess probe:obs-action 3", "guess probe:obs-action 5"]


# what a worker leaves


@pytest.fixture(autouse=True)
def batched_keys():
    with jax.debug_key_reuse(False):  # as in tests/train/test_seeds.py
        yield


def evaluations(folder: Path) -> list[dict]:
    return json.loads((folder / FINAL).read_text())["evaluations"]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_cell(one: Path, other: Path) -> None:
    assert_same_run(one, other, RTOL, ATOL)
    for row, wanted in zip(evaluations(one), evaluations(other), strict=True):
        assert [row[name] for name in ("policy", "rule", "cost")] == [wanted[n] for n in ("policy", "rule", "cost")]
        np.testing.assert_allclose(row["returns"], wanted["returns"], rtol=RTOL, atol=ATOL)


@pytest.fixture
def not_evaluated(monkeypatch: pytest.MonkeyPatch):
    """The evaluations after training, which compile more than the training, are those of single cells."""
    monkeypatch.setattr(worker, "final_evaluations", lambda folder, episodes, trust: [{"folder": folder.name}])


@pytest.mark.slow
@pytest.mark.usefixtures("not_evaluated")
def test_an_interrupted_group_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cells = cells_in(tmp_path, seeds=2)
    folders = [cell.folder for cell in cells]
    real = seeds.epoch_seeds

    def stopped(*args):
        out = real(*args)
        os.kill(os.getpid(), signal.SIGTERM)
        return out

    with monkeypatch.context() as patch:
        patch.setattr(seeds, "epoch_seeds", stopped)
        assert worker.work(folders, 2, True) == 130
    assert [state(folder) for folder in folders] == ["started"] * 2
    assert [checkpoint.latest(folder) for folder in folders] == [10] * 2
    before = [metrics(folder) for folder in folders]
    assert grouped(cells, True) == [tuple(cells)]
    assert worker.work(folders, 2, True) == 0
    for folder, first in zip(folders, before, strict=True):
        assert evaluations(folder) == [{"folder": folder.name}]
        rows = metrics(folder)
        assert rows[: len(first)] == first, "what was before the interruption, the seconds included"
        assert [row["step"] for row in read_evaluations(folder)] == [20, 40], "every evaluation once"
        assert {row["seeds_at_once"] for row in rows if "guess_loss" in row} == {2}


@pytest.mark.usefixtures("not_evaluated")
def test_each_seed_ends_as_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One failed, one was trained, one was saved; then all fail of the same cause."""
    folders = [cell.folder for cell in cells_in(tmp_path)]
    trained, saved = (Result(tmp_path, 40, np.zeros(2), interrupted) for interrupted in (False, True))
    ends: dict[int, Result | UserError] = {0: UserError("no luck"), 1: trained, 2: saved}
    given: list[list[Path]] = []

    def resume_together(some, trust):
        given.append(some)
        return ends

    monkeypatch.setattr(worker, "resume_together", resume_together)
    assert worker.work(folders, 2, True) == 130
    assert [state(folder) for folder in folders] == ["failed", "done", "started"] and failure(folders[0]) == "no luck"
    ends = {0: trained, 2: trained}
    assert worker.work(folders, 2, True) == 0
    assert given == [folders, [folders[0], folders[2]]] and [state(f) for f in folders] == ["done"] * 3
    assert not (folders[0] / FAILED).exists()


def test_what_concerns_all_seeds_fails_each_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folders = [cell.folder for cell in cells_in(tmp_path)]

    def broken(*args, **options):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(worker, "resume_together", broken)
    assert worker.work(folders, 2, True) == 1
    assert [failure(folder) for folder in folders] == ["ZeroDivisionError: a bug"] * 3
    assert capsys.readouterr().err.count("Traceback") == 1


def test_a_policy_that_cannot_be_evaluated_leaves_the_others_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folders = [cell.folder for cell in cells_in(tmp_path)]
    trained = Result(folders[0], 40, np.zeros(2))
    monkeypatch.setattr(worker, "resume_together", lambda *args, **options: dict.fromkeys(range(3), trained))

    def evaluated(folder, episodes, trust):
        if folder == folders[0]:
            raise UserError("no end")
        return []

    monkeypatch.setattr(worker, "final_evaluations", evaluated)
    assert worker.work(folders, 2, True) == 1
    assert [state(folder) for folder in folders] == ["failed", "done", "done"] and failure(folders[0]) == "no end"


@pytest.mark.slow
def test_each_seed_is_the_cell_that_it_would_be_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where one of them fails, which is tried again alone."""
    alone = [cell.folder for cell in cells_in(tmp_path / "alone")]
    assert [worker.work([folder], 2, True) for folder in alone] == [0] * 3
    folders = [cell.folder for cell in cells_in(tmp_path / "together")]
    real = seeds.check_finite

    def fail(values, before, after, folder):
        if folder == folders[1] and after > 20:
            raise UserError("no luck")
        real(values, before, after, folder)

    with monkeypatch.context() as patch:
        patch.setattr(seeds, "check_finite", fail)
        assert worker.work(folders, 2, True) == 1
    assert [state(folder) for folder in folders] == ["done", "failed", "done"] and failure(folders[1]) == "no luck"
    for i in (0, 2):
        assert_same_cell(folders[i], alone[i])
    before = (folders[0] / FINAL).stat().st_mtime_ns
    assert worker.work(folders, 2, True) == 0
    assert_same_cell(folders[1], alone[1])
    assert (folders[0] / FINAL).stat().st_mtime_ns == before, "what is done is left as it is"


# the command

ARGS = [
    "compare", "--agents", "tests.cli_helpers:Guess", "--envs", "probe:obs-action",
    "--seeds", "2", "--steps", "600", "--collect", "10", "--num-envs", "2", "--batch-size", "8", "--buffer-size", "64",
    "--eval-every", "100", "--eval-episodes", "1", "--log-every", "50", "--jobs", "1", "--final-episodes", "2",
    "--quiet", "--trust",
]  # fmt: skip


@pytest.mark.slow
def test_a_killed_group_continues(tmp_path: Path):
    """kill -9 while the seeds train: their process saves and stops, and together they go on."""
    command = [*COMMAND, *ARGS, "--together", "--out", str(tmp_path / "m")]
    folders = [tmp_path / "m/Guess/probe-obs-action" / f"seed{seed}" for seed in (0, 1)]
    first = subprocess.Popen(command, env=ENVIRON, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not all(any(row["step"] >= 100 for row in read_evaluations(folder)) for folder in folders):
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.02)
    finally:
        first.kill()
        first.wait()
    assert [state(folder) for folder in folders] == ["started"] * 2
    code, out, err = cli(*ARGS, "--together", "--out", tmp_path / "m")
    assert code == 0 and "2 of 2 cells done, 2 of them now, 0 failed" in out, out + err
    for folder in folders:
        assert len(evaluations(folder)) == 3
        assert [row["step"] for row in read_evaluations(folder)] == list(range(100, 601, 100)), "every evaluation once"
        assert {row["seeds_at_once"] for row in metrics(folder) if "guess_loss" in row} == {2}
