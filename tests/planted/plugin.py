"""pytest -p tests.planted.plugin --planted NAME: the session runs with that bug."""

import pytest
from tests.planted import bugs

_PATCH = pytest.MonkeyPatch()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--planted", required=True, help="name of a bug of tests/planted")


def pytest_configure(config: pytest.Config) -> None:
    # tests/conftest.py has installed its hook by now, and no test has been imported.
    bugs()[config.getoption("planted")].plant(_PATCH)


def pytest_unconfigure() -> None:
    _PATCH.undo()
