"""Imports point one way: each room of the package imports only itself and the rooms named in its row."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "contraflow"
BELOW_RL = {"core", "flow", "nets", "policy"}
BELOW_TRAIN = BELOW_RL | {"rl", "data", "envs", "agents"}
TOP = BELOW_TRAIN | {"training", "runtime", "experiments", "sampling"}
MAY_IMPORT = {
    "core": set(),
    "nets": {"core"},
    "flow": {"core", "nets"},
    "policy": {"core", "flow", "nets"},
    "rl": BELOW_RL,
    "data": {"core"},
    "envs": {"core", "flow"},
    "agents": BELOW_RL | {"rl"},
    "sampling": BELOW_RL | {"rl"},
    "training": BELOW_TRAIN,
    "runtime": BELOW_TRAIN,
    "experiments": BELOW_TRAIN | {"training", "runtime"},
    "presets": TOP,
    "__init__": TOP | {"presets"},
    "cli": TOP | {"presets", "__init__"},
    "__main__": TOP | {"presets", "cli", "__init__"},
}


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Dotted names that a module of `package` imports from contraflow, the leading `contraflow.` taken off."""
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            names = [f"{base}.{alias.name}" for alias in node.names]
        yield from (name.partition(".")[2] for name in names if name.split(".")[0] == "contraflow")


def forbidden(source: str, module: str) -> list[str]:
    """Imports of `module` (a dotted name below contraflow, such as flow.path) that its row does not allow."""
    room = module.split(".")[0]
    allowed = MAY_IMPORT[room] | {room}
    names = imported(ast.parse(source), f"contraflow.{module}".rpartition(".")[0])
    names = [name if name.split(".")[0] in MAY_IMPORT else "__init__" for name in names]
    return [name for name in names if not any(name == a or name.startswith(f"{a}.") for a in allowed)]


MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str):
    assert module.split(".")[0] in MAY_IMPORT, "a new room: give it a row in MAY_IMPORT"
    assert forbidden(MODULES[module].read_text(encoding="utf-8"), module) == []


@pytest.mark.parametrize(
    ("module", "source", "bad"),
    [
        ("flow.path", "from contraflow.rl.critics import Critics", ["rl.critics.Critics"]),
        ("flow.path", "from ..rl import critics", ["rl.critics"]),
        ("flow.__init__", "from .path import Linear\nfrom ..policy import base", ["policy.base"]),
        ("agents.rfm", "def f():\n    import contraflow.envs.base", ["envs.base"]),
        ("agents.rfm", "from contraflow import RFM", ["__init__"]),
        ("agents.rfm", "from contraflow import rl\nfrom contraflow.flow.path import Linear", []),
        (
            "sampling.run",
            "from contraflow.core.settings import suggest\nfrom contraflow.training import run",
            ["training.run"],
        ),
        ("core.types", "import jax\nfrom contraflow_tools import x", []),
    ],
)
def test_violations_are_found(module: str, source: str, bad: list[str]):
    assert forbidden(source, module) == bad
