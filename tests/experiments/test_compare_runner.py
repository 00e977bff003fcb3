"""Workers that fail, are killed, are interrupted. They are scripts of a few lines; the real one has its own tests."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console
from tests.cli_helpers import cli
from tests.experiments.helpers import SCRIPT, calls, fake, sir_cells

from contraflow import UserError
from contraflow.core.files import locked
from contraflow.experiments.compare import runner
from contraflow.experiments.compare.board import Board, table
from contraflow.experiments.compare.matrix import FINAL, state
from contraflow.experiments.compare.runner import Local, run_cells


def test_a_failing_cell_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake(
        monkeypatch,
        """
        if seed == 0:
            (folder / "failed.json").write_text(json.dumps({"reason": "nan"}))
            sys.exit(1)
        if seed == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        done()
        """,
    )
    cells = sir_cells(tmp_path)
    outcome = run_cells(cells, tmp_path, Local(1), 1, quiet=True)
    assert (outcome.before, outcome.done, outcome.interrupted) == (0, 1, False)
    assert outcome.failed[cells[0]] == "nan"
    assert "was killed by signal 9 (out of memory?)" in outcome.failed[cells[1]]
    assert [state(cell.folder) for cell in cells] == ["failed", "failed", "done"]
    fake(monkeypatch, "(folder / 'failed.json').unlink(); done()")
    again = run_cells(cells, tmp_path, Local(1), 1, quiet=True)
    assert (again.before, again.done, again.failed) == (1, 2, {}), "what failed is tried again, what is done is not"
    assert [seed for seed, *_ in calls(tmp_path)] == ["0", "1", "2", "0", "1"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_at_most_so_many_at_a_time(jobs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One thread each when there are several; all cores for one alone."""
    fake(monkeypatch, "time.sleep(0.25); done()")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert run_cells(sir_cells(tmp_path, 4), tmp_path, Local(jobs), 1, quiet=True).done == 4
    events = [(float(row[1]), 1) for row in calls(tmp_path)] + [(float(row[1]), -1) for row in calls(tmp_path, "ends")]
    running, most = 0, 0
    for _, change in sorted(events):
        running += change
        most = max(most, running)
    assert most == jobs
    flags = {row[2] if len(row) > 2 else "" for row in calls(tmp_path)}
    assert flags == ({""} if jobs == 1 else {runner.ONE_THREAD})


def test_ctrl_c_lets_the_workers_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    fake(monkeypatch, "wait()")
    cells = sir_cells(tmp_path)

    def press() -> None:
        deadline = time.monotonic() + 30
        while not all((cell.folder / "ready").exists() for cell in cells[:2]) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    outcome = run_cells(cells, tmp_path, Local(2), 1)
    thread.join()
    assert outcome.interrupted and outcome.failed == {} and outcome.done == 0
    assert [(cell.folder / "saved").exists() for cell in cells] == [True, True, False]
    assert [state(cell.folder) for cell in cells] == ["started"] * 3, "interrupted is not failed"


def test_a_second_ctrl_c_kills_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake(
        monkeypatch, "signal.signal(signal.SIGTERM, signal.SIG_IGN); (folder / 'ready').write_text(''); time.sleep(60)"
    )
    cells, pressed = sir_cells(tmp_path, 1), []

    def refresh(self) -> None:
        if (cells[0].folder / "ready").exists():
            raise KeyboardInterrupt

    real = Local.ended

    def ended(self, running):
        over = real(self, running)
        if pressed == [False]:  # asked to stop, and it does not
            pressed.append(True)
            raise KeyboardInterrupt
        return over

    monkeypatch.setattr(Board, "refresh", refresh)
    stop = Local.stop
    monkeypatch.setattr(Local, "stop", lambda self, running, force: (pressed.append(force), stop(self, running, force)))
    monkeypatch.setattr(Local, "ended", ended)
    outcome = run_cells(cells, tmp_path, Local(1), 1, quiet=True)
    assert outcome.interrupted and pressed == [False, True, True] and state(cells[0].folder) == "started"


