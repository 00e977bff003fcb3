"""Trackers: one run of theirs for each seed, continued by its id."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from tests.cli_helpers import TINY, Guess

from contraflow import resume, train, train_seeds
from contraflow.training.log import TRACKERS

RUN = replace(TINY, agent=Guess(), trackers=("wandb", "trackio"))


class Client:
    """A module with the interface of W&B and Trackio."""

    def __init__(self):
        self.runs: list[dict] = []

    def init(self, **options):
        self.runs.append(options | {"rows": [], "done": False})
        mine = self.runs[-1]
        return SimpleNamespace(
            log=lambda values, step: mine["rows"].append((step, values)), finish=lambda: mine.update(done=True)
        )


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> dict[str, Client]:
    found = {name: Client() for name in ("wandb", "trackio")}
    for name, client in found.items():
        monkeypatch.setitem(sys.modules, name, client)  # pyright: ignore
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    return found


def test_a_resumed_run_continues_that_of_the_tracker(clients: dict[str, Client], tmp_path: Path):
    train(RUN, tmp_path / "run", quiet=True)
    resume(tmp_path / "run", steps=60, quiet=True, trust="all")
    ids = json.loads((tmp_path / "run" / TRACKERS).read_text())
    for name, client in clients.items():
        first, second = client.runs
        assert first["resume"] == second["resume"] == "allow" and first["done"] and second["done"]
        key = "id" if name == "wandb" else "name"
        assert first[key] == second[key] == ids[name]
        assert [step for step, _ in second["rows"]][-1] == 60 and any("eval/return_mean" in v for _, v in first["rows"])
    assert clients["wandb"].runs[0]["name"] == "run" and clients["wandb"].runs[0]["group"] is None


def test_each_seed_has_a_run_of_its_own(clients: dict[str, Client], tmp_path: Path):
    with jax.debug_key_reuse(False):  # as in test_seeds
        train_seeds(RUN, (3, 1), tmp_path / "many", quiet=True)
    for client in clients.values():
        assert len({run.get("id", run["name"]) for run in client.runs}) == 2
        assert [run["group"] for run in client.runs] == ["many", "many"]
        assert [run["config"]["seed"] for run in client.runs] == [3, 1]
        assert all([step for step, _ in run["rows"]][-1] == 40 for run in client.runs)
    assert [run["name"] for run in clients["wandb"].runs] == ["seed3", "seed1"]
    assert all(run["reinit"] == "create_new" for run in clients["wandb"].runs), "or the second would end the first"
