"""The command line, command by command. What goes wrong is in test_bad_input.py."""

import dataclasses
import re
import typing
from dataclasses import replace
from pathlib import Path

import pytest
from tests.cli_helpers import TINY, Guess, cli

import contraflow
from contraflow import RFM, Run
from contraflow.agents import AGENTS
from contraflow.cli import COMMANDS
from contraflow.cli.settings import as_run, kebab, parse_train
from contraflow.cli.train import default_folder
from contraflow.core.settings import members
from contraflow.flow.path import Cosine
from contraflow.flow.posterior.control import Fixed, MinVariance
from contraflow.flow.posterior.gibbs import Gibbs
from contraflow.flow.posterior.importance import Reverse
from contraflow.flow.posterior.markov import Markov
from contraflow.flow.posterior.proposal import Mixture, Noise, UniformAction
from contraflow.flow.solver import Heun
from contraflow.policy.select import Argmax, First
from contraflow.presets import PRESETS
from contraflow.rl.critics import Critics
from contraflow.rl.temperature import Anneal
from contraflow.train.run import write_config

# flags and choices


def parsed(*args: str, preset: str = "rfm") -> Run:
    return as_run(parse_train(preset, list(args)))


@pytest.mark.parametrize("name", PRESETS)
def test_no_flags_is_the_preset(name: str):
    assert parsed(preset=name) == PRESETS[name]


BASE = PRESETS["rfm"]
AGENT = BASE.agent
assert isinstance(AGENT, RFM)
ESTIMATOR = AGENT.estimator
assert isinstance(ESTIMATOR, Gibbs)


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        ("--steps 7000 --seed 3 --num-envs 4", replace(BASE, steps=7000, seed=3, num_envs=4)),
        ("--trackers wandb tensorboard", replace(BASE, trackers=("wandb", "tensorboard"))),
        ("--trackers", replace(BASE, trackers=())),
        ("--agent.critic.gamma .98 --agent.width 8", replace(AGENT, critic=Critics(gamma=0.98), width=8)),
        ("--agent.condition-on-temperature", replace(AGENT, condition_on_temperature=True)),
        ("--agent.max-grad-norm None", replace(AGENT, max_grad_norm=None)),
        ("--agent.endpoint buffer", replace(AGENT, endpoint="buffer")),
        ("--agent.estimator.samples 64", replace(AGENT, estimator=replace(ESTIMATOR, samples=64))),
        ("--agent.greedy.particles 4", replace(AGENT, greedy=Argmax(4))),
        ("agent.solver:heun --agent.solver.steps 5", replace(AGENT, solver=Heun(5))),
        ("--agent.solver.steps 5 agent.solver:heun", replace(AGENT, solver=Heun(5))),
        ("agent.path:cosine agent.greedy:first", replace(AGENT, path=Cosine(), greedy=First())),
        (
            "agent.estimator:reverse agent.estimator.control:min-variance --agent.critic.gamma 0.5 "
            "--agent.estimator.control.clip 1",
            replace(AGENT, critic=Critics(gamma=0.5), estimator=Reverse(control=MinVariance(clip=1.0))),
        ),
        (
            "--agent.estimator.samples 9 agent.estimator.proposal:uniform-action agent.estimator:reverse",
            replace(AGENT, estimator=Reverse(samples=9, proposal=UniformAction())),
        ),
        (
            "agent.estimator:markov agent.estimator.proposal.shares:tuple-float-ellipsis .2 .8",
            replace(AGENT, estimator=Markov(proposal=Mixture(shares=(0.2, 0.8)))),
        ),
        (
            "agent.temperature:anneal --agent.temperature.start 1 agent.behaviour:anneal",
            replace(AGENT, temperature=Anneal(start=1.0), behaviour=Anneal()),
        ),
    ],
)
def test_flags_reach_every_setting(args: str, wanted: Run | RFM):
    assert parsed(*args.split()) == (wanted if isinstance(wanted, Run) else replace(BASE, agent=wanted))


def test_choices_start_from_the_preset():
    paper = PRESETS["rfm-paper"].agent
    run = parsed("agent.estimator.control:fixed", "--agent.estimator.control.eta", "1", preset="rfm-paper")
    assert run.agent == replace(paper, estimator=Reverse(100, Noise(), Fixed(1.0)))
    assert parsed("--agent.target-entropy", "-2.5", preset="sac").agent == replace(
        PRESETS["sac"].agent, target_entropy=-2.5
    )


