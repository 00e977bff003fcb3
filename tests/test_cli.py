"""The command line, command by command. What goes wrong is in test_bad_input.py."""

import dataclasses
import re
import typing
from dataclasses import replace
from pathlib import Path

import pytest
from tests.cli_helpers import TINY, Guess, cli, with_source

import contraflow
from contraflow import RFM, Dataset, OfflineToOnline, Replay, Run
from contraflow.agents import presets
from contraflow.cli import COMMANDS
from contraflow.cli.flags import flag_names
from contraflow.cli.moved import MOVED
from contraflow.cli.settings import as_run, kebab, parse_train
from contraflow.cli.train import default_folder
from contraflow.core.settings import members
from contraflow.flow.path import Cosine
from contraflow.flow.posterior.gibbs import Gibbs
from contraflow.flow.posterior.importance import Fixed, MinVariance, Reverse
from contraflow.flow.posterior.markov import Markov
from contraflow.flow.posterior.proposal import Mixture, Noise, UniformAction
from contraflow.flow.solver import Heun
from contraflow.policy.best_of import Argmax, First
from contraflow.presets import PRESETS
from contraflow.rl.critics import Critics
from contraflow.rl.temperature import Anneal
from contraflow.training.run import write_config

# flags and choices


def parsed(*args: str, preset: str = "rfm") -> Run:
    return as_run(parse_train(preset, list(args)))


@pytest.mark.parametrize("name", PRESETS)
def test_no_flags_is_the_preset(name: str):
    assert parsed(preset=name) == PRESETS[name]


BASE = PRESETS["rfm"]
AGENT = BASE.agent
assert isinstance(AGENT, RFM)
ESTIMATOR = AGENT.target.estimator
assert isinstance(ESTIMATOR, Gibbs)


def changed(agent: RFM, place: str, /, **changes) -> RFM:
    """The agent with other fields of the part at a dotted path."""
    name, _, rest = place.partition(".")
    part = getattr(agent, name)
    new = changed(part, rest, **changes) if rest else replace(part, **changes)
    return replace(agent, **{name: new})


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        ("--steps 7000 --seed 3 --num-envs 4", with_source(replace(BASE, steps=7000, seed=3), num_envs=4)),
        ("--steps 1e5 --eval-every 2.5e3", replace(BASE, steps=100_000, eval_every=2500)),
        ("--trackers wandb tensorboard", replace(BASE, trackers=("wandb", "tensorboard"))),
        ("--trackers", replace(BASE, trackers=())),
        ("--collect None", BASE),
        ("--agent.critic.gamma .98", changed(AGENT, "critic", gamma=0.98)),
        ("--agent.flow.network.width 8", changed(AGENT, "flow.network", width=8)),
        ("--agent.condition-on-temperature", replace(AGENT, condition_on_temperature=True)),
        ("--agent.optim.max-grad-norm None", changed(AGENT, "optim", max_grad_norm=None)),
        ("--agent.target.estimator.samples 64", changed(AGENT, "target", estimator=replace(ESTIMATOR, samples=64))),
        ("--agent.choose.greedy.particles 4", changed(AGENT, "choose", greedy=Argmax(4))),
        ("agent.flow.solver:heun --agent.flow.solver.steps 5", changed(AGENT, "flow", solver=Heun(5))),
        ("--agent.flow.solver.steps 5 agent.flow.solver:heun", changed(AGENT, "flow", solver=Heun(5))),
        (
            "agent.flow.path:cosine agent.choose.greedy:first",
            changed(changed(AGENT, "flow", path=Cosine()), "choose", greedy=First()),
        ),
        (
            "agent.target.estimator:reverse agent.target.estimator.control:min-variance --agent.critic.gamma 0.5 "
            "--agent.target.estimator.control.clip 1",
            changed(changed(AGENT, "critic", gamma=0.5), "target", estimator=Reverse(control=MinVariance(clip=1.0))),
        ),
        (
            "--agent.target.estimator.samples 9 agent.target.estimator.proposal:uniform-action "
            "agent.target.estimator:reverse",
            changed(AGENT, "target", estimator=Reverse(samples=9, proposal=UniformAction())),
        ),
        (
            "agent.target.estimator:markov agent.target.estimator.proposal.shares:tuple-float-ellipsis .2 .8",
            changed(AGENT, "target", estimator=Markov(proposal=Mixture(shares=(0.2, 0.8)))),
        ),
        ("agent.temperature:anneal --agent.temperature.start 1", replace(AGENT, temperature=Anneal(start=1.0))),
    ],
)
def test_flags_reach_every_setting(args: str, wanted: Run | RFM):
    assert parsed(*args.split()) == (wanted if isinstance(wanted, Run) else replace(BASE, agent=wanted))


