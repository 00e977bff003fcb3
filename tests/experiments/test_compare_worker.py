"""The real worker: what it leaves behind of one cell or of several, trained by one program; once it is killed."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from tests.cli_helpers import ENVIRON, TINY, Guess

from contraflow import UserError
from contraflow.agents.online.rfm import RFM, Choice
from contraflow.envs import make
from contraflow.envs.probe import ObsAction
from contraflow.experiments import bridge
from contraflow.experiments.compare import worker
from contraflow.experiments.compare.matrix import FAILED, FINAL, Cell, Matrix, Settings, failure, prepare, state
from contraflow.experiments.compare.runner import WORKER, grouped
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.artifact import save_policy
from contraflow.policy.best_of import First
from contraflow.presets import PRESETS, default_run
from contraflow.rl.critics import Critics
from contraflow.training import checkpoint
from contraflow.training import run as driver
from contraflow.training.evaluate import Episodes
from contraflow.training.log import read_evaluations
from contraflow.training.run import Result, write_config

GUESS = replace(TINY, agent=Guess(), source=replace(TINY.source, env="probe:constant"))
RTOL, ATOL = 2e-3, 2e-4  # float32 sums in another order, as in tests/train; another seed is off by the whole range


@pytest.fixture(autouse=True)
def batched_keys() -> Iterator[None]:
    """jax 0.10 takes the keys that the inner scan splits for used ones once it is vmapped."""
    with jax.debug_key_reuse(False):
        yield


@pytest.fixture
def not_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluations after training, which compile more than the training, have tests of their own."""
    monkeypatch.setattr(worker, "final_evaluations", lambda folder, *rest: [{"folder": folder.name}])


def folder_of(run, folder: Path) -> Path:
    folder.mkdir(parents=True)
    write_config(run, folder)
    return folder


def cells_in(out: Path, *envs: str, seeds: int = 3, agents: tuple[str, ...] = ("guess",)) -> list[Cell]:
    settings = Settings(
        steps=40, collect=10, num_envs=2, batch_size=8, buffer_size=64, eval_every=20, eval_episodes=2, log_every=10
    )
    matrix = Matrix(out, dict.fromkeys(agents, default_run(Guess())), envs or ["probe:obs-action"], settings, seeds)
    for cell in matrix.cells():
        prepare(cell, "all")
    return matrix.cells()


def evaluations(folder: Path) -> list[dict]:
    return json.loads((folder / FINAL).read_text())["evaluations"]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def stopped_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM after the first iterations."""
    real = driver.epoch

    def stopped(*args):
        out = real(*args)
        os.kill(os.getpid(), signal.SIGTERM)
        return out

    monkeypatch.setattr(driver, "epoch", stopped)


# one cell


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cell with a host environment whose reward is -(a - 1/2)^2, which failed the last time."""
    run = replace(GUESS, source=replace(GUESS.source, env="tests.cli_helpers:pointer"))
    folder = folder_of(run, tmp_path_factory.mktemp("cells") / "cell")
    (folder / FAILED).write_text('{"reason": "the last time"}')
    assert worker.work([folder], 100, "all") == 0
    return folder


def test_what_a_worker_leaves(trained: Path):
    final = json.loads((trained / FINAL).read_text())
    rows = {(row["policy"], row["rule"]): row for row in final["evaluations"]}
    assert set(rows) == {("last", "own"), ("best", "own"), ("random", "own")}
    assert all(len(row["returns"]) == 100 for row in rows.values())
    assert {"python", "jax", "contraflow"} <= set(final["versions"]) and final["machine"]["cores"]
    assert state(trained) == "done" and not (trained / FAILED).exists()
    before = [(trained / name).stat().st_mtime_ns for name in (FINAL, "metrics.jsonl")]
    assert worker.work([trained], 100, "all") == 0
    assert before == [(trained / name).stat().st_mtime_ns for name in (FINAL, "metrics.jsonl")]


def test_random_actions_are_random(trained: Path):
    """Reward -(a - 1/2)^2 has the mean -7/12 under uniform actions; the agent always gives tanh(bias)."""
    rows = {row["policy"]: row for row in evaluations(trained)}
    random = rows["random"]["returns"]
    assert abs(sum(random) / 100 / 5 + 7 / 12) < 4 * 0.56 / 500**0.5  # std of one reward .56, 500 of them
    assert len(set(rows["last"]["returns"])) == 1 and rows["last"]["cost"] is None


def test_a_failure_leaves_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folder = folder_of(replace(GUESS, agent=Guess(explode_at=3)), tmp_path / "cell")
    assert worker.work([folder], 1, "all") == 1
    assert failure(folder).startswith("guess_loss became inf between steps") and "\n" not in failure(folder)
    assert "Traceback" not in capsys.readouterr().err and state(folder) == "failed"

    def broken(*args, **options):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(worker, "resume_together", broken)
    assert worker.work([folder], 1, "all") == 1
    assert failure(folder) == "ZeroDivisionError: a bug"
    assert "Traceback" in capsys.readouterr().err, "its log says where"


