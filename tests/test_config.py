"""Settings survive the way through JSON, and nothing else gets in."""

import dataclasses
import json
import sys
import typing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from tests.cli_helpers import Guess

from contraflow import RFM, Replay, Run, UserError
from contraflow.agents import classes
from contraflow.core.settings import from_json, members, to_json
from contraflow.flow.posterior.importance import Fixed, Reverse
from contraflow.flow.posterior.proposal import Mixture, Noise
from contraflow.flow.solver import Midpoint
from contraflow.presets import PRESETS
from contraflow.training.run import read_config, write_config


def through_json(run: Run, trust: str = "") -> Run:
    return from_json(json.loads(json.dumps(to_json(run))), Run, trust, classes=classes())


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives(name: str):
    assert through_json(PRESETS[name]) == PRESETS[name]


def kinds(owner: Any, path: str = "") -> list[tuple[str, type]]:
    """(path of a field, a kind that it may have) below RFM."""
    hints = typing.get_type_hints(type(owner))
    found = []
    for f in dataclasses.fields(owner):
        value, place = getattr(owner, f.name), f"{path}{f.name}"
        options = [k for k in members(hints[f.name]) if dataclasses.is_dataclass(k)]
        if len(options) > 1:
            found += [(place, kind) for kind in options]
        elif dataclasses.is_dataclass(value):
            found += kinds(value, f"{place}.")
    return found


@pytest.mark.parametrize(("field", "kind"), kinds(RFM()), ids=lambda v: getattr(v, "__name__", v))
def test_every_kind_of_a_field_survives(field: str, kind: type):
    """Written alone: not every kind suits every other setting."""
    value = kind()
    owner = RFM()
    *path, name = field.split(".")
    for part in path:
        owner = getattr(owner, part)
    annotation = typing.get_type_hints(type(owner))[name]
    assert from_json(json.loads(json.dumps(to_json(value))), annotation) == value


def with_estimator(estimator: Any) -> Run:
    agent = RFM()
    return Run(replace(agent, target=replace(agent.target, estimator=estimator)))


def test_values_survive_below_the_surface():
    run = replace(with_estimator(Reverse(7, Mixture(shares=(0.2, 0.8)), Fixed(0.0))), trackers=("wandb", "trackio"))
    assert through_json(run) == run
    run = with_estimator(Reverse(7, Noise(), Fixed(0.0)))
    assert through_json(run).agent.target.estimator.samples == 7


# values have the types that their fields announce


@dataclass(frozen=True)
class Everything:
    whole: int = 1
    number: float = 1.0
    flag: bool = False
    text: str = "a"
    maybe: float | None = None
    word: Literal["a", "b"] = "a"
    pair: tuple[float, int] = (1.0, 2)
    many: tuple[float, ...] = ()
    solver: Midpoint = Midpoint()


KIND = f"{Everything.__module__}:Everything"


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("whole", 3, 3),
        ("number", 3, 3.0),
        ("maybe", 2, 2.0),
        ("maybe", None, None),
        ("word", "b", "b"),
        ("pair", [1, 2], (1.0, 2)),
        ("many", [1, 2.5], (1.0, 2.5)),
        ("many", [], ()),
        ("solver", {"kind": "Midpoint", "steps": 5}, Midpoint(5)),
    ],
)
def test_a_value_of_its_type_is_read(field: str, value: Any, wanted: Any):
    read = getattr(from_json({"kind": KIND, field: value}, Any, "all"), field)
    assert read == wanted and type(read) is type(wanted)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("whole", 2.5, "must be a whole number, got 2.5"),
        ("whole", True, "must be a whole number, got true"),
        ("whole", "3", "must be a whole number"),
        ("number", "3", "must be a number"),
        ("number", None, "must be a number, got null"),
        ("flag", 1, "must be true or false"),
        ("text", 1, "must be a string"),
        ("maybe", "1", "must be a number or null"),
        ("word", "c", "must be 'a' or 'b', got \"c\""),
        ("pair", [1], "pair must be"),
        ("pair", [1, 2.5], r"pair\[1\] must be a whole number, got 2.5"),
        ("many", [1, "2"], r"many\[1\] must be a number"),
        ("many", 1, "many must be"),
        ("solver", 3, "solver must be Midpoint, got 3"),
        ("solver", {"steps": 3}, "an object needs a kind"),
        ("solver", {"kind": 3}, "an object needs a kind"),
        ("solver", {"kind": "Midpoint", "steps": 2.5}, "solver.steps must be a whole number, got 2.5"),
        ("solver", {"kind": "os:getcwd"}, "os:getcwd is not a dataclass"),
        ("solver", {"kind": "os:path"}, "os:path is not a dataclass"),
    ],
)
def test_a_value_of_another_type_is_refused(field: str, value: Any, message: str):
    with pytest.raises(UserError, match=message):
        from_json({"kind": KIND, field: value}, Any, "all")


