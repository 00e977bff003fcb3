"""Cells as tasks of Ray: what is refused and what a task says, without Ray; kills and Ctrl-C on a local cluster."""

import importlib.util
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.cli_helpers import ROOT, TINY, Guess, assert_refused
from tests.experiments.helpers import calls, fake_worker, sir_cells

from contraflow.experiments.compare import runner
from contraflow.experiments.compare.matrix import FINAL, LOCK, Cell, at_work, failure, prepare, state
from contraflow.experiments.compare.runner import OnRay, run_cells

GOOD = ["compare", "--agents", "sir", "--envs", "probe:action", "--seeds", "1", "--steps", "40", "--collect", "10"]


def cell_in(out: Path) -> Cell:
    (cell,) = sir_cells(out, 1)
    prepare(cell)
    return cell


GUESS = replace(TINY, agent=Guess())


class RayError(Exception): ...


def fake_ray(monkeypatch: pytest.MonkeyPatch, **functions: object) -> SimpleNamespace:
    """Let this be the package: what is tested with it does not come as far as a cluster."""
    ray = SimpleNamespace(exceptions=SimpleNamespace(RayError=RayError), **functions)
    monkeypatch.setitem(sys.modules, "ray", ray)
    return ray


def test_the_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert_refused([*GOOD, "--out", str(tmp_path / "m"), "--ray", "auto"], 'pip install "contraflow[ray]"')