@pytest.mark.usefixtures("not_evaluated")
def test_an_interrupted_cell_is_not_failed_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = folder_of(GUESS, tmp_path / "cell")
    with monkeypatch.context() as patch:
        stopped_at_once(patch)
        assert worker.work([folder], 1, "all") == 130
    assert state(folder) == "started" and not (folder / FINAL).exists()
    assert worker.work([folder], 1, "all") == 0
    assert [row["step"] for row in read_evaluations(folder)] == [20, 40]


def test_the_cost_of_an_action():
    def cost(agent) -> tuple[int, ...] | None:
        found = bridge.cost(agent)
        return None if found is None else (found["particles"], found["nfe"], found["critic_calls"])

    assert cost(PRESETS["rfm"].agent) == (32, 6, 32)
    assert cost(replace(PRESETS["rfm"].agent, choose=Choice(greedy=First(3)))) == (3, 6, 0)
    wanted = {"dpmd": (10, 20, 10), "dacer": (1, 20, 0), "td3": (1, 1, 0), "rfm-paper": (32, 10, 32), "sac": (1, 1, 0)}
    wanted |= {"rfm-cartpole": (32, 6, 32), "sir": (32, 0, 32), "ppo": (1, 1, 0), "bc": (1, 10, 0)}
    assert {name: cost(PRESETS[name].agent) for name in wanted} == wanted
    assert cost(Guess()) is None


def test_a_flow_is_evaluated_with_one_particle_and_without_its_actor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Which policies are evaluated; their returns are the business of other tests."""
    agent, spec = RFM(critic=Critics(width=8, depth=1)), make(TINY.env).spec
    agent = replace(agent, flow=replace(agent.flow, network=ResidualMLP(8, 1, 8)))
    policies = [agent.policy(agent.init(jax.random.key(seed), spec)) for seed in (0, 1)]
    for name, policy in zip(("policy", "best"), policies, strict=True):
        save_policy(tmp_path / name, policy, spec, TINY.env)
    seen = []

    def evaluated(policy, env, key, episodes):
        seen.append(policy)
        return Episodes(np.zeros(episodes))

    monkeypatch.setattr(bridge, "evaluate_one", evaluated)
    rows = bridge.final_evaluations(tmp_path, 2, 0, "")
    names = [("last", "own"), ("last", "one particle"), ("last", "uniform actions"), ("best", "own"), ("random", "own")]
    assert [(row["policy"], row["rule"]) for row in rows] == names
    costs = [row["cost"] and tuple(row["cost"].values()) for row in rows]
    assert costs == [(32, 6, 32), (1, 6, 0), (32, 0, 32), (32, 6, 32), None]
    arrays = [jax.tree.leaves(policy) for policy in (*policies, *seen)]
    for found, wanted in ((arrays[2], arrays[0]), (arrays[5], arrays[1])):
        assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))


# which cells make a group


def mine(num_envs: int, seed: int) -> ObsAction:
    return ObsAction(num_envs)


def broken(num_envs: int, seed: int) -> ObsAction:
    raise ZeroDivisionError


def names(groups: list[tuple[Cell, ...]]) -> list[str]:
    return [" ".join([group[0].agent, group[0].env, *(str(cell.seed) for cell in group)]) for group in groups]


def test_seeds_of_one_agent_on_one_environment_make_a_group(tmp_path: Path):
    pairs = ["probe:action", "bandit:linear/3", f"{__name__}:mine"]
    cells = cells_in(tmp_path, *pairs, seeds=2, agents=("a", "b"))
    assert names(grouped(cells, "all")) == [f"{agent} {env} 0 1" for env in pairs for agent in "ab"]


def test_environments_that_are_not_written_in_jax_keep_one_process_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    gymnasium = pytest.importorskip("gymnasium")
    built = []
    monkeypatch.setattr(gymnasium, "make", lambda *args, **options: built.append(args))
    envs = ["gym:Pendulum-v1", "Pendulum-v1", "envpool:HopperHop-v1", "tests.cli_helpers:pointer", f"{__name__}:broken"]
    cells = cells_in(tmp_path, *envs, "probe:action", seeds=2)
    wanted = [f"guess {env} 0" for env in envs] + ["guess probe:action 0 1"] + [f"guess {env} 1" for env in envs]
    assert names(grouped(cells, "all")) == wanted
    assert built == [], "nothing is built to tell"


def test_seeds_that_have_parted_are_not_trained_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cells = cells_in(tmp_path, seeds=6)
    at = dict(zip([cell.folder for cell in cells], (None, 0, 20, 40, 20, 60), strict=True))
    monkeypatch.setattr(checkpoint, "latest", at.__getitem__)
    groups = ["guess probe:obs-action 0 1", "guess probe:obs-action 2 4"]
    assert names(grouped(cells, "")) == [*groups, "guess probe:obs-action 3", "guess probe:obs-action 5"]


# several cells


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
    assert worker.work(folders, 2, "all") == 130
    assert [state(folder) for folder in folders] == ["failed", "done", "started"] and failure(folders[0]) == "no luck"
    ends = {0: trained, 2: trained}
    assert worker.work(folders, 2, "all") == 0
    assert given == [folders, [folders[0], folders[2]]] and [state(f) for f in folders] == ["done"] * 3
    assert not (folders[0] / FAILED).exists()


def test_what_concerns_all_seeds_fails_each_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folders = [cell.folder for cell in cells_in(tmp_path)]

    def broken(*args, **options):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(worker, "resume_together", broken)
    assert worker.work(folders, 2, "all") == 1
    assert [failure(folder) for folder in folders] == ["ZeroDivisionError: a bug"] * 3
    assert capsys.readouterr().err.count("Traceback") == 1


def test_a_policy_that_cannot_be_evaluated_leaves_the_others_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folders = [cell.folder for cell in cells_in(tmp_path)]
    trained = Result(folders[0], 40, np.zeros(2))
    monkeypatch.setattr(worker, "resume_together", lambda *args, **options: dict.fromkeys(range(3), trained))

    def evaluated(folder, *rest):
        if folder == folders[0]:
            raise UserError("no end")
        return []

    monkeypatch.setattr(worker, "final_evaluations", evaluated)
    assert worker.work(folders, 2, "all") == 1
    assert [state(folder) for folder in folders] == ["failed", "done", "done"] and failure(folders[0]) == "no end"


def assert_same_cell(one: Path, other: Path) -> None:
    """Numbers to rounding: the metrics but for what is not the run's own, and the evaluations after training."""
    for a, b in zip(metrics(one), metrics(other), strict=True):
        for row in (a, b):
            row.pop("seconds", None), row.pop("seeds_at_once", None)
        assert a.keys() == b.keys()
        np.testing.assert_allclose([*a.values()], [*b.values()], rtol=RTOL, atol=ATOL)
    for row, wanted in zip(evaluations(one), evaluations(other), strict=True):
        assert [row[name] for name in ("policy", "rule", "cost")] == [wanted[n] for n in ("policy", "rule", "cost")]
        np.testing.assert_allclose(row["returns"], wanted["returns"], rtol=RTOL, atol=ATOL)


