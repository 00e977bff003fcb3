"""Cells as tasks of Ray: what is refused and what a task says, without Ray; kills and Ctrl-C on a local cluster."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.cli_helpers import COMMAND, ENVIRON, ROOT, assert_refused, cli

from contraflow import SIR
from contraflow.experiments.compare import on_ray, pool
from contraflow.experiments.compare.matrix import FINAL, LOCK, Cell, Settings, at_work, plan, state, steps_taken
from contraflow.training.log import read_evaluations
from contraflow.training.run import progress

GOOD = ["compare", "--agents", "sir", "--envs", "probe:action", "--seeds", "1", "--steps", "40", "--collect", "10"]


def cell_in(out: Path) -> Cell:
    (cell,) = plan({"sir": SIR()}, ["probe:action"], 1, Settings(steps=40, collect=10), frozenset(), out)
    cell.folder.mkdir(parents=True)
    return cell


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
    assert time.monotonic() - start < 5


def test_ray_decides_how_many_run_and_where(tmp_path: Path):
    ray = [*GOOD, "--out", str(tmp_path / "m"), "--ray", "auto"]
    assert_refused([*ray, "--jobs", "2"], "leave out jobs, or ray")
    assert_refused([*ray, "--together"], "leave out together, or ray")


def test_what_a_task_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Done, the reason of the worker, or, when it left none, an error after which Ray tries again."""
    folder = cell_in(tmp_path).folder

    def attempt(body: str) -> str | None:
        code = f"import os, pathlib, sys; folder = pathlib.Path(sys.argv[1]); {body}"
        monkeypatch.setattr(pool, "WORKER", (sys.executable, "-S", "-c", code))
        return on_ray.attempt(folder, tmp_path, 1, False)

    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.delenv("JAX_PLATFORMS")
    with pytest.raises(ChildProcessError, match="killed by signal 9"):
        attempt("os.kill(os.getpid(), 9)")
    assert state(folder) == "new", "that it may yet be done is not said to have failed"
    with pytest.raises(ChildProcessError, match="exit code 130"):
        attempt("sys.exit(130)")
    assert attempt("(folder / 'failed.json').write_text('{\"reason\": \"nan\"}'); sys.exit(1)") == "nan"
    words = "os.getcwd(), os.environ['JAX_PLATFORMS'], os.environ['XLA_FLAGS']"
    assert attempt(f"print({words}); (folder / 'final.json').write_text('{{}}')") is None
    assert (folder / "worker.log").read_text() == f"{tmp_path} cpu {pool.ONE_THREAD}\n"


def test_a_cancelled_task_lets_its_worker_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    folder = cell_in(tmp_path).folder
    code = (
        "import pathlib, signal, sys, time; folder = pathlib.Path(sys.argv[1])\n"
        "def save(*args): time.sleep(.3); (folder / 'saved').write_text(''); sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, save); (folder / 'ready').write_text(''); time.sleep(60)"
    )
    monkeypatch.setattr(pool, "WORKER", (sys.executable, "-S", "-c", code))

    def cancel(seconds: float) -> None:
        if (folder / "ready").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(on_ray, "time", SimpleNamespace(sleep=cancel))
    with pytest.raises(KeyboardInterrupt):
        on_ray.attempt(folder, tmp_path, 1, False)
    assert (folder / "saved").exists()


