"""Every mistake of a user ends in one message that names the remedy and in exit code 2; nothing of the run is lost."""

import builtins
import json
import os
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from tests.cli_helpers import FLAGS, GUESS, Guess, assert_refused, cli, with_source

from contraflow import Replay, Run, load
from contraflow.core.files import locked
from contraflow.training import checkpoint
from contraflow.training import run as driver
from contraflow.training.run import read_config


@pytest.mark.parametrize(
    ("args", "words"),
    [
        # unknown names
        ("tran rfm", ["no command tran", "did you mean 'train'"]),
        ("train rfn", ["no preset rfn", "did you mean 'rfm'", "contraflow list presets"]),
        ("train --seed 3 rfm", ["the preset comes first"]),
        ("train runs/none", ["runs/none does not exist"]),
        ("train rfm --agent.critic.gama 1", ["no flag --agent.critic.gama", "did you mean --agent.critic.gamma?"]),
        ("train rfm --agent.widht 9", ["did you mean --agent.critic.width or --agent.flow.network.width?"]),
        ("train rfm --agent.critic.widht 9", ["did you mean --agent.critic.width?"]),
        ("train rfm --stepz 9", ["there is no flag --stepz; did you mean --steps?"]),
        ("train rfm agent.flow.solver:huen", ["no kind huen", "did you mean 'heun'"]),
        ("train rfm agent.flow.solvr:heun", ["no setting solvr", "did you mean 'solver'"]),
        ("train rfm agent.target.estimator:markv", ["no kind markv", "did you mean 'markov'"]),
        ("train rfm source:repay", ["there is no source repay", "did you mean 'replay'"]),
        ("train ppo source:replay", ["PPO learns from a rollout, not from Replay"]),
        ("train rfm --env probe:acton", ["unknown environment probe:acton", "did you mean probe:action"]),
        ("train rfm --env gym:HalfCheeta-v5", ["unknown environment", "HalfCheetah-v5"]),
        ("train rfm --trackers wandbb", ["invalid choice", "wandb"]),
        ("list agent", ["invalid choice", "agents"]),
        ("list envs nothinglikethis", ["no envs match", "contraflow list envs"]),
        # values out of range
        ("train rfm --agent.critic.gamma 1.7", ["gamma is a discount in [0, 1], got 1.7"]),
        ("train rfm --agent.critic.gamma nan", ["gamma is a discount"]),
        ("train rfm --steps -5", ["--steps must be at least 1, got -5"]),
        ("train rfm --steps many", ["--steps", "many"]),
        ("train rfm --steps 1.5", ["--steps", "1.5 is not a whole number"]),
        ("train rfm --steps inf", ["--steps", "inf is not a whole number"]),
        ("train rfm --steps nan", ["--steps", "nan is not a whole number"]),
        ("train rfm --agent.critic.width 0", ["width must be positive, got 0"]),
        ("train rfm --agent.critic.tau 0", ["tau is a target-update rate"]),
        ("train rfm agent.temperature:constant --agent.temperature.value -1", ["temperature must be positive"]),
        ("train rfm --agent.target.estimator.samples 1", ["samples must be a whole number, at least 2, got 1"]),
        ("train rfm --agent.flow.solver.steps 0", ["steps must be a whole number, at least 1, got 0"]),
        ("train rfm --agent.choose.explore.particles 0", ["at least one particle"]),
        ("train rfm --steps 100 --collect 200", ["--collect must lie between 0 and --steps 100, got 200"]),
        ("train rfm --num-envs 8 --buffer-size 4", ["--buffer-size 4 is smaller than --num-envs 8"]),
        ("train rfm --n-step 0", ["--n-step must be at least 1, got 0"]),
        ("train tests.cli_helpers:Guess --trust all --n-step 3", ["--n-step 3 needs an agent with a discount"]),
        ("train rfm --seed -1", ["must not be negative"]),
        ("eval runs/none --episodes 0", ["must be at least 1"]),
        # code without trust, or not an agent
        ("train mine:Agent", ["mine:Agent", "--trust mine"]),
        ("train rfm --env mine:World", ["mine:World", "--trust mine"]),
        ("train no_such_module:Agent --trust all", ["cannot import no_such_module:Agent"]),
        ("train tests.cli_helpers:Nothing --trust all", ["cannot import tests.cli_helpers:Nothing"]),
        ("train tests.cli_helpers:cli --trust all", ["is not an agent", "@dataclass(frozen=True)"]),
        ("train contraflow.core.types:EnvSpec --trust all", ["is not an agent", "init, policy, update"]),
        ("train tests.cli_helpers:Guess --trust all --agent.rate -1", ["rate must be positive, got -1.0"]),
        # actions that are not continuous and bounded
        ("train rfm --trust all --env tests.cli_helpers:discrete", ["Discrete(3)", "continuous (Box) actions"]),
        ("train rfm --trust all --env tests.cli_helpers:unbounded", ["unbounded actions", "finite bounds"]),
        # more parts than rows
        ("train ppo --num-envs 2 --unroll 8", ["16 rows", "too few for --agent.ppo.minibatches 32"]),
        ("train bc", ["a dataset is missing", "--data"]),
        # folders that are no runs
        ("resume runs/none", ["runs/none does not exist", "give the folder that --out named"]),
        ("eval runs/none", ["holds no policy", "give the folder of a run"]),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line(args: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(args.split(), *words)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_an_agent_without_defaults(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Guess, "__init__", lambda self, rate: None)
    assert_refused(
        ["train", "tests.cli_helpers:Guess", "--trust", "all"], "cannot be built without arguments", "default"
    )


def test_an_existing_folder_is_left_alone(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    assert_refused([*GUESS, "--out", str(tmp_path)], "already exists", "--out", "contraflow resume")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert_refused([*GUESS, "--out", str(tmp_path / "notes.txt")], "already exists")
    assert (tmp_path / "notes.txt").read_text() == "mine"


# missing packages


@pytest.mark.parametrize(
    ("package", "args", "extra"),
    [
        ("envpool", "train rfm --env envpool:CheetahRun-v1", 'pip install "contraflow[envpool]"'),
        ("gymnasium.vector", "train rfm --env gym:HalfCheetah-v5", 'pip install "contraflow[mujoco]"'),
        ("wandb", "train rfm --env probe:action --trackers wandb", 'pip install "contraflow[wandb]"'),
        ("trackio", "train rfm --env probe:action --trackers tensorboard trackio", 'pip install "contraflow[trackio]"'),
    ],
)
def test_a_missing_extra_is_named(package: str, args: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def without(name, *rest, **options):
        if name == package:
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(driver, "check_trackers", driver.check_trackers)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert_refused([*args.split(), "--out", str(tmp_path / "run")], extra)
    assert not (tmp_path / "run").exists()


# what an environment or a loss does


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("env", "culprit"), [("nan_observation", "observation"), ("infinite_reward", "reward")])
def test_a_non_finite_environment_stops_and_saves(env: str, culprit: str, tmp_path: Path):
    """The twelfth step is the last sound one: 24 steps with two copies, though the last checkpoint was due at 20."""
    out = str(tmp_path / "run")
    flags = [*GUESS, "--env", f"tests.cli_helpers:{env}", "--out", out]
    assert_refused(flags, f"non-finite {culprit}", "what was learned is saved", f"contraflow resume {out}")
    assert checkpoint.latest(tmp_path / "run") == 24
    assert load(tmp_path / "run", trust="all")(np.zeros(1)).shape == (1,)
    assert (
        rows(tmp_path / "run")[-1]["step"] == 24
        and np.isfinite([r.get("guess_loss", 0) for r in rows(tmp_path / "run")]).all()
    )
    run = with_source(read_config(tmp_path / "run", "all"), env="tests.cli_helpers:pointer")
    driver.write_config(run, tmp_path / "run")
    best = tmp_path / "run/best/config.json"  # policies name their environment: it is evaluated there in the end
    best.write_text(best.read_text().replace(env, "pointer"))
    code, out, err = cli("resume", tmp_path / "run", "--trust", "all", "--quiet")
    assert code == 0 and "trained to step 40" in out, err


def test_a_failure_in_an_evaluation_saves_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Evaluation environments are others than those of training: here only they go wrong."""
    real = Replay.open

    def half(source: Replay, run: Run, trust: str):
        good, bad = real(replace(source, env="tests.cli_helpers:pointer"), run, trust), real(source, run, trust)
        return replace(good, evaluation=bad.evaluation)

    monkeypatch.setattr(Replay, "open", half)
    flags = [*GUESS, "--env", "tests.cli_helpers:nan_soon", "--out", str(tmp_path / "run")]
    assert_refused(flags, "non-finite observation", "what was learned is saved")
    assert checkpoint.latest(tmp_path / "run") == 20


def test_a_non_finite_loss_keeps_the_last_good_checkpoint(tmp_path: Path):
    out = str(tmp_path / "run")
    args = [*GUESS, "--agent.explode-at", "12", "--out", out]
    assert_refused(args, "guess_loss became inf between steps 30 and 40", "last good checkpoint", out, "learning rate")
    assert checkpoint.latest(tmp_path / "run") == 20
    assert load(tmp_path / "run", trust="all")(np.zeros(1)).shape == (1,)
    assert [r["step"] for r in rows(tmp_path / "run") if "episodes" in r] == [10, 20, 30]


def test_the_culprit_of_a_real_agent_is_named(tmp_path: Path):
    args = ["train", "sir", *FLAGS, "--agent.critic.optim.lr", "1e38", "--out", str(tmp_path / "run")]
    assert_refused(args, "error: critic_loss", "last good checkpoint")
    assert checkpoint.latest(tmp_path / "run") is not None


def test_a_diverged_policy_is_blamed_before_the_environment_that_it_breaks(tmp_path: Path):
    """Its actions are NaN, and so is what the simulator makes of them; that state must not become a checkpoint."""
    flags = "--env gym:Pendulum-v1 --num-envs 2 --unroll 8 --steps 96 --log-every 96 --eval-every 96 --quiet"
    small = "--agent.actor.width 8 --agent.ppo.minibatches 2 --agent.ppo.actor-optim.max-grad-norm None"
    small += " --agent.ppo.actor-optim.lr 1e38"
    args = ["train", "ppo", *flags.split(), *small.split(), "--out", str(tmp_path / "run")]
    assert_refused(args, "actor_", "learning rate")
    assert checkpoint.latest(tmp_path / "run") in (None, 0)


@pytest.mark.parametrize("moment", ["reset", "step"])
def test_an_environment_that_raises(moment: str, tmp_path: Path):
    """One line with the place; before the first step nothing is left behind, later what was learned is saved."""
    out = tmp_path / "run"
    args = [*GUESS, "--env", f"tests.cli_helpers:broken_{moment}", "--out", str(out)]
    err = assert_refused(args, "environment Broken failed in", "RuntimeError: the arm fell off", "cli_helpers.py:")
    if moment == "reset":
        assert not out.exists() and "resume" not in err
    else:
        assert checkpoint.latest(out) == 24 and f"contraflow resume {out}" in err


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert_refused([*GUESS, "--out", str(tmp_path / "file/run")], "cannot be created", "choose another --out")


def test_other_places_that_cannot_be_made(tmp_path: Path):
    """Of a page, a film and a comparison, before the work; the message has the flag that named the place."""
    cli(*GUESS, "--out", tmp_path / "run")
    (tmp_path / "file").write_text("")
    place = str(tmp_path / "file/new")
    assert_refused(["report", str(tmp_path), "--out", f"{place}/page.html"], "cannot be created", "another --out")
    film = ["eval", str(tmp_path / "run"), "--trust", "all", "--video", f"{place}/film.mp4"]
    assert_refused(film, "cannot be created", "choose another --video")
    assert_refused(
        ["compare", "--agents", "sir", "--envs", "probe:action", "--steps", "9", "--out", place], "cannot be"
    )


def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def epoch(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4e12 bytes.")

    monkeypatch.setattr(driver, "epoch", epoch)
    assert_refused([*GUESS, "--out", str(tmp_path / "deep/run")], "out of memory", "--batch-size")
    assert list(tmp_path.iterdir()) == [], "nothing was trained: nothing is left behind"


def test_another_error_of_the_compiler_is_none_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def epoch(*args):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(driver, "epoch", epoch)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        cli(*GUESS, "--out", str(tmp_path / "run"))
    assert (tmp_path / "run").exists()


def test_two_processes_in_one_folder(tmp_path: Path):
    folder = tmp_path / "run"
    cli(*GUESS, "--out", folder)
    with locked(folder):
        assert_refused(["resume", str(folder), "--trust", "all", "--steps", "60"], f"(pid {os.getpid()})", "is using")
