"""`train`: what a run leaves behind, what it says meanwhile, how it ends."""

import csv
import io
import json
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from rich.console import Console
from tests.cli_helpers import TINY, Guess

from contraflow import EnvSpec, Run, Step, UserError, resume, train
from contraflow.envs.probe import Action, TwoStep
from contraflow.train import checkpoint, console
from contraflow.train import run as driver
from contraflow.train import run_writer as record
from contraflow.train.artifact import load_policy
from contraflow.train.evaluate import evaluate
from contraflow.train.log import Log, read_evaluations
from contraflow.train.loop import Carry, Learner, epoch
from contraflow.train.offpolicy import OffPolicy, first_learner
from contraflow.train.plot import plot_curve

GUESS = replace(TINY, agent=Guess())


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_a_run_leaves_behind(tmp_path: Path):
    result = train(GUESS, tmp_path / "run", quiet=True, trust=True)
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


def test_the_best_policy_is_that_of_the_best_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also across an interruption: what came before counts."""
    seen, returns = [], iter((1.0, 5.0, 2.0, 4.0))

    def scripted(agent, state, env, key, episodes):
        seen.append(jax.tree.map(np.array, state))
        return np.full(episodes, next(returns))

    monkeypatch.setattr(driver, "evaluate", scripted)
    train(replace(GUESS, steps=60), tmp_path / "run", quiet=True, trust=True)
    resume(tmp_path / "run", steps=80, quiet=True, trust=True)
    assert len(seen) == 4
    for folder, state in (("best", seen[1]), ("policy", seen[3])):
        *_, saved = load_policy(tmp_path / "run" / folder, trust=True)
        for name in GUESS.agent.acting:
            jax.tree.map(np.testing.assert_array_equal, getattr(saved, name), getattr(state, name))


def test_tensorboard_is_the_default_tracker(tmp_path: Path):
    assert Run().trackers == ("tensorboard",)
    train(replace(GUESS, trackers=("tensorboard",)), tmp_path, quiet=True)
    (file,) = (tmp_path / "tensorboard").glob("events.*")
    recorded = file.read_bytes()
    assert all(name in recorded for name in (b"train/guess_loss", b"eval/return_mean", b"diagnostics/action_std"))


def test_steps_are_rounded_up_to_whole_rounds(tmp_path: Path):
    result = train(replace(GUESS, num_envs=4, steps=41, collect=9), tmp_path, quiet=True)
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
    agent = Guess()
    state = agent.init(jr.key(0), TwoStep().spec)
    for episodes in (1, 3, 4, 7):
        returns = evaluate(agent, state, TwoStep(num_envs=3), jr.key(1), episodes)
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
    agent = Guess()
    state = agent.init(jr.key(0), Uneven.spec)
    assert evaluate(agent, state, Uneven(), jr.key(1), episodes).tolist() == returns


def test_evaluation_is_greedy_unless_told_otherwise():
    agent = Guess()
    state = agent.init(jr.key(0), Action().spec)
    state = type(state)(jnp.arctanh(jnp.full(1, 0.5)), state.step)
    assert np.allclose(evaluate(agent, state, Action(2), jr.key(1), 4), 1.0)
    assert not np.allclose(evaluate(agent, state, Action(2), jr.key(1), 4, explore=True), 1.0)


def test_an_endless_episode_is_named():
    class Endless(Action):
        def ends(self, age):
            return age < 0, age < 0

    agent = Guess()
    with pytest.raises(UserError, match="time limit"):
        evaluate(agent, agent.init(jr.key(0), Endless().spec), Endless(), jr.key(1), 1, max_steps=20)


# the loop on the host equals the loop on the device


def test_the_host_loop_counts_as_the_scan_does():
    class Host(Action):
        @property
        def spec(self):
            return replace(super().spec, jittable=False)

    out = {}
    for env in (Action(2), Host(2)):
        learner = first_learner(Guess(), env.spec, 32, jr.key(0))
        env_state, obs = env.reset(jr.key(1))
        carry = Carry(learner, env_state, jnp.copy(obs))
        carry, _, _ = epoch(OffPolicy(True, 0, 4), Guess(), env, carry, jr.key(2), 3)
        carry, metrics, error = epoch(OffPolicy(False, 2, 4), Guess(), env, carry, jr.key(2), 4)
        assert error is None and metrics["episodes"] == 8 and int(carry.learner.steps) == 14
        out[type(env)] = carry.learner
    host, scan = out[Host], out[Action]
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(*map(jax.tree.leaves, (host, scan)), strict=True))
    assert isinstance(host, Learner)


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
    with console.Progress(TINY, Path("runs") / ("long" * 30), 0, quiet) as progress:
        progress.update(10, {})
        progress.update(20, {"return": 3.25})
        progress.evaluated(20, np.array([1.0, 2.0]))
    return out.getvalue()


def test_a_log_file_gets_plain_lines(monkeypatch: pytest.MonkeyPatch):
    text = shown(monkeypatch, terminal=False)
    assert text.isprintable() or set(text) - set("\n") <= set(map(chr, range(32, 127)))
    first, *rest = text.splitlines()
    assert first == f"SIR on {TINY.env}, 40 steps, seed 0, in runs/{'long' * 30}"
    assert [line.split()[:2] for line in rest] == [["step", "10"], ["step", "20"], ["step", "20"]]
    assert "collecting" in rest[0] and "return 3.2" in rest[1] and "steps/s" in rest[1] and "1.5" in rest[2]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch):
    text = shown(monkeypatch, terminal=True)
    assert "20/40" in text and "steps/s" in text and "return 3.2" in text and "\x1b[" in text


def test_quiet_is_silent(monkeypatch: pytest.MonkeyPatch):
    assert shown(monkeypatch, terminal=True, quiet=True) == shown(monkeypatch, terminal=False, quiet=True) == ""
