"""Wrong behaviours, planted one by one: does the test that claims to notice fail?

    python -m tests.planted [PATTERN ...] [--jobs 2]     # all, or those whose names contain a pattern

A bug is a function that puts something wrong in the place of a function, method or attribute, and names the tests that
must fail with it. It touches what it changes through Python, as any caller does, so a rename that forgets it breaks it
with an ImportError or AttributeError, and tests/test_planted.py says so. First the tests run as they are and must pass;
then each bug runs in a process of its own, with `pytest -p tests.planted.plugin --planted NAME`.

What was imported by name elsewhere stays as it was: a bug patches the module that uses a function, or the attribute of
a class. What an update makes of its own parts is patched while the update is traced, in a `patch.context()`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

Plant = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Bug:
    """`plant` makes things wrong; `tests` are files or tests in tests/ of which one must fail."""

    name: str
    plant: Plant
    tests: tuple[str, ...]


_BUGS: dict[str, Bug] = {}


def bug(*tests: str) -> Callable[[Plant], Plant]:
    """Register a function as a bug; its name with spaces says what is wrong."""

    def register(plant: Plant) -> Plant:
        name = plant.__name__.replace("_", " ")
        _BUGS[name] = Bug(name, plant, tests)
        return plant

    return register


def wrong(patch: pytest.MonkeyPatch, owner: Any, name: str) -> Callable[[Callable[..., Any]], None]:
    """Put the decorated function in the place of `owner.name`; it gets what was there as its first argument."""
    right = getattr(owner, name)

    def put(function: Callable[..., Any]) -> None:
        @functools.wraps(right)
        def instead(*args: Any, **named: Any) -> Any:
            return function(right, *args, **named)

        patch.setattr(owner, name, instead)

    return put


def bugs() -> dict[str, Bug]:
    """All of them by name. Imports contraflow, so not before the hook of tests/conftest.py is in place."""
    for file in sorted(Path(__file__).parent.glob("bugs_*.py")):
        import_module(f"{__name__}.{file.stem}")
    return dict(_BUGS)
