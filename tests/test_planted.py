"""The bugs of tests/planted can still be planted, and the tests that they name are there."""

import ast
from pathlib import Path

import pytest
from tests.planted import Bug, bugs

TESTS = Path(__file__).parent


@pytest.mark.parametrize("bug", [pytest.param(bug, id=name) for name, bug in bugs().items()])
def test_can_be_planted(bug: Bug, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        bug.plant(patch)
    for test in bug.tests:
        file, _, name = test.partition("::")
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert not name or name.partition("[")[0] in found, test
