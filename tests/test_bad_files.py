"""Files that are damaged, foreign or do not fit on the disk: one message, exit code 2, nothing lost."""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.cli_helpers import GUESS, TINY, Guess, assert_refused, cli, in_subprocess, with_source

from contraflow import SIR
from contraflow.core.settings import SCHEMA
from contraflow.rl.critics import Critics
from contraflow.training import checkpoint
from contraflow.training import run as driver
from contraflow.training import run_writer as record
from contraflow.training.run import read_config

# damaged and foreign files


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad") / "run"
    driver.train(replace(TINY, agent=Guess()), folder, trust="all", quiet=True)
    return folder


@pytest.fixture
def finished(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


RESUME = ["--trust", "all", "--quiet", "--steps", "60"]


def test_resume_to_less_than_there_is(finished: Path):
    assert_refused(["resume", str(finished), "--trust", "all", "--steps", "30"], "--steps 30", "40")


@pytest.mark.parametrize("how", ["cut", "emptied", "removed", "altered"])
def test_a_damaged_checkpoint(how: str, finished: Path):
    newest = finished / "checkpoints/40"
    file = max((f for f in newest.rglob("*") if f.parent.name == "d"), key=lambda f: f.stat().st_size)
    data = file.read_bytes()
    file.write_bytes({"cut": data[:-9], "altered": data[:40] + bytes([data[40] ^ 1]) + data[41:]}.get(how, b""))
    if how == "removed":
        file.unlink()
    args = ["resume", str(finished), *RESUME]
    assert_refused(args, "checkpoint 40", "cannot be read", file.name, f"delete {newest}")
    shutil.rmtree(newest)  # the remedy
    code, out, _ = cli(*args)
    assert code == 0 and "trained to step 60" in out


def test_a_foreign_folder_among_the_checkpoints(finished: Path):
    """Somebody else's checkpoint is neither taken for the newest nor touched."""
    shutil.rmtree(finished / "checkpoints/40")
    other = finished / "checkpoints/model_final"
    other.mkdir()
    (other / "weights.bin").write_bytes(b"abc")
    code, out, _ = cli("resume", finished, "--trust", "all", "--quiet")
    assert code == 0 and "trained to step 40" in out and (other / "weights.bin").exists()


@pytest.mark.parametrize("change", [{"buffer_size": 32}, {"num_envs": 4}])
def test_a_checkpoint_of_another_configuration(change: dict, finished: Path):
    driver.write_config(with_source(read_config(finished, "all"), **change), finished)
    name = next(iter(change))
    words = ("checkpoint 40", "does not fit", "where this run needs", f"source.{name} was", "start a new run")
    assert_refused(["resume", str(finished), *RESUME], *words)


def test_a_checkpoint_of_another_agent(finished: Path):
    driver.write_config(replace(TINY, agent=SIR(critic=Critics(width=8, depth=1))), finished)
    assert_refused(
        ["resume", str(finished), *RESUME], "checkpoint 40", "it lacks learner/agent/critic", "start a new run"
    )


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda c: c | {"schema": SCHEMA + 1}, [f"uses schema {SCHEMA + 1}", f"reads {SCHEMA}", "upgrade contraflow"]),
        (lambda c: c | {"schema": 1}, ["uses schema 1", "use the release that wrote it"]),
        (lambda c: {"model": "other"}, ["was not written by contraflow"]),
        (lambda c: [1], ["was not written by contraflow"]),
        (lambda c: c | {"run": c["run"] | {"colour": "red"}}, ["Run has no field 'colour'"]),
        (lambda c: c | {"run": c["run"] | {"agent": {"kind": "RMF"}}}, ["unknown kind 'RMF'", "did you mean 'RFM'"]),
        (lambda c: c | {"run": c["run"] | {"steps": -5}}, ["--steps must be at least 1, got -5"]),
        (lambda c: {k: v for k, v in c.items() if k != "run"}, ["does not describe a run"]),
    ],
)
@pytest.mark.parametrize("command", ["resume", "train"])
def test_a_foreign_config(command: str, edit, words: list[str], finished: Path):
    file = finished / "config.json"
    file.write_text(json.dumps(edit(json.loads(file.read_text()))))
    assert_refused([command, str(finished), "--trust", "all"], *words)


def test_a_config_cut_short(finished: Path):
    file = finished / "config.json"
    file.write_text(file.read_text()[:100])
    assert_refused(["resume", str(finished), "--trust", "all"], "not valid JSON")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("eval.csv", "step,seconds\n20,abc\n"),
        ("eval.csv", "step,seconds,return_mean\n20,1\n"),
        ("eval.csv", "step,seconds\n20,1\n"),
        ("metrics.jsonl", "no json\n"),
        ("metrics.jsonl", "{}\n"),
        ("metrics.jsonl", "3\n"),
        ("best/evaluation.json", "3"),
        ("best/evaluation.json", "{}"),
    ],
)
def test_damaged_records(name: str, text: str, finished: Path):
    (finished / name).write_text(text)
    assert_refused(
        ["resume", str(finished), "--trust", "all", "--quiet", "--steps", "60"], name, "is damaged", "delete"
    )


