"""`train`: what a run leaves behind, what it says meanwhile, how it ends."""

import csv
import io
import json
import os
import shutil
import signal
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from rich.console import Console
from tests.cli_helpers import TINY, Constant, Guess, with_source
from tests.train.loop_helpers import OnHost, begin, learner_of, run_epoch

from contraflow import EnvSpec, Run, Step, UserError, resume, train
from contraflow.data.samplers import Uniform
from contraflow.envs.probe import Action, TwoStep
from contraflow.policy.artifact import load_policy
from contraflow.training import checkpoint, console
from contraflow.training import run as driver
from contraflow.training import run_writer as record
from contraflow.training.evaluate import Episodes, evaluate, margin
from contraflow.training.log import Log, read_evaluations
from contraflow.training.plot import plot_curve
from contraflow.training.run_writer import best_evaluation
from contraflow.training.sources.replay import Interact

GUESS = replace(TINY, agent=Guess())


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_a_run_leaves_behind(tmp_path: Path):
    result = train(GUESS, tmp_path / "run", quiet=True, trust="all")
    folder = result.folder
    assert result.steps == 40 and result.returns.shape == (2,) and not result.interrupted
    assert sorted(path.name for path in folder.iterdir()) == [
        "best", "checkpoints", "config.json", "curve.png", "eval.csv", "metrics.jsonl", "policy",
    ]  # fmt: skip
    assert (folder / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["20", "40"]
    rows = lines(folder / "metrics.jsonl")
    assert [row["step"] for row in rows if "episodes" in row] == [10, 20, 30, 40]
    assert [row["step"] for row in rows if "diagnostics/action_std" in row] == [20, 40]
    assert ["guess_loss" in row for row in rows if "episodes" in row] == [False, True, True, True]
    assert [row["episodes"] for row in rows if "episodes" in row] == [10] * 4, "every step is an episode here"
    with (folder / "eval.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["step"] for row in table] == ["20", "40"]
    assert float(table[-1]["return_mean"]) == pytest.approx(result.returns.mean(), rel=1e-5)
    assert float(table[-1]["return_max"]) == pytest.approx(result.returns.max(), rel=1e-5)
    assert b"\r" not in (folder / "eval.csv").read_bytes()


def test_the_first_checkpoint_comes_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(*args):
        raise RuntimeError("no step was taken")

    monkeypatch.setattr(driver, "epoch", stop)
    with pytest.raises(RuntimeError):
        train(GUESS, tmp_path, quiet=True)
    assert checkpoint.latest(tmp_path) == 0 and (tmp_path / "policy/model.safetensors").exists()


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch):
    """`scripted(1.0, 5.0, ...)`: the means that evaluations will have; the policies that they saw."""
    seen = []

    def script(*means: float) -> list:
        returns = iter(means)

        def evaluated(policies, env, keys, episodes):
            seen.append(np.asarray(policies[0].bias))
            return Episodes(np.full((1, episodes), next(returns)))

        monkeypatch.setattr(driver, "evaluate_seeds", evaluated)
        return seen

    return script


def bias_of(folder: Path) -> np.ndarray:
    return np.asarray(load_policy(folder, trust="all")[0].bias)


def test_the_best_policy_is_that_of_the_best_evaluation(tmp_path: Path, scripted):
    """Also across an interruption: what came before counts."""
    seen = scripted(1.0, 5.0, 2.0, 4.0)
    train(replace(GUESS, steps=60), tmp_path / "run", quiet=True, trust="all")
    resume(tmp_path / "run", steps=80, quiet=True, trust="all")
    assert len(seen) == 4
    np.testing.assert_array_equal(bias_of(tmp_path / "run/best"), seen[1])
    np.testing.assert_array_equal(bias_of(tmp_path / "run/policy"), seen[3])
    assert best_evaluation(tmp_path / "run") == {"step": 40, "return_mean": 5.0}


def test_the_best_policy_is_forgotten_with_its_evaluation(tmp_path: Path, scripted):
    """The last checkpoint is gone, and with it the row of the best evaluation: the policy of another is kept."""
    seen = scripted(1.0, 2.0, 9.0, 1.5)
    train(replace(GUESS, steps=60), tmp_path / "run", quiet=True, trust="all")
    assert best_evaluation(tmp_path / "run") == {"step": 60, "return_mean": 9.0}
    shutil.rmtree(tmp_path / "run/checkpoints/60")
    resume(tmp_path / "run", quiet=True, trust="all")
    assert [row["return_mean"] for row in read_evaluations(tmp_path / "run")] == [1.0, 2.0, 1.5]
    assert best_evaluation(tmp_path / "run") == {"step": 40, "return_mean": 2.0}
    np.testing.assert_array_equal(bias_of(tmp_path / "run/best"), seen[1])


def test_a_best_policy_that_was_not_written_is(tmp_path: Path, scripted):
    """A process that died between a checkpoint and the policy of the same evaluation."""
    seen = scripted(1.0, 2.0, 0.5)
    train(GUESS, tmp_path / "run", quiet=True, trust="all")
    shutil.rmtree(tmp_path / "run/best")
    resume(tmp_path / "run", steps=60, quiet=True, trust="all")
    np.testing.assert_array_equal(bias_of(tmp_path / "run/best"), seen[1])


def test_tensorboard_is_the_default_tracker(tmp_path: Path):
    assert Run().trackers == ("tensorboard",)
    train(replace(GUESS, trackers=("tensorboard",)), tmp_path, quiet=True)
    (file,) = (tmp_path / "tensorboard").glob("events.*")
    recorded = file.read_bytes()
    assert all(name in recorded for name in (b"train/guess_loss", b"eval/return_mean", b"diagnostics/action_std"))


def test_steps_are_rounded_up_to_whole_rounds(tmp_path: Path):
    result = train(with_source(replace(GUESS, steps=41), num_envs=4, collect=9), tmp_path, quiet=True)
    assert result.steps == 44
    assert [row["step"] for row in read_evaluations(tmp_path)] == [20, 40, 44]
    assert next(row["step"] for row in lines(tmp_path / "metrics.jsonl") if "guess_loss" not in row) == 12


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real, before = driver.epoch, [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    def interrupted(*args):
        out = real(*args)
        os.kill(os.getpid(), number)
        return out

    monkeypatch.setattr(driver, "epoch", interrupted)
    result = train(GUESS, tmp_path, quiet=True)
    assert result.interrupted and result.steps == 10 == checkpoint.latest(tmp_path)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_right_after_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The step is on disk already: nothing is written twice, nothing fails."""
    real = record.save_policy

    def interrupted(folder, *args):
        real(folder, *args)
        if checkpoint.latest(tmp_path) == 20:
            os.kill(os.getpid(), signal.SIGINT)
            monkeypatch.setattr(record, "save_policy", real)

    monkeypatch.setattr(record, "save_policy", interrupted)
    result = train(GUESS, tmp_path, quiet=True)
    assert result.interrupted and result.steps == 20


def test_a_second_interrupt_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*args):
        # Not os.kill: another thread may take the first late, and the two would count as one.
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("went on")

    monkeypatch.setattr(driver, "epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(GUESS, tmp_path, quiet=True)
    assert checkpoint.latest(tmp_path) == 0


# evaluation


def test_evaluation_counts_whole_episodes():
    """Two steps each, reward 0 then 1; the sum over an episode is 1, whatever the policy."""
    policy = Constant(jnp.zeros(1))
    for episodes in (1, 3, 4, 7):
        returns = evaluate(policy, TwoStep(num_envs=3), jr.key(1), episodes)
        assert returns.shape == (episodes,) and np.allclose(returns, 1.0)


class Uneven:
    """Copy j has episodes of j + 1 steps, each with reward 1: their return is their length. On the host."""

    spec = EnvSpec(1, 1, 2, None, False)

    def reset(self, key):
        return np.zeros(2, int), np.zeros((2, 1), np.float32)

    def step(self, state, action):
        obs, true = np.zeros((2, 1), np.float32), np.ones(2, bool)
        done = state + 1 == np.array([1, 2])
        return np.where(done, 0, state + 1), Step(obs, obs, np.ones(2, np.float32), done, ~true, true)


@pytest.mark.parametrize(("episodes", "returns"), [(1, [1]), (3, [1, 2, 1]), (4, [1, 2, 1, 2])])
def test_short_episodes_do_not_count_more_than_long_ones(episodes: int, returns: list[int]):
    assert evaluate(Constant(jnp.zeros(1)), Uneven(), jr.key(1), episodes).tolist() == returns


def test_evaluation_is_greedy_unless_told_otherwise():
    policy = Constant(jnp.arctanh(jnp.full(1, 0.5)))
    assert np.allclose(evaluate(policy, Action(2), jr.key(1), 4), 1.0)
    assert not np.allclose(evaluate(policy, Action(2), jr.key(1), 4, greedy=False), 1.0)


def test_an_endless_episode_is_named():
    with pytest.raises(UserError, match="time limit"):
        evaluate(Constant(jnp.zeros(1)), replace(Action(1), length=1000), jr.key(1), 1, max_steps=20)


def test_the_interval_of_a_mean():
    """Half widths in units of the standard error, against tables of Student's t at .975."""
    for n, quantile in ((3, 4.303), (5, 2.776), (10, 2.262), (31, 2.042)):
        sample = np.arange(n, dtype=float)
        assert margin(sample) == pytest.approx(quantile * sample.std(ddof=1) / np.sqrt(n), rel=0.01)


# the loop on the host equals the loop on the device


def test_the_host_loop_counts_as_the_scan_does():
    out = []
    for env in (Action(2), OnHost(Action(2))):
        carry = begin(Guess(), env, jr.key(0), 32)
        carry, _, _ = run_epoch(Interact(True, 0, 4, Uniform(1.0)), Guess(), env, carry, jr.key(2), 3)
        carry, metrics, error = run_epoch(Interact(False, 2, 4, Uniform(1.0)), Guess(), env, carry, jr.key(2), 4)
        assert error is None and metrics["episodes"] == 8 and int(learner_of(carry).steps) == 14
        out.append(learner_of(carry))
    scan, host = out
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(*map(jax.tree.leaves, (host, scan)), strict=True))


# records


def test_records_later_than_the_checkpoint_are_dropped(tmp_path: Path):
    log = Log(tmp_path, (), {})
    for step in (10, 20, 30):
        log.metrics(step, {"loss": 1.0})
        log.evaluation(step, {"return_mean": float(step), "return_min": 0.0, "return_max": 50.0})
    for name, text in (("metrics.jsonl", '{"step": 15, "lo'), ("eval.csv", "15,1")):
        with (tmp_path / name).open("a") as file:
            file.write(text)  # a process that died in the middle of a line
    Log(tmp_path, (), {}, step=20).evaluation(30, {"return_mean": -1.0, "return_min": -2.0, "return_max": 0.0})
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [10, 20]
    assert [(row["step"], row["return_mean"]) for row in read_evaluations(tmp_path)] == [(10, 10), (20, 20), (30, -1)]
    assert plot_curve(tmp_path) == tmp_path / "curve.png"


def test_no_curve_without_evaluations(tmp_path: Path):
    assert read_evaluations(tmp_path) == [] and plot_curve(tmp_path) is None


# the console


def shown(monkeypatch: pytest.MonkeyPatch, terminal: bool, quiet: bool = False) -> str:
    out = io.StringIO()
    make = partial(Console, file=out, force_terminal=terminal, width=100)
    monkeypatch.setattr(console, "Console", make)
    monkeypatch.setattr(console, "QUIET_SECONDS", 0.0)
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(clock)))
    with console.Progress(f"a header {'long ' * 60}", 40, 0, quiet) as progress:
        progress.update("collecting", 10, {})
        progress.update("learning", 20, {})
        progress.update("learning", 30, {"return": 3.25})
        progress.evaluated(30, np.array([[1.0, 2.0]]))
    return out.getvalue()