# code of the user's


def shares(t):
    return [1 - t, t]


def test_code_outside_the_library_takes_trust():
    run = with_estimator(Reverse(8, Mixture(shares=shares), Fixed(0.0)))
    assert through_json(run, trust="all") == run
    with pytest.raises(UserError, match="--trust"):
        through_json(run)
    guess = Run(Guess(rate=2.0))
    assert to_json(guess)["agent"]["kind"] == "tests.cli_helpers:Guess"
    assert through_json(guess, trust="all") == guess
    with pytest.raises(UserError, match="--trust"):
        through_json(guess)


class Outer:
    @dataclass(frozen=True)
    class Nested(Guess):
        pass


def local() -> type:
    @dataclass(frozen=True)
    class Local(Guess):
        pass

    return Local


@dataclass(frozen=True)
class Holder(Guess):
    number: float = 1.0
    whole: int = 1
    thing: Any = None


@pytest.mark.parametrize(
    ("agent", "message"),
    [
        (Outer.Nested(), r"run.agent: Outer.Nested cannot be written.*at the top of a module"),
        (local()(), r"local.<locals>.Local cannot be written"),
        (Holder(thing=lambda x: x), "thing: .*<lambda> cannot be written"),
        (Holder(number=np.float32(1)), "number: a float32 cannot be written"),
        (Holder(whole=2.5), "whole must be a whole number, got 2.5"),  # pyright: ignore
        (Holder(thing=Path("a")), "thing: a PosixPath cannot be written"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(agent: Any, message: str, tmp_path: Path):
    """Before anything is trained, not when it is loaded."""
    with pytest.raises(UserError, match=message):
        write_config(Run(agent), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_a_script_defines_is_named_after_its_file(monkeypatch: pytest.MonkeyPatch):
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "__file__", "/somewhere/mine.py", raising=False)
    monkeypatch.setattr(main, "__spec__", None)
    local = dataclasses.make_dataclass("Local", [("x", int, 1)], frozen=True)
    local.__module__ = "__main__"
    monkeypatch.setattr(main, "Local", local, raising=False)
    data = to_json(local())
    assert data["kind"] == "mine:Local"
    assert type(from_json(data, Any, "all")) is local, "the class of the script, not a second one"


# mistakes are named


def nested(path: str, value: Any) -> dict:
    """The JSON of a run with another value at a dotted path."""
    data = to_json(Run())
    *parts, last = path.split(".")
    at = data
    for part in parts:
        at = at[part]
    at[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("stepz", 3, "no field 'stepz'; did you mean 'steps'"),
        ("agent", {"kind": "RMF"}, "unknown kind 'RMF'; did you mean 'RFM'"),
        ("agent.critic.widht", 8, "no field 'widht'; did you mean 'width'"),
        ("agent.critic.gamma", 1.7, r"agent.critic: gamma is a discount in \[0, 1\], got 1.7"),
        ("agent.flow.solver", {"kind": "Huen"}, "agent.flow.solver: unknown kind 'Huen'; did you mean 'Heun'"),
        ("agent", {"kind": "no.such:Agent"}, "cannot import no.such:Agent"),
        ("agent", None, "agent must be Agent, got null"),
        ("steps", -5, "--steps must be at least 1, got -5"),
        ("steps", "many", "steps must be a whole number"),
        ("source.num_envs", 0, "--num-envs must be at least 1, got 0"),
        ("source", {"kind": "Rows"}, "unknown kind 'Rows'"),
    ],
)
def test_what_is_wrong_is_named(path: str, value: Any, message: str):
    with pytest.raises(UserError, match=message):
        from_json(nested(path, value), Run, trust="all", classes=classes())


def test_an_agent_gets_the_source_that_it_needs():
    with pytest.raises(ValueError, match="PPO learns from a rollout, not from Replay"):
        Run(PRESETS["ppo"].agent)
    with pytest.raises(ValueError, match="RFM learns from a replay, not from Rollouts"):
        replace(PRESETS["ppo"], agent=RFM())


def test_config_file_of_a_run(tmp_path: Path):
    run = replace(PRESETS["rfm-paper"], source=Replay("probe:obs"))
    write_config(run, tmp_path)
    assert read_config(tmp_path) == read_config(tmp_path / "config.json") == run
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