def test_choices_start_from_the_preset():
    paper = PRESETS["rfm-paper"].agent
    run = parsed(
        "agent.target.estimator.control:fixed", "--agent.target.estimator.control.eta", "1", preset="rfm-paper"
    )
    assert run.agent == changed(paper, "target", estimator=Reverse(100, Noise(), Fixed(1.0)))


def test_the_source_is_a_choice_too():
    """Of the sources that an agent can learn from; what both have is kept."""
    run = parsed("source:offline-to-online", "--data", "a.npz", "--mix", "None", "--num-envs", "3", preset="rfm-paper")
    old = PRESETS["rfm-paper"].source
    assert run.source == OfflineToOnline("a.npz", old.env, mix=None, num_envs=3, buffer_size=old.buffer_size)
    offline = parsed("source:offline-to-online", "--data", "a.npz", preset="qam")
    assert offline.source == OfflineToOnline("a.npz", horizon=5)
    assert parsed("source:dataset", "--data", "a.npz").source == Dataset("a.npz", BASE.source.env)
    told = parsed("--data", "a.npz", "--low", "-2", "-1", "--high", "2", "--clip", preset="bc").source
    assert told == Dataset("a.npz", low=(-2.0, -1.0), high=(2.0,), clip=True)
    assert isinstance(parsed("source:replay").source, Replay)


@pytest.mark.parametrize("preset", [name for name, run in PRESETS.items() if isinstance(run.source, Dataset)])
def test_what_learns_from_recorded_steps_can_go_on_online(preset: str):
    """Half of the steps are taken on the data unless the user says how many."""
    run = parsed("source:offline-to-online", "--data", "a.npz", "--env", "probe:action", preset=preset)
    old = PRESETS[preset].source
    assert run.source == OfflineToOnline("a.npz", "probe:action", horizon=old.horizon)
    assert run.source.resolved(run.steps).offline_steps == run.steps // 2
    told = parsed("source:offline-to-online", "--data", "a.npz", "--steps", "30", "--offline-steps", "7", preset=preset)
    assert (told.steps, told.source.offline_steps) == (30, 7)


@pytest.mark.parametrize("field", ["flow.path", "choose.explore"])
def test_every_kind_has_a_word(field: str):
    owner, name = field.split(".")
    for kind in members(typing.get_type_hints(type(getattr(AGENT, owner)))[name]):
        run = parsed(f"agent.{field}:{kebab(kind.__name__)}")
        assert isinstance(getattr(getattr(run.agent, owner), name), kind)


def test_a_preset_may_be_a_run_folder_or_a_file(tmp_path: Path):
    run = replace(TINY, agent=changed(RFM(critic=Critics(gamma=0.5)), "flow", solver=Heun(3)))
    write_config(run, tmp_path)
    assert parsed(preset=str(tmp_path)) == parsed(preset=str(tmp_path / "config.json")) == run
    new = parsed("--agent.flow.solver.steps", "2", "--seed", "9", preset=str(tmp_path))
    assert new == replace(run, seed=9, agent=changed(run.agent, "flow", solver=Heun(2)))


def test_a_preset_may_be_an_agent_of_the_users():
    assert parsed("--trust", "all", "--agent.rate", "2", preset="tests.cli_helpers:Guess") == Run(Guess(rate=2.0))


def test_default_folder(tmp_path: Path):
    def folder(preset: str, *flags: str) -> str:
        return str(default_folder(preset, parse_train(preset, list(flags))))

    assert folder("rfm") == "runs/rfm-CartpoleSwingup-v1-seed0"
    assert (
        folder("sac", "--env", "gym:dm_control/cheetah-run-v0", "--seed", "4")
        == "runs/sac-dm_control-cheetah-run-v0-seed4"
    )
    assert folder("tests.cli_helpers:Guess", "--trust", "all") == "runs/Guess-CartpoleSwingup-v1-seed0"
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
        ("train bc --help", ["--data", "--horizon", "--steps", "--out", "--help-all"]),
    ],
)
def test_help_of_each_command(args: str, words: list[str]):
    code, out, err = cli(*args.split())
    assert code == 0 and err == "" and all(word in out for word in words)