@pytest.mark.slow
def test_each_seed_is_the_cell_that_it_would_be_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where one of them fails, which is tried again alone."""
    alone = [cell.folder for cell in cells_in(tmp_path / "alone", seeds=2)]
    assert [worker.work([folder], 2, "all") for folder in alone] == [0] * 2
    folders = [cell.folder for cell in cells_in(tmp_path / "together", seeds=2)]
    real = driver.check_finite

    def fail(values, before, after, folder):
        if folder == folders[1] and after > 20:
            raise UserError("no luck")
        real(values, before, after, folder)

    with monkeypatch.context() as patch:
        patch.setattr(driver, "check_finite", fail)
        assert worker.work(folders, 2, "all") == 1
    assert [state(folder) for folder in folders] == ["done", "failed"] and failure(folders[1]) == "no luck"
    assert_same_cell(folders[0], alone[0])
    before = (folders[0] / FINAL).stat().st_mtime_ns
    assert worker.work(folders, 2, "all") == 0
    assert_same_cell(folders[1], alone[1])
    assert (folders[0] / FINAL).stat().st_mtime_ns == before, "what is done is left as it is"


@pytest.mark.slow
@pytest.mark.usefixtures("not_evaluated")
def test_a_killed_group_goes_on(tmp_path: Path):
    """What started the worker died (its input ends) while two seeds train: it saves and stops, they go on together."""
    cells = cells_in(tmp_path, seeds=2)
    folders = [cell.folder for cell in cells]
    for cell in cells:
        write_config(replace(cell.run, steps=4_000, eval_every=1_000, log_every=100), cell.folder)
    command = [*WORKER, *map(str, folders), "2", "--trust", "all"]
    process = subprocess.Popen(command, env=ENVIRON, stdin=subprocess.PIPE)
    deadline = time.monotonic() + 240
    while not all(any(row["step"] >= 1_000 for row in read_evaluations(folder)) for folder in folders):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.communicate()
    assert process.returncode == 130
    assert [state(folder) for folder in folders] == ["started"] * 2
    before, rows = [metrics(folder) for folder in folders], [read_evaluations(folder) for folder in folders]
    assert grouped(cells, "all") == [tuple(cells)], "they stand at the same checkpoint"
    assert (checkpoint.latest(folders[0]) or 0) >= 1_000
    assert worker.work(folders, 2, "all") == 0
    for folder, first, row in zip(folders, before, rows, strict=True):
        assert metrics(folder)[: len(first)] == first, "what was before the interruption, the seconds included"
        assert [r["step"] for r in read_evaluations(folder)] == [1_000, 2_000, 3_000, 4_000], "every evaluation once"
        assert read_evaluations(folder)[: len(row)] == row
        assert {r["seeds_at_once"] for r in metrics(folder) if "guess_loss" in r} == {2}
