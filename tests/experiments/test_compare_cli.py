"""`contraflow compare`: what is refused before anything runs."""

from pathlib import Path

import pytest
from tests.cli_helpers import assert_refused, cli

from contraflow import UserError
from contraflow.cli.compare import named_agents
from contraflow.experiments.compare import runner
from contraflow.experiments.compare.runner import Local, OnRay, Outcome
from contraflow.presets import PRESETS

GOOD = {"--agents": "sir,sac", "--envs": "probe:action", "--seeds": "1", "--steps": "40", "--collect": "10"}


def flags(out: Path, **change: str) -> list[str]:
    given = GOOD | {f"--{name.replace('_', '-')}": value for name, value in change.items()} | {"--out": str(out)}
    return ["compare", *(word for pair in given.items() for word in pair)]


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch: pytest.MonkeyPatch):
    def fail(*args):
        raise AssertionError("a worker was started")

    monkeypatch.setattr(runner, "start", fail)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"agents": "sir,rmf"}, ["there is no preset rmf", "did you mean 'rfm'?"]),
        ({"agents": "sir,mine:Agent"}, ["mine:Agent is code outside the library", "--trust mine"]),
        ({"agents": "sir,sir"}, ["--agents names sir twice"]),
        ({"agents": "sir,sir=sac"}, ["two agents are called sir"]),
        ({"agents": "sir,,sac"}, ["names nothing between two commas"]),
        ({"agents": "runs/none"}, ["needs a name for its folder", "NAME=runs/none"]),
        ({"agents": "a=runs/none"}, ["runs/none does not exist"]),
        ({"agents": "../up=sir"}, ["needs a name"]),
        ({"envs": "probe:action,probe:twostep"}, ["unknown environment probe:twostep", "did you mean probe:two-step"]),
        ({"envs": "probe:action,bandit:x"}, ["unknown environment bandit:x"]),
        ({"envs": "probe:action,some.module:Env"}, ["--trust some.module"]),
        ({"envs": "probe:action,probe:action"}, ["--envs names probe:action twice"]),
        ({"own": "rfm"}, ["--own rfm is not one of the agents"]),
        ({"agents": "bc"}, ["agent bc: it learns from a dataset: give --data, one for probe:action"]),
        ({"agents": "bc", "data": "a,b"}, ["--data names 2 datasets for 1 environments"]),
        ({"collect": "40"}, ["agent sir: --collect must lie between 0 and --steps 40"]),
        ({"critic.width": "0"}, ["width must be positive"]),
        ({"seeds": "0"}, ["seeds and jobs must be at least 1"]),
        ({"jobs": "0"}, ["seeds and jobs must be at least 1"]),
        ({"final_episodes": "0"}, ["final_episodes must be at least 1"]),
    ],
)
def test_refused_before_anything_runs(change: dict[str, str], words: list[str], tmp_path: Path):
    assert_refused(flags(tmp_path / "m", **change), *words)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(("package", "env", "says"), [
    ("envpool", "envpool:CheetaRun-v1", "did you mean envpool:CheetahRun-v1"),
    ("gymnasium", "gym:HalfCheeta-v5", "did you mean gym:HalfCheetah-v5"),
])  # fmt: skip
def test_simulators_are_looked_up_not_built(package, env, says, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module = pytest.importorskip(package)

    def fail(*args, **options):
        raise AssertionError("a simulator was built")

    monkeypatch.setattr(module, "make_gymnasium" if package == "envpool" else "make", fail)
    assert_refused(flags(tmp_path / "m", envs=f"probe:action,{env}"), "unknown environment", says)


def test_other_settings_in_the_same_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("contraflow.cli.compare.run_cells", lambda *args: Outcome(0, 2, {}))
    assert cli(*flags(tmp_path / "m"))[0] == 0
    assert_refused(flags(tmp_path / "m", steps="50"), "steps = 40, not 50", "another --out")
    assert_refused(flags(tmp_path / "m", **{"critic.gamma": "0.9"}), "gamma = 0.99, not 0.9")
    assert cli(*flags(tmp_path / "m", agents="rfm,sir", seeds="3"))[0] == 0


def test_where_and_how_the_cells_are_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def run_cells(*args):
        asked.append(args[2:])
        return Outcome(0, 1, {})

    monkeypatch.setattr("contraflow.cli.compare.run_cells", run_cells)
    for more in (["--jobs", "3"], ["--together", "--quiet"], ["--ray", "auto", "--trust", "all"]):
        assert cli(*flags(tmp_path / "m"), *more)[0] == 0
    rest = [(10, "", False, False), (10, "", True, True), (10, "all", False, False)]
    assert [given[1:] for given in asked] == rest, "episodes, trust, quiet, together"
    assert asked[0][0] == Local(3) and isinstance(asked[2][0], OnRay)


def test_help_shows_the_selection_before_the_settings():
    for command in ("compare", "report"):
        code, out, err = cli(command, "--help")
        assert code == 0 and err == "" and max(map(len, out.splitlines()[4:])) <= 100
    text = cli("compare", "--help")[1]
    assert text.index("--agents A,B") < text.index("--steps INT")


def test_names_and_sources_of_agents():
    agents = named_agents("rfm,paper=rfm-paper,tests.cli_helpers:Guess", "all")
    assert list(agents) == ["rfm", "paper", "Guess"] and agents["paper"] == PRESETS["rfm-paper"]
    with pytest.raises(UserError, match="cannot import"):
        named_agents("x=tests.cli_helpers:NoAgent", "all")


def test_a_note_without_the_actor_free_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("contraflow.cli.compare.run_cells", lambda *args: Outcome(0, 1, {}))
    assert "note: add `sir`" in cli(*flags(tmp_path / "a", agents="sac"))[1]
    assert "note:" not in cli(*flags(tmp_path / "b"))[1]