def test_a_log_file_gets_plain_lines(monkeypatch: pytest.MonkeyPatch):
    text = shown(monkeypatch, terminal=False)
    assert text.isprintable() or set(text) - set("\n") <= set(map(chr, range(32, 127)))
    first, *rest = text.splitlines()
    assert first.startswith("a header long")
    assert rest[:3] == [
        "step        10  collecting",
        "step        20  learning",  # no speed yet: this part was compiled first
        "step        30  return 3.2      1 steps/s, 0 min 10 s left",
    ]
    assert rest[3] == "step        30  evaluation return      1.5 +- 5.7  (2 episodes, min 1.0, max 2.0)"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch):
    text = shown(monkeypatch, terminal=True)
    assert "30/40" in text and "return 3.2" in text and "\x1b[" in text


@dataclass(frozen=True)
class Saturated(Guess):
    """Its critic has to clip every fifth target."""

    def update(self, state, batch, key):
        state, metrics = super().update(state, batch, key)
        return state, metrics | {"targets_out_of_range": 0.2}


def test_targets_that_are_clipped_are_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train(replace(GUESS, agent=Saturated()), tmp_path)
    out = capsys.readouterr().out
    assert out.count("note: 20% of the critic's targets lie beyond the range of its head") == 1
    assert "--agent.critic.head.low" in out


def test_what_an_environment_has_to_say_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Observations near 1e9 in double precision: training environment and evaluation say it, the user reads it once."""
    run = replace(GUESS, source=replace(GUESS.source, env="tests.cli_helpers:far"))
    train(run, tmp_path, trust="all")
    assert capsys.readouterr().out.count("note: observations of Far reach 1e+09, where float32 resolves only") == 1


def test_quiet_is_silent(monkeypatch: pytest.MonkeyPatch):
    assert shown(monkeypatch, terminal=True, quiet=True) == shown(monkeypatch, terminal=False, quiet=True) == ""


def test_the_header_says_what_will_be_trained(tmp_path: Path, capsys: pytest.CaptureFixture):
    train(with_source(replace(GUESS, steps=41), num_envs=4, collect=9), tmp_path / "run")
    assert capsys.readouterr().out.splitlines()[0] == (
        f"Guess on probe:obs-action, 44 steps (41 rounded up), seed 0, in {tmp_path / 'run'}"
    )