@pytest.mark.parametrize("name", ["rfm", "reinflow", "bc"])
def test_help_of_everything_lists_every_setting(name: str):
    code, out, _ = cli("train", name, "--help-all")
    run = PRESETS[name]
    flags = [f"--{f.name.replace('_', '-')}" for part in (run, run.source) for f in dataclasses.fields(part)]
    flags = [flag for flag in flags if flag not in ("--agent", "--source")]
    assert code == 0 and not [flag for flag in flags if not re.search(rf"{flag}\b", out)]
    assert "--out" in out and "--trust" in out and "--source" not in out
    if name == "rfm":
        assert all(
            word in out for word in ("agent.flow.solver:heun", "agent.flow.path:cosine", "agent.temperature:anneal")
        )


@pytest.mark.parametrize("name", PRESETS)
def test_the_short_help_is_short(name: str):
    """One line for each flag that people set, with its default; the agent's settings by name."""
    code, out, err = cli("train", name, "--help")
    run, lines = PRESETS[name], out.splitlines()
    assert code == 0 and err == "" and len(lines) <= 55 and max(map(len, lines)) <= 160
    flags = {line.split()[0]: line for line in lines if line.startswith("  --") and not line.startswith("  --agent")}
    assert 12 <= len(flags) <= 26 and all(len(line.split()) > 2 for line in flags.values())
    assert f"[{run.steps:_}]" in flags["--steps"]
    assert all(f"--agent.{f.name.replace('_', '-')}" in out for f in dataclasses.fields(run.agent))


@pytest.mark.parametrize(
    ("preset", "old", "new"),
    [
        ("rfm", "--agent.actor-lr 1", "--agent.optim.lr"),
        ("rfm", "--agent.width=8", "--agent.flow.network.width"),
        ("rfm", "--agent.estimator.samples 9", "--agent.target.estimator.samples"),
        ("rfm", "--agent.solver.steps 9", "--agent.flow.solver.steps"),
        ("rfm", "--agent.follow 1", "--agent.tau"),
        ("rfm", "agent.solver:heun", "agent.flow.solver:heun"),
        ("pmd", "--agent.exploit.particles 9", "--agent.choose.greedy.particles"),
        ("pmd", "--agent.uniform_share 1", "--agent.candidates.uniform-share"),
        ("ppo", "--agent.gamma 1", "--agent.ppo.gamma"),
        ("reinflow", "--agent.width 9", "--agent.ppo.critic.width"),
        ("reinflow", "--agent.policy.width 9", "--agent.flow.network.width"),
        ("sac", "--agent.critic.lr 1", "--agent.critic.optim.lr"),
        ("sac", "--agent.width 9", "--agent.actor.width"),
    ],
)
def test_an_old_flag_names_the_new_one(preset: str, old: str, new: str):
    code, out, err = cli("train", preset, *old.split())
    assert (code, out) == (2, "") and err == f"contraflow: error: {re.split('[ =]', old)[0]} is now {new}\n"


def test_every_moved_flag_exists_for_some_agent():
    names = {flag for run in PRESETS.values() for flag in flag_names(run.agent)}
    for old, places in MOVED.items():
        assert any(f"--{place}" in names or place == "log-std" for place in places), old


def test_version():
    assert cli("--version") == (0, f"contraflow {contraflow.__version__}\n", "")


def test_lists():
    code, out, _ = cli("list", "agents")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == list(presets())
    assert all(len(line.split()) > 3 for line in out.splitlines()), "each with a word on what it is"
    code, out, _ = cli("list", "presets", "RFM-PAPER")
    assert code == 0 and out.split()[:3] == ["rfm-paper", "RFM", "envpool:CheetahRun-v1"] and len(out.splitlines()) == 1
    code, out, _ = cli("list", "envs", "probe:")
    assert code == 0 and "probe:two-step" in out.splitlines() and "probe:action" in out.splitlines()