def test_a_policy_of_the_wrong_shape(finished: Path):
    file = finished / "policy/model.safetensors"
    arrays = load_file(file)
    save_file({name: np.zeros((3, *x.shape), x.dtype) for name, x in arrays.items()}, file)
    assert_refused(["eval", str(finished), "--trust", "all"], "bias of shape (3, 1)", "need (1,)")


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: [],
        lambda c: c | {"policy": None},
        lambda c: c | {"policy": {"kind": 3}},
        lambda c: c | {"policy": c["policy"] | {"kind": "os:getcwd"}},
        lambda c: c | {"policy": c["policy"] | {"kind": "tests.cli_helpers:pointer"}},
        lambda c: c | {"policy": c["policy"] | {"bias": 3}},
        lambda c: c | {"policy": c["policy"] | {"bias": {"array": "other", "shape": [1]}}},
        lambda c: c | {"spec": None},
        lambda c: c | {"spec": c["spec"] | {"obs_dim": 1.5}},
        lambda c: c | {"spec": {"kind": "EnvSpec"}},
        lambda c: c | {"env": 3},
        lambda c: {k: v for k, v in c.items() if k != "spec"},
    ],
)
def test_a_damaged_policy(edit, finished: Path):
    file = finished / "policy/config.json"
    file.write_text(json.dumps(edit(json.loads(file.read_text()))))
    assert_refused(["eval", str(finished), "--trust", "all"])


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\x00", b"null"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_policy_that_is_no_such_file(name: str, data: bytes, finished: Path):
    (finished / "policy" / name).write_bytes(data)
    assert_refused(["eval", str(finished), "--trust", "all"], str(finished / "policy"))


def test_a_policy_for_another_environment(finished: Path):
    assert_refused(
        ["eval", str(finished), "--trust", "all", "--env", "bandit:linear/3"],
        "3 actions",
        "trained for 1 and 1",
        "probe:obs-action",
    )


def test_a_film_without_imageio(finished: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "imageio.v2", None)
    assert_refused(["eval", str(finished), "--trust", "all", "--video", "a.mp4"], 'pip install "contraflow[mujoco]"')


def test_a_film_of_what_cannot_be_shown(finished: Path):
    assert_refused(["eval", str(finished), "--trust", "all", "--video", "a.mp4"], "cannot be rendered")


# a full disk


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("victim", ["checkpoint.save", "save_policy", "write_config"])
def test_a_full_disk(victim: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import os

    def full(*args):
        raise OSError(number, os.strerror(number))

    owner, name = {
        "checkpoint.save": (driver.checkpoint, "save"),
        "save_policy": (record, "save_policy"),
        "write_config": (driver, "write_config"),
    }[victim]
    monkeypatch.setattr(owner, name, full)
    out = str(tmp_path / "run")
    assert_refused([*GUESS, "--out", out], "the disk is full", "free some space", f"contraflow resume {out}")


def test_a_disk_about_to_be_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Told before the second checkpoint is begun: the first is whole, and nothing half-written lies about."""
    real, calls = shutil.disk_usage, []

    def shrinking(path):
        calls.append(path)
        return real(path)._replace(free=10**9 if len(calls) == 1 else 500_000)

    monkeypatch.setattr(shutil, "disk_usage", shrinking)
    words = ("the disk is full", "takes up to 1 MB", "MB are free", "contraflow resume")
    assert_refused([*GUESS, "--out", str(tmp_path / "run")], *words)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["0"]


LIMITED = """
import resource, sys
from contraflow.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(main(sys.argv[2:]))
"""


def test_a_disk_that_fills_up_in_the_middle(tmp_path: Path):
    """Files may not grow beyond 64 KiB: the empty replay of the first checkpoint compresses below that."""
    folder = tmp_path / "run"
    args = [*GUESS, "--out", folder, "--steps", 12_000, "--collect", 8_000, "--eval-every", 4_000]
    done = in_subprocess(LIMITED, 64 * 1024, *args, "--buffer-size", 12_000)
    assert done.returncode == 2, done.stderr
    assert "the disk is full" in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
    last = checkpoint.latest(folder)
    assert last is not None
    code, out, _ = cli("resume", folder, "--trust", "all", "--quiet")  # there is room again
    assert code == 0 and "trained to step 12,000" in out