def test_what_becomes_of_a_task_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """After the last retry: the reason in one line, kept in the folder; a result that is there counts."""

    class RayTaskError(RayError):
        cause = ChildProcessError("the worker was killed by signal 9")

    def result(error: Exception) -> str | None:
        def get(reference):
            raise error

        return on_ray._result(fake_ray(monkeypatch, get=get), None, cell)

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
RAY_ENVIRON = ENVIRON | {
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)
}  # fmt: skip
HEAD = """
import sys
import ray
ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR")
print("address", ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
ARGS = [
    "compare", "--agents", "tests.cli_helpers:Guess", "--collect", "10", "--num-envs", "2", "--batch-size", "8",
    "--buffer-size", "64", "--eval-episodes", "1", "--log-every", "50", "--final-episodes", "2", "--trust",
]  # fmt: skip


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray with two workers."""
    pytest.importorskip("ray")
    command = [sys.executable, "-c", HEAD]
    # From another folder, without ours on the path: tasks must find the code that the command finds in its own.
    environ = RAY_ENVIRON | {"PYTHONPATH": str(ROOT / "src")}
    with subprocess.Popen(
        command, env=environ, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as head:
        assert head.stdout is not None
        try:
            yield next(line.split()[1] for line in head.stdout if line.startswith("address "))
        finally:
            head.communicate()


def deadly(num_envs: int, seed: int):
    """An environment that takes its process along."""
    print("killing myself", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def worker_of(folder: Path) -> tuple[int, int]:
    """(process id, that of its parent) of the worker of a cell."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().split(b"\0")
            if str(folder).encode() in words and b"contraflow.experiments.compare.worker" in words:
                parent = (file.parent / "stat").read_text().rpartition(")")[2].split()[1]
                return int(file.parent.name), int(parent)
        except OSError:  # it ended meanwhile
            continue
    raise AssertionError(f"nobody is at work in {folder}")


def wait(condition, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_killed_cells_are_retried_from_their_checkpoints(cluster: str, tmp_path: Path):
    """Two are killed by SIGKILL, in one its worker, in the other the task's own process; one is killed every time, one
    fails by itself. The first two are done, each once; the others do not stop them."""
    envs = ["probe:constant", f"{__name__}:deadly", "tests.cli_helpers:nan_soon"]
    args = [*ARGS, "--envs", ",".join(envs), "--seeds", "2", "--steps", "2000", "--eval-every", "100"]
    args += ["--out", str(tmp_path / "m"), "--ray", cluster]
    cells = [tmp_path / "m/Guess/probe-constant" / f"seed{seed}" for seed in (0, 1)]
    command = subprocess.Popen([*COMMAND, *args], env=RAY_ENVIRON, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    history = {}
    try:
        for cell in cells:
            # The checkpoint of step 100 is there when the evaluation of step 200 is.
            wait(lambda cell=cell: len(read_evaluations(cell)) >= 2, command)
            worker, task = worker_of(cell)
            os.kill(worker if cell is cells[0] else task, signal.SIGKILL)
            history[cell] = read_evaluations(cell)[:2]
            assert state(cell) == "started"
        out = command.communicate(timeout=300)[0]
    finally:
        command.kill()
        command.communicate()
    assert command.returncode == 1
    assert "2 of 6 cells done, 2 of them now, 4 failed" in out
    for seed, cell in enumerate(cells):
        assert out.count(f"Guess on probe:constant, seed {seed}: done") == 1
        rows = read_evaluations(cell)
        assert [row["step"] for row in rows] == list(range(100, 2001, 100)), "every evaluation once"
        assert rows[0] == history[cell][0], "that of before the kill, its seconds included"
    for seed in (0, 1):
        assert f"failed: Guess on {envs[1]}, seed {seed}: the worker was killed by signal 9 (out of memory?)" in out
        assert f"failed: Guess on {envs[2]}, seed {seed}: environment <lambda> returned a non-finite" in out
        log = tmp_path / f"m/Guess/{__name__}-deadly/seed{seed}/worker.log"
        assert log.read_text().count("killing myself") == 1 + on_ray.RETRIES
    before = [(cell / FINAL).stat().st_mtime_ns for cell in cells]
    again = [word.split(",")[0] for word in args]
    code, out, _ = cli(*again[: again.index("--ray")])
    assert code == 0 and "2 of 2 cells done, 0 of them now, 0 failed" in out
    assert before == [(cell / FINAL).stat().st_mtime_ns for cell in cells]


@pytest.mark.slow
def test_ctrl_c_lets_the_tasks_save(cluster: str, tmp_path: Path):
    """Three cells on two workers: two save, far from the next evaluation; one is left as it was."""
    args = [*ARGS, "--envs", "probe:constant", "--seeds", "3", "--steps", "200000", "--eval-every", "200000"]
    args += ["--out", str(tmp_path / "m"), "--ray", cluster]
    cells = [tmp_path / "m/Guess/probe-constant" / f"seed{seed}" for seed in range(3)]
    command = subprocess.Popen([*COMMAND, *args], env=RAY_ENVIRON, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        wait(lambda: sum((steps_taken(cell) or 0) >= 100 for cell in cells) == 2, command)
        command.send_signal(signal.SIGINT)
        out = command.communicate(timeout=120)[0]
    finally:
        command.kill()
        command.communicate()
    assert command.returncode == 130 and "0 of 3 cells done, 0 of them now, 0 failed" in out
    assert "the same command continues" in out
    assert [state(cell) for cell in cells] == ["started"] * 3 and not any(at_work(cell) for cell in cells)
    assert sorted(progress(cell, trust=True) >= 100 for cell in cells) == [False, True, True]
