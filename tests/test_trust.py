"""Code outside the library: what is named is imported, the rest is not, and no file hides a package."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli_helpers import ENVIRON, assert_refused, cli

from contraflow.core.errors import UserError
from contraflow.core.trust import admit


@pytest.mark.parametrize("trust", ["mine", "mine.agents", "other, mine", "mine.agents,", "all"])
def test_named_modules_and_what_lies_below_them(trust: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """They are imported from the working folder too, after everything that is installed."""
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    monkeypatch.chdir(tmp_path)
    admit("mine.agents:Agent", trust)
    assert sys.path.index(str(tmp_path)) == len(sys.path) - 1


@pytest.mark.parametrize(
    ("trust", "remedy"),
    [
        ("", "--trust mine.agents"),
        ("min", "--trust min,mine.agents"),
        ("mine.agents.deep", "--trust mine.agents.deep,mine.agents"),
        ("agents", "--trust agents,mine.agents"),
        (",", "--trust mine.agents"),
    ],
)
def test_the_rest_is_refused_with_the_remedy(trust: str, remedy: str):
    with pytest.raises(UserError, match=f"^mine.agents:Agent is code outside the library.*pass {remedy}$"):
        admit("mine.agents:Agent", trust)


def test_a_file_cannot_bring_in_more_than_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A config.json of somebody's names a second module: it is not imported, and the folder does not say why not."""
    flags = ["--env", "probe:action", "--steps", "20", "--quiet", "--trust", "tests.cli_helpers"]
    assert cli("train", "tests.cli_helpers:Guess", *flags, "--out", tmp_path / "run")[0] == 0
    config = tmp_path / "run" / "config.json"
    data = json.loads(config.read_text())
    data["run"]["source"]["env"] = "harmful:World"
    config.write_text(json.dumps(data))
    (tmp_path / "harmful.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()")
    monkeypatch.chdir(tmp_path)
    resume = ["resume", str(tmp_path / "run"), "--steps", "40", "--trust"]
    assert_refused([*resume, "tests.cli_helpers"], "harmful:World", "--trust tests.cli_helpers,harmful")
    assert not (tmp_path / "ran").exists()
    assert_refused([*resume, "tests.cli_helpers,harmful"], "has no attribute 'World'")
    assert (tmp_path / "ran").exists(), "named, it is imported"


def test_the_working_folder_hides_no_package(tmp_path: Path):
    """A file named like a module of the library's dependencies is not imported in its place."""
    (tmp_path / "mine.py").write_text("from tests.cli_helpers import Guess as Base\n\nclass Mine(Base):\n    pass\n")
    for name in ("optax", "colorsys"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the working folder')")
    code = "import sys; sys.path.remove(''); from contraflow.cli import main; code = main(sys.argv[1:]); "
    code += "import colorsys; sys.exit(code)"
    args = ["train", "mine:Mine", "--trust", "mine,tests", "--env", "probe:action", "--steps", "20", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", code, *args], cwd=tmp_path, env=ENVIRON, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs").exists()
