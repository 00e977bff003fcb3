"""Files written whole or not at all; one process in a folder."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli_helpers import ENVIRON

from contraflow import UserError
from contraflow.core import files


def test_what_fails_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "a.json"
    files.write_json(path, {"x": 1})

    def break_off():
        with files.replacing(path) as temporary:
            temporary.write_text("half")
            assert files.read_json(path) == {"x": 1}
            raise RuntimeError

    with pytest.raises(RuntimeError):
        break_off()
    assert files.read_json(path) == {"x": 1} and os.listdir(tmp_path) == ["a.json"]
    files.write_json(path, {"x": 2})
    assert files.read_json(path) == {"x": 2} and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_is_named(data: bytes, tmp_path: Path):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(UserError, match=r"a.json is not valid JSON"):
        files.read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"b.json cannot be read"):
        files.read_json(tmp_path / "b.json")


HOLD = """
import sys, time
from pathlib import Path
from contraflow.core.files import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_one_process_in_a_folder(tmp_path: Path):
    with files.locked(tmp_path):
        assert (tmp_path / files.LOCK).read_text() == f"{os.getpid()}\n"
    assert os.listdir(tmp_path) == []
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], env=ENVIRON, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "locked\n"
    other = rf"another process \(pid {process.pid}\) is using {tmp_path}"
    with pytest.raises(UserError, match=other), files.locked(tmp_path):
        raise AssertionError("both are in")
    process.kill()
    process.communicate()
    with files.locked(tmp_path):  # what a killed process leaves is no lock
        pass
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run cannot be created \(Not a directory\): choose another --out"):
        files.make_folder(tmp_path / "file/run")
    assert files.make_folder(tmp_path / "a/b") == [tmp_path / "a", tmp_path / "a/b"]
    assert files.make_folder(tmp_path / "a/b") == []


def test_a_full_disk_is_named(tmp_path: Path):
    for error in (OSError(errno.ENOSPC, "x"), RuntimeError(f"tensorstore: {os.strerror(errno.EFBIG)} [5]")):
        with pytest.raises(UserError, match="the disk is full"), files.full_disk_named(tmp_path):
            raise error
    with pytest.raises(PermissionError), files.full_disk_named(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")
