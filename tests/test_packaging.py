"""What pyproject.toml promises: one list of pins in two places, and no import that no dependency provides."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINS = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
PYTHONS = [c.rpartition(" ")[2] for c in PROJECT["project"]["classifiers"] if "Python :: 3." in c]
IMPORT_NAMES = {
    "huggingface-hub": "huggingface_hub",
    "imageio[ffmpeg]": "imageio",
    "orbax-checkpoint": "orbax",
    "ott-jax": "ott",
    "pillow": "PIL",
    "playground": "mujoco_playground",
    "scikit-learn": "sklearn",
}


def import_names(requirements: list[str]) -> set[str]:
    names = (re.split(r"[<>=!~; ]", requirement, maxsplit=1)[0] for requirement in requirements)
    return {IMPORT_NAMES.get(name, name) for name in names}


def test_uv_and_pip_use_the_same_pins():
    assert PROJECT["tool"]["uv"]["constraint-dependencies"] == PINS
    assert all(
        re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*( ; python_version [<>]=? \"3\.[0-9]+\")?", pin) for pin in PINS
    )


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_pinned_once(python: str):
    pins = [Requirement(pin) for pin in PINS]
    names = [pin.name for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": python})]
    assert len(names) == len(set(names))
    extras = PROJECT["project"]["optional-dependencies"]
    unpinned = (
        "cuda",
        "cuda13",
        "export",
        "hub",
        "playground",
        "trackio",
        "wandb",
    )  # neither tests nor `make train` install these
    lists = [PROJECT["project"]["dependencies"], *(extras[name] for name in extras if name not in unpinned)]
    assert {canonicalize_name(Requirement(r).name) for group in lists for r in group} <= set(names)


APART = {"metaworld"}
"""Installed without its own requirements, which name an older simulator (docs/how-to/data.md)."""


def test_every_import_has_a_dependency():
    """Extras may be imported anywhere, but a module of the learning core needs the core dependencies only."""
    core = import_names(PROJECT["project"]["dependencies"]) | set(sys.stdlib_module_names) | {"contraflow"}
    extras = PROJECT["project"]["optional-dependencies"]
    users = [requirement for name in extras if name not in ("dev", "docs") for requirement in extras[name]]
    for path in sorted((ROOT / "src").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        found |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level}
        in_core = path.parent.name in ("contraflow", "flow", "nets", "rl", "agents")
        known = core if in_core else core | import_names(users) | APART
        assert {name.split(".")[0] for name in found} <= known, path
