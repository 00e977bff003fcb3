"""Code of README and tutorials: every block after `<!-- run -->` runs, in the order of the pages, in one folder.

A block after `<!-- file NAME -->` is written to that file first. Commands of the README, which take long or need a
simulator, are run with few steps.
"""

import re
import shlex
import sys
from pathlib import Path

import jax
import pytest

from contraflow.cli import main

ROOT = Path(__file__).parents[1]
PAGES = ("first-run", "environment", "demonstrations", "offline", "comparing")
BLOCK = re.compile(r"<!-- (run|file (?P<name>\S+)) -->\n```(?P<kind>sh|python)\n(?P<text>.*?)```", re.DOTALL)
COMMAND = re.compile(r"^(?:```sh\n|)((?:contraflow [^\n]+\n)+)", re.MULTILINE)
DONE: set[str] = set()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("docs")


def command(line: str) -> None:
    name, *args = shlex.split(line, comments=True)
    assert name == "contraflow", line
    try:
        code = main(args)
    except SystemExit as stop:
        code = stop.code or 0
    assert code == 0, f"{line}: exit code {code}"


def run_page(page: Path) -> int:
    """Runs what a page tells its reader to run, in the working folder; how many blocks that were."""
    blocks = list(BLOCK.finditer(page.read_text()))
    for block in blocks:
        if block["name"]:
            Path(block["name"]).write_text(block["text"])
        elif block["kind"] == "python":
            exec(compile(block["text"], page.name, "exec"), {"__name__": "__docs__"})
        else:
            for line in filter(None, block["text"].splitlines()):
                command(line)
    return len(blocks)


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.usefixtures("allow_rank_promotion")
def test_a_tutorial_runs(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    with jax.debug_key_reuse(False):  # an environment may keep its key in its state, which two programs are handed
        for page in PAGES[: PAGES.index(name) + 1]:  # later pages use files of earlier ones
            if page not in DONE:
                assert run_page(ROOT / "docs" / "start" / f"{page}.md") > 0
                DONE.add(page)