@pytest.mark.parametrize(
    "field", [f.name for f in dataclasses.fields(RFM) if f.name in ("path", "solver", "explore", "temperature")]
)
def test_every_kind_has_a_word(field: str):
    for kind in members(typing.get_type_hints(RFM)[field]):
        run = parsed(f"agent.{field}:{kebab(kind.__name__)}")
        assert isinstance(getattr(run.agent, field), kind)
    assert parsed("agent.behaviour:none") == BASE


def test_a_preset_may_be_a_run_folder_or_a_file(tmp_path: Path):
    run = replace(TINY, agent=RFM(critic=Critics(gamma=0.5), solver=Heun(3)))
    write_config(run, tmp_path)
    assert parsed(preset=str(tmp_path)) == parsed(preset=str(tmp_path / "config.json")) == run
    changed = parsed("--agent.solver.steps", "2", "--seed", "9", preset=str(tmp_path))
    assert changed == replace(run, seed=9, agent=replace(run.agent, solver=Heun(2)))


def test_a_preset_may_be_an_agent_of_the_users():
    assert parsed("--trust", "--agent.rate", "2", preset="tests.cli_helpers:Guess") == Run(agent=Guess(rate=2.0))


def test_default_folder(tmp_path: Path):
    def folder(preset: str, *flags: str) -> str:
        return str(default_folder(preset, parse_train(preset, list(flags))))

    assert folder("rfm") == "runs/rfm-CartpoleSwingup-v1-seed0"
    assert (
        folder("sac", "--env", "gym:dm_control/cheetah-run-v0", "--seed", "4")
        == "runs/sac-dm_control-cheetah-run-v0-seed4"
    )
    assert folder("tests.cli_helpers:Guess", "--trust") == "runs/Guess-CartpoleSwingup-v1-seed0"
    write_config(TINY, tmp_path)
    assert folder(str(tmp_path)) == folder(str(tmp_path / "config.json")) == f"runs/{tmp_path.name}-obs-action-seed0"


# help and lists


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help(args: list[str]):
    code, out, err = cli(*args)
    assert code == 0 and err == "" and all(f"\n  {name} " in out for name in COMMANDS)
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("train", list(PRESETS)),
        ("train --help", list(PRESETS)),
        ("resume --help", ["FOLDER", "--steps", "--trust", "--require"]),
        ("eval --help", ["FOLDER", "--episodes", "--video", "--seed", "--env", "--fps"]),
        ("list --help", ["agents", "envs", "presets", "PATTERN"]),
    ],
)
def test_help_of_each_command(args: str, words: list[str]):
    code, out, err = cli(*args.split())
    assert code == 0 and err == "" and all(word in out for word in words)


@pytest.mark.parametrize("name", PRESETS)
def test_help_of_a_preset_lists_every_setting(name: str):
    code, out, _ = cli("train", name, "--help")
    agent = PRESETS[name].agent
    scalars = [f.name for f in dataclasses.fields(agent) if not dataclasses.is_dataclass(getattr(agent, f.name))]
    flags = [f"--agent.{n.replace('_', '-')}" for n in scalars if n not in ("behaviour", "density")]
    flags += [f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(PRESETS[name]) if f.name != "agent"]
    assert code == 0 and not [flag for flag in flags if not re.search(rf"{flag}\b", out)]
    assert "--out" in out and "--trust" in out
    if isinstance(agent, RFM):
        assert all(word in out for word in ("agent.solver:heun", "agent.path:cosine", "agent.temperature:anneal"))


def test_version():
    assert cli("--version") == (0, f"contraflow {contraflow.__version__}\n", "")


def test_lists():
    code, out, _ = cli("list", "agents")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == list(AGENTS)
    assert all(len(line.split()) > 3 for line in out.splitlines()), "each with a word on what it is"
    code, out, _ = cli("list", "presets", "PAPER")
    assert code == 0 and out.split()[:3] == ["rfm-paper", "RFM", "envpool:CheetahRun-v1"] and len(out.splitlines()) == 1
    code, out, _ = cli("list", "envs", "probe:")
    assert code == 0 and "probe:two-step" in out.splitlines() and "probe:action" in out.splitlines()