@pytest.mark.parametrize(("address", "error"), [
    ("nonsense", None), ("host:", None), (":6379", None), ("127.0.0.1:99999", None), ("ray://127.0.0.1:10001", None),
    ("auto", ConnectionError), ("auto", RayError),
])  # fmt: skip
def test_an_address_without_a_cluster_is_refused(address, error, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def init(*args, **options):
        assert error is not None, "Ray is not asked"
        raise error("Could not find any running Ray instance.\nPlease ...")

    fake_ray(monkeypatch, init=init)
    words = f"--ray {address}: no cluster that this machine could join", "ray start --head"
    assert_refused([*GOOD, "--out", str(tmp_path / "m"), "--ray", address], *words)


def test_an_address_where_nothing_listens_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ray itself would try for two minutes and end the process."""
    fake_ray(monkeypatch)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    start = time.monotonic()
    assert_refused([*GOOD, "--out", str(tmp_path / "m"), "--ray", f"127.0.0.1:{port}"], "Connection refused")
    assert time.monotonic() - start < 60, "half of what Ray takes"


def test_ray_decides_how_many_run_and_where(tmp_path: Path):
    ray = [*GOOD, "--out", str(tmp_path / "m"), "--ray", "auto"]
    assert_refused([*ray, "--jobs", "2"], "leave out jobs, or ray")
    assert_refused([*ray, "--together"], "leave out together, or ray")


def test_what_a_task_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Done, the reason of the worker, or, when it left none, an error after which Ray tries again."""
    folder = cell_in(tmp_path).folder

    def attempt(body: str) -> str | None:
        code = f"import os, pathlib, sys; folder = pathlib.Path(sys.argv[1]); {body}"
        monkeypatch.setattr(runner, "WORKER", (sys.executable, "-S", "-c", code))
        return runner.attempt(folder, tmp_path, 1, "")

    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.delenv("JAX_PLATFORMS")
    with pytest.raises(ChildProcessError, match="killed by signal 9"):
        attempt("os.kill(os.getpid(), 9)")
    assert state(folder) == "started", "that it may yet be done is not said to have failed"
    with pytest.raises(ChildProcessError, match="exit code 130"):
        attempt("sys.exit(130)")
    assert attempt("(folder / 'failed.json').write_text('{\"reason\": \"nan\"}'); sys.exit(1)") == "nan"
    words = "os.getcwd(), os.environ['JAX_PLATFORMS'], os.environ['XLA_FLAGS']"
    assert attempt(f"print({words}); (folder / 'final.json').write_text('{{}}')") is None
    assert (folder / "worker.log").read_text() == f"{tmp_path} cpu {runner.ONE_THREAD}\n"


def test_a_cancelled_task_lets_its_worker_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    folder = cell_in(tmp_path).folder
    code = (
        "import pathlib, signal, sys, time; folder = pathlib.Path(sys.argv[1])\n"
        "def save(*args): time.sleep(.3); (folder / 'saved').write_text(''); sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, save); (folder / 'ready').write_text(''); time.sleep(60)"
    )
    monkeypatch.setattr(runner, "WORKER", (sys.executable, "-S", "-c", code))

    def cancel(seconds: float) -> None:
        if (folder / "ready").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(runner, "time", SimpleNamespace(sleep=cancel))
    with pytest.raises(KeyboardInterrupt):
        runner.attempt(folder, tmp_path, 1, "")
    assert (folder / "saved").exists()


def test_what_becomes_of_a_task_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """After the last retry: the reason in one line, kept in the folder; a result that is there counts."""

    class RayTaskError(RayError):
        cause = ChildProcessError("the worker was killed by signal 9")

    def result(error: Exception) -> str | None:
        def get(reference):
            raise error

        on_ray = OnRay("auto")
        on_ray._ray = fake_ray(monkeypatch, get=get)
        (reason,) = on_ray.reasons(None, (cell,))
        return reason

    cell = cell_in(tmp_path)
    reason = result(RayTaskError("a traceback\nof many lines"))
    assert reason == f"the worker was killed by signal 9; its log is {cell.folder / 'worker.log'}"
    assert state(cell.folder) == "failed"
    (cell.folder / "failed.json").unlink()
    assert str(result(RayError("The node\n  died."))).startswith("The node died.; its log")
    (cell.folder / FINAL).write_text("{}")
    assert result(RayError("The node died.")) is None


def test_a_worker_holds_the_lock_of_its_cell(tmp_path: Path):
    assert not at_work(tmp_path)
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path / LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline()
        assert at_work(tmp_path)
        process.communicate(b"\n")
    assert not at_work(tmp_path)


# A token of our own: Ray would leave one in the home folder, and a command does not ask for it when it has an address.
# Ray is polite: its tasks have niceness 15, and starve on a machine with other work.
RAY_ENVIRON = {
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_worker_niceness": "0",
}  # fmt: skip
HEAD = """
import sys
import ray
ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR")
print("address", ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray with two workers."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    command = [sys.executable, "-c", HEAD]
    with pytest.MonkeyPatch.context() as patch:  # Ray reads these when it is imported
        for name, value in RAY_ENVIRON.items():
            patch.setenv(name, value)
        # Tasks import the library; what else the command finds in its folder, only its workers do.
        environ = os.environ | {"PYTHONPATH": str(ROOT / "src")}
        with subprocess.Popen(
            command, env=environ, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as head:
            assert head.stdout is not None
            try:
                yield next(line.split()[1] for line in head.stdout if line.startswith("address "))
            finally:
                head.communicate()


def fake_on_ray(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Let this be the worker of the tasks, which run in processes of Ray's."""
    command = fake_worker(body)

    def attempt(folder, cwd, episodes, trust):  # goes to Ray by value, as nobody can import it
        from contraflow.experiments.compare import runner

        runner.WORKER = command
        return runner.attempt(folder, cwd, episodes, trust)

    monkeypatch.setattr(runner, "attempt", attempt)


@pytest.mark.slow
def test_killed_cells_are_tried_again(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two are killed by SIGKILL, in one its worker, in the other the task's own process; one is killed every time, one
    fails by itself. The first two are done, each once; the others do not stop them."""
    fake_on_ray(monkeypatch, """
        first = not (folder / "tried").exists()
        (folder / "tried").write_text("")
        if seed == 3:
            (folder / "failed.json").write_text(json.dumps({"reason": "nan"}))
            sys.exit(1)
        if seed == 2 or first:
            os.kill(os.getppid() if seed == 1 else os.getpid(), signal.SIGKILL)
            time.sleep(0.5)
            sys.exit(130)
        done()
    """)  # fmt: skip
    cells = sir_cells(tmp_path, 4)
    outcome = run_cells(cells, tmp_path, OnRay(cluster), 1, quiet=True)
    assert (outcome.before, outcome.done, outcome.interrupted) == (0, 2, False)
    assert outcome.failed[cells[3]] == "nan"
    assert outcome.failed[cells[2]].startswith("the worker was killed by signal 9 (out of memory?); its log is")
    assert sorted(seed for seed, *_ in calls(tmp_path, "ends")) == ["0", "1"], "each once"
    tries = [seed for seed, *_ in calls(tmp_path)]
    assert [tries.count(seed) for seed in "0123"] == [2, 2, 1 + runner.RETRIES, 1]


@pytest.mark.slow
def test_ctrl_c_lets_the_tasks_save(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Three cells on two workers: two save; one is left as it was. And what fails on the way back is said."""
    fake_on_ray(monkeypatch, "wait()")
    cells = sir_cells(tmp_path)

    def press() -> None:
        deadline = time.monotonic() + 240
        while sum((cell.folder / "ready").exists() for cell in cells) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    outcome = run_cells(cells, tmp_path, OnRay(cluster), 1, quiet=True)
    thread.join()
    assert outcome.interrupted and outcome.done == 0 and outcome.failed == {}
    assert [state(cell.folder) for cell in cells] == ["started"] * 3
    assert sorted((cell.folder / "saved").exists() for cell in cells) == [False, True, True]


@pytest.mark.slow
def test_a_cell_that_ray_trains(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The real worker, with code of the user that lies in the folder of the command."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    cell = Cell("guess", TINY.env, 0, GUESS, tmp_path / "cell")
    assert run_cells([cell], tmp_path, OnRay(cluster), 1, trust="all", quiet=True).done == 1, failure(cell.folder)
    assert (cell.folder / FINAL).exists() and not at_work(cell.folder)
