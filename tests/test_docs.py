"""Code of README and docs.

Every block of a tutorial after `<!-- run -->` runs, in the order of the pages, in one folder; a block after
`<!-- file NAME -->` is written to that file first. The recipes of the README run with less of everything. In all other
blocks, which may take long, `contraflow train` must be a command whose flags exist.
"""

import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import jax
import numpy as np
import pytest
from tests.cli_helpers import ENVIRON

from contraflow.agents import presets
from contraflow.cli import main
from contraflow.cli.align import INSTEAD
from contraflow.cli.settings import parse_train

ROOT = Path(__file__).parents[1]
PAGES = (
    "start/first-run", "start/environment", "start/demonstrations", "start/offline", "start/comparing",
    "start/sampling", "start/serving", "how-to/runs",
)  # fmt: skip
NEEDS = {
    "start/demonstrations": ("start/environment",),
    "start/offline": ("start/environment", "start/demonstrations"),
    "start/serving": ("start/environment", "start/demonstrations"),
}
"""Pages whose files another one uses."""
BLOCK = re.compile(r"<!-- (run|file (?P<name>\S+)) -->\n```(?P<kind>sh|python)\n(?P<text>.*?)```", re.DOTALL)
TRAIN = re.compile(r"^contraflow train (?P<preset>[\w-]+) (?P<flags>[^\n]*)$", re.MULTILINE)
ALIGN = re.compile(r"^contraflow align (?P<preset>[\w-]+) (?P<flags>[^\n]*)$", re.MULTILINE)
TEXTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
DONE: set[str] = set()
LESS = {
    "--steps 100000": "--steps 300 --eval-every 150 --eval-episodes 1",
    "--episodes 20 --video cheetah.mp4": "--episodes 2",
    "--out runs/cloned": "--steps 100 --out runs/cloned",
    "--out runs/tuned": "--steps 2000 --eval-every 2000 --eval-episodes 1 --out runs/tuned",
    "--rows 200000": "--rows 1500",
    "--env ogbench:scene-play-singletask-task1-v0": "--task scene-play-singletask-task1-v0",  # no episodes to evaluate
    "--out runs/scene": "--steps 4 --log-every 4 --out runs/scene",
    "--above 300": "--above -1 --episodes 4 --delta 0.4",
    "--out runs/digits": "--steps 200 --out runs/digits",
    "--out runs/aligned": "--steps 512 --eval-every 512 --out runs/aligned",
    "--trust my_agent": "--trust my_agent --steps 300 --eval-every 300 --eval-episodes 1",
}
"""What a recipe of the README says, and the little of it that the test runs."""
AGENT = """
from dataclasses import dataclass

from contraflow.agents.online.sac import SAC


@dataclass(frozen=True)
class MyAgent(SAC):
    pass
"""


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


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
@pytest.mark.usefixtures("allow_rank_promotion")
@pytest.mark.filterwarnings(r"ignore:connect\(\) must be used:DeprecationWarning")  # the client of openpi
def test_a_tutorial_runs(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    with jax.debug_key_reuse(False):  # an environment may keep its key in its state, which two programs are handed
        for page in (*NEEDS.get(name, ()), name):
            if page not in DONE:
                assert run_page(ROOT / "docs" / f"{page}.md") > 0
                DONE.add(page)


@pytest.mark.slow
def test_the_recipes_of_the_readme_run(tmp_path, monkeypatch):
    """All of them but the server, which goes on until it is stopped and has a tutorial of its own."""
    (tmp_path / "my_agent.py").write_text(AGENT)
    monkeypatch.chdir(tmp_path)

    def command(line: str) -> None:
        """In a process of its own, which compiles for speed, as the networks are of the default sizes."""
        name, *args = shlex.split(line, comments=True)
        done = subprocess.run(
            [sys.executable, "-m", name, *args], env=ENVIRON | {"XLA_FLAGS": ""}, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{line}: {done.stderr}"

    text = (ROOT / "README.md").read_text()
    for much, little in LESS.items():
        assert text.count(much) == 1, much
        text = text.replace(much, little)
    for kind, code in re.findall(r"```(sh|python)\n(.*?)```", text, re.DOTALL):
        if kind == "python":
            exec(compile(code, "README.md", "exec"), {"observation": np.zeros(17)})
        for line in code.splitlines() if kind == "sh" else []:
            if line.startswith("contraflow") and not line.startswith("contraflow serve"):
                command(line)
            if line.startswith("contraflow eval"):
                command("contraflow record runs/cheetah --episodes 2 --out ./demos.npz")


def test_there_is_code_in_every_tutorial():
    for name in PAGES:
        assert list(BLOCK.finditer((ROOT / "docs" / f"{name}.md").read_text())), name


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_have_flags_that_exist(page):
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL):
        for line in TRAIN.finditer(block):
            words = shlex.split(line["flags"], comments=True)
            if line["preset"] in presets() and "--trust" not in words and "..." not in words:
                parse_train(line["preset"], words)
        for line in ALIGN.finditer(block):
            words = [INSTEAD.get(word, word) for word in shlex.split(line["flags"], comments=True)]
            if line["preset"] in presets():
                parse_train(line["preset"], words)


def test_what_the_reference_names_exists():
    """The pages are filled in when the site is built, which no test does."""
    marks = [
        mark for page in TEXTS for mark in re.findall(r"^\{\{ (?:settings|api) (\S+) \}\}$", page.read_text(), re.M)
    ]
    assert len(marks) > 30
    for place in marks:
        module, _, name = place.partition(":")
        assert hasattr(import_module(module), name or "__name__"), place
