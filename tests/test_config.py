"""Settings survive the way through JSON, and nothing else gets in."""

import dataclasses
import json
import sys
import typing

import pytest
from tests.cli_helpers import Guess

from contraflow import RFM, Run, UserError
from contraflow.agents import AnyAgent
from contraflow.core.settings import from_json, members, to_json
from contraflow.flow.posterior.control import Fixed
from contraflow.flow.posterior.importance import Reverse
from contraflow.flow.posterior.proposal import Mixture, TruncatedNoise
from contraflow.flow.solver import Euler
from contraflow.presets import PRESETS
from contraflow.rl.temperature import Constant
from contraflow.train.run import AnyRun, read_config, write_config


def through_json(run: AnyRun, trust: bool = False) -> AnyRun:
    return from_json(json.loads(json.dumps(to_json(run))), AnyRun, trust)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives(name: str):
    assert through_json(PRESETS[name]) == PRESETS[name]


def kinds() -> list[tuple[str, type]]:
    hints = typing.get_type_hints(RFM)
    return [
        (f.name, k)
        for f in dataclasses.fields(RFM)
        for k in typing.get_args(hints[f.name])
        if dataclasses.is_dataclass(k)
    ]


@pytest.mark.parametrize(("field", "kind"), kinds(), ids=lambda v: getattr(v, "__name__", v))
def test_every_kind_of_a_field_survives(field: str, kind: type):
    # The only solver that takes whole steps; a temperature that asks for no particles.
    base = RFM(solver=Euler(1)) if field == "objective" else RFM(temperature=Constant(0.02))
    run = Run(agent=dataclasses.replace(base, **{field: kind()}))
    assert through_json(run) == run


def test_values_survive_below_the_surface():
    estimator = Reverse(7, Mixture(shares=(0.2, 0.8)), Fixed(0.0))
    run = Run(agent=RFM(estimator=estimator, max_grad_norm=None), trackers=("wandb", "trackio"))
    assert through_json(run) == run
    assert (
        through_json(Run(agent=RFM(estimator=Reverse(7, TruncatedNoise(0.5), Fixed(0.0))))).agent.estimator.samples == 7
    )


def shares(t):
    return [1 - t, t]


def test_code_outside_the_library_takes_trust():
    run = Run(agent=RFM(estimator=Reverse(8, Mixture(shares=shares), Fixed(0.0))))
    assert through_json(run, trust=True) == run
    with pytest.raises(UserError, match="--trust"):
        through_json(run)
    guess = Run(agent=Guess(rate=2.0))
    assert to_json(guess)["agent"]["kind"] == "tests.cli_helpers:Guess"
    assert through_json(guess, trust=True) == guess
    with pytest.raises(UserError, match="--trust"):
        through_json(guess)


def test_what_a_script_defines_is_named_after_its_file(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "/somewhere/mine.py", raising=False)
    local = dataclasses.make_dataclass("Local", [("x", int, 1)], frozen=True, namespace={"__module__": "__main__"})
    assert to_json(local())["kind"] == "mine:Local"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 3}, "no field 'stepz'; did you mean 'steps'"),
        ({"agent": {"kind": "RMF"}}, "unknown kind 'RMF'; did you mean 'RFM'"),
        ({"agent": {"kind": "RFM", "widht": 8}}, "no field 'widht'; did you mean 'width'"),
        (
            {"agent": {"kind": "RFM", "critic": {"kind": "Critics", "gamma": 1.7}}},
            r"agent.critic: gamma is a discount in \[0, 1\], got 1.7",
        ),
        (
            {"agent": {"kind": "RFM", "solver": {"kind": "Huen"}}},
            "agent.solver: unknown kind 'Huen'; did you mean 'Heun'",
        ),
        ({"agent": {"kind": "no.such:Agent"}}, "cannot import no.such:Agent"),
        ({"steps": -5}, "steps must be at least 1, got -5"),
        ({"steps": "many"}, "config"),
    ],
)
def test_what_is_wrong_is_named(change: dict, message: str):
    with pytest.raises(UserError, match=message):
        from_json(to_json(Run()) | change, Run, trust=True)


def test_config_file_of_a_run(tmp_path):
    run = PRESETS["rfm-paper"]
    write_config(run, tmp_path)
    assert read_config(tmp_path) == read_config(tmp_path / "config.json") == run
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_annotations_cover_the_agents():
    for kind in typing.get_args(AnyRun):
        assert set(members(typing.get_type_hints(kind)["agent"])) & set(typing.get_args(AnyAgent))
    assert {type(run.agent) for run in PRESETS.values()} == set(typing.get_args(AnyAgent))