def test_a_group_gets_one_worker_and_each_cell_its_own_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    fake(
        monkeypatch,
        """
        print("hello")
        done()
        (Path(sys.argv[2]) / "failed.json").write_text(json.dumps({"reason": "nan"}))
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    cells = sir_cells(tmp_path)
    outcome = run_cells(cells, tmp_path, Local(2), 1, together=True)
    assert (outcome.before, outcome.done, list(outcome.failed)) == (0, 1, cells[1:])
    assert outcome.failed[cells[1]] == "nan" and "was killed by signal 9" in outcome.failed[cells[2]]
    assert [seed for seed, *_ in calls(tmp_path)] == ["0"], "one process"
    assert "3 cells, 0 done, at most 2 processes at a time" in capsys.readouterr().out
    logs = [(cell.folder / "worker.log").read_text() for cell in cells]
    assert logs[0] == "hello\n" and all(str(cells[0].folder / "worker.log") in log for log in logs[1:])
    fake(monkeypatch, "done(); folder = Path(sys.argv[2]); done(); print(sys.argv[3:])")
    again = run_cells(cells, tmp_path, Local(2), 7, trust="all", quiet=True, together=True)
    assert (again.before, again.done, again.failed) == (1, 2, {}), "only those that are not done"
    assert (cells[1].folder / "worker.log").read_text().endswith("['7', 'all']\n")


def test_no_groups_unasked_or_of_environments_that_are_not_written_in_jax(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fake(monkeypatch, "done()")
    assert run_cells(sir_cells(tmp_path), tmp_path, Local(2), 1, quiet=True).done == 3
    assert sorted(seed for seed, *_ in calls(tmp_path)) == ["0", "1", "2"]
    cells = sir_cells(tmp_path, env="tests.cli_helpers:pointer")
    assert run_cells(cells, tmp_path, Local(2), 1, "all", True, together=True).done == 3
    rows = (cells[0].folder.parent / "calls").read_text().splitlines()
    assert sorted(row.split()[0] for row in rows) == ["0", "1", "2"]


def test_the_command_after_ctrl_c_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "start", interrupt)
    args = ["--agents", "sir", "--envs", "probe:action", "--steps", "40", "--collect", "10", "--out", tmp_path / "m"]
    code, out, _ = cli("compare", *args)
    assert code == 130
    assert "the same command continues: contraflow compare --agents sir --envs probe:action --steps 40" in out


def test_the_command_says_which_failed_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake(monkeypatch, "(folder / 'failed.json').write_text('{\"reason\": \"no luck\"}') if seed else done()")
    args = [
        "--agents",
        "sir",
        "--envs",
        "probe:action",
        "--seeds",
        "2",
        "--steps",
        "40",
        "--collect",
        "10",
        "--jobs",
        "1",
    ]
    code, out, err = cli("compare", *args, "--out", tmp_path / "m")
    assert code == 1 and err == ""
    assert "1 of 2 cells done, 1 of them now, 1 failed\n  failed: sir on probe:action, seed 1: no luck\n" in out
    fake(monkeypatch, "done()")
    code, out, err = cli("compare", *args, "--out", tmp_path / "m")
    assert code == 0 and "2 of 2 cells done" in out


def test_the_table(tmp_path: Path):
    """One row per agent and environment: counts, the steps of those at work, the last returns."""
    cells = sir_cells(tmp_path)
    cells[1].folder.mkdir(parents=True)
    (cells[1].folder / "metrics.jsonl").write_text('{"step": 1234}\n')
    (cells[1].folder / "eval.csv").write_text("step,return_mean\n1000,5.5\n")
    status = dict(zip(cells, ("done", "running", "waiting"), strict=True))
    text = io.StringIO()
    Console(file=text, width=120).print(table(status))
    assert "1 of 3 cells done" in text.getvalue()
    row = next(line for line in text.getvalue().splitlines() if "probe:action" in line)
    assert [word.strip() for word in row.split("│")[1:-1]] == ["sir", "probe:action", "1", "1", "1", "", "1,234", "5.5"]


def test_only_one_process_per_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cells = sir_cells(tmp_path)
    with locked(tmp_path), pytest.raises(UserError, match=r"another process \(pid \d+\) is using"):
        run_cells(cells, tmp_path, Local(1), 1, quiet=True)
    assert not cells[0].folder.exists()


def test_a_foreign_folder_is_refused_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake(monkeypatch, "done()")
    cells = sir_cells(tmp_path)
    cells[2].folder.mkdir(parents=True)
    (cells[2].folder / "notes").write_text("")
    with pytest.raises(UserError, match="something other"):
        run_cells(cells, tmp_path, Local(1), 1, quiet=True)
    assert not any((cell.folder / FINAL).exists() for cell in cells)


PARENT = """
import sys
from pathlib import Path
from tests.experiments.helpers import sir_cells
from contraflow.experiments.compare import runner
runner.WORKER = tuple(sys.argv[2:])
runner.run_cells(sir_cells(Path(sys.argv[1]), 2), Path(sys.argv[1]), runner.Local(2), 1)
"""


def test_a_killed_command_takes_its_workers_along(tmp_path: Path):
    """kill -9 leaves no time for anything: the workers see that their standard input has ended."""
    worker = SCRIPT + "(folder / 'ready').write_text(''); sys.stdin.read(); (folder / 'stopped').write_text('')"
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    cells = sir_cells(tmp_path, 2)
    command = [sys.executable, "-c", PARENT, str(tmp_path), sys.executable, "-S", "-c", worker]
    process = subprocess.Popen(command, env=environ, stdin=subprocess.PIPE)  # which stays open: not what they notice
    try:
        wait(lambda: all((cell.folder / "ready").exists() for cell in cells))
        assert not any((cell.folder / "stopped").exists() for cell in cells)
        process.kill()
        wait(lambda: all((cell.folder / "stopped").exists() for cell in cells))
    finally:
        process.kill()
        process.communicate()
    with locked(tmp_path):  # and the lock is free
        assert [state(cell.folder) for cell in cells] == ["started"] * 2


def wait(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def test_the_reason_survives_a_damaged_file(tmp_path: Path):
    (tmp_path / "failed.json").write_text("{")
    reason = runner.concluded(tmp_path, "the worker died")
    assert reason is not None and "worker.log" in reason
    (tmp_path / "failed.json").unlink()
    reason = runner.concluded(tmp_path, runner.how(3))
    assert reason == json.loads((tmp_path / "failed.json").read_text())["reason"]
    assert reason == f"the worker ended with exit code 3; its log is {tmp_path / 'worker.log'}"
