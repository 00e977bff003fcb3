"""A run that was killed, interrupted or extended ends where the undisturbed one does."""

import csv
import json
import os
import signal
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from tests.cli_helpers import TINY, in_subprocess, with_source

from contraflow import Replay, Run, resume, train
from contraflow.training import checkpoint
from contraflow.training import run as driver

# Audit hooks see every call into the operating system: the process dies inside the writing of a chosen checkpoint, at a
# chosen moment of it.
KILLED = """
import os, signal, sys
out, step, moment = sys.argv[1:]
folder = f"{step}.orbax-checkpoint-tmp"

def watch(event, args):
    path = str(args[0]) if args else ""
    if event == moment and folder in path and not path.endswith(folder):
        os.kill(os.getpid(), signal.SIGKILL)

import orbax.checkpoint
from contraflow import train
from tests.cli_helpers import TINY
sys.addaudithook(watch)
train(TINY, out, quiet=True)
"""


def final_carry(folder: Path, run: Run):
    """The newest checkpoint of a run: networks, optimisers, replay, counters, environment."""
    step = checkpoint.latest(folder)
    assert step is not None and step >= run.steps
    return carry_at(folder, run, step)


def carry_at(folder: Path, run: Run, step: int):
    with closing(run.source.open(run, "all")) as opened:
        return driver.first_carry(run, folder, opened, driver.root_keys(run)[0], step)


def same(one, two) -> bool:
    def raw(x):
        return np.asarray(jax.random.key_data(x) if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key) else x)

    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return jax.tree.structure(one) == jax.tree.structure(two) and all(np.array_equal(raw(a), raw(b)) for a, b in pairs)


def rows(folder: Path) -> tuple[list, list]:
    """(metrics, evaluations) without the clock."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    with (folder / "eval.csv").open() as file:
        evaluations = list(csv.DictReader(file))
    return [[{k: v for k, v in row.items() if k != "seconds"} for row in table] for table in (metrics, evaluations)]  # pyright: ignore


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(TINY, folder, quiet=True)
    return folder


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Environment steps taken from here on, epoch by epoch: a run that begins again ends alike, but takes them all."""
    taken, real = [], driver.epoch

    def counted(stage, agent, world, carry, keys, n, *rest):
        taken.append(n * world.spec.num_envs)
        return real(stage, agent, world, carry, keys, n, *rest)

    monkeypatch.setattr(driver, "epoch", counted)
    return taken


def assert_equal_runs(folder: Path, other: Path, run: Run = TINY) -> None:
    """Bitwise: checkpoint with replay, policy; and the records, with no row missing or twice."""
    assert same(final_carry(folder, run), final_carry(other, run))
    policy = "policy/model.safetensors"
    assert (folder / policy).read_bytes() == (other / policy).read_bytes()
    assert rows(folder) == rows(other)


@pytest.mark.slow
def test_the_comparison_sees_a_difference(undisturbed: Path, tmp_path: Path):
    train(replace(TINY, seed=1), tmp_path / "b", quiet=True)
    assert not same(final_carry(undisturbed, TINY), final_carry(tmp_path / "b", TINY))
    assert rows(undisturbed) != rows(tmp_path / "b")
    carry = final_carry(undisturbed, TINY)
    buffer = carry.learner.buffer
    assert int(buffer.size) == TINY.steps
    reward = buffer.rows.reward.at[3].add(1e-7)
    assert not same(carry, jax.tree.map(lambda x: reward if x is buffer.rows.reward else x, carry))


@pytest.mark.parametrize(
    ("step", "moment", "left"),
    [
        (40, "os.mkdir", 20),
        (0, "os.rename", None),
        pytest.param(40, "os.rename", 20, marks=pytest.mark.slow),
        pytest.param(20, "os.rename", 0, marks=pytest.mark.slow),
    ],
)
def test_killed_while_writing_a_checkpoint(
    undisturbed: Path, tmp_path: Path, trained: list[int], step: int, moment: str, left: int | None
):
    folder = tmp_path / "run"
    process = in_subprocess(KILLED, folder, step, moment)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert list((folder / "checkpoints").glob("*tmp*")), "killed before or after the write, not in it"
    assert checkpoint.latest(folder) == left
    result = resume(folder, quiet=True)
    assert result.steps == TINY.steps and not result.interrupted and sum(trained) == TINY.steps - (left or 0)
    assert_equal_runs(folder, undisturbed)


def test_a_stopped_half_continues_bitwise(undisturbed: Path, tmp_path: Path, trained: list[int]):
    train(replace(TINY, steps=20), tmp_path / "run", quiet=True)
    resume(tmp_path / "run", steps=40, quiet=True)
    assert sum(trained) == 40
    assert_equal_runs(tmp_path / "run", undisturbed)
    assert driver.read_config(tmp_path / "run") == TINY


def test_a_finished_run_stays_as_it_is(undisturbed: Path, tmp_path: Path):
    before = {path: path.read_bytes() for path in undisturbed.rglob("*.*") if path.is_file() and path.suffix != ".png"}
    (undisturbed / "policy" / "model.safetensors").unlink()  # as if killed between checkpoint and policy
    result = resume(undisturbed, quiet=True)
    assert result.steps == 40 and result.returns.shape == (1,)
    assert {path: path.read_bytes() for path in before} == before


def test_the_newest_complete_checkpoint_counts(undisturbed: Path, tmp_path: Path):
    train(TINY, tmp_path / "run", quiet=True)
    (tmp_path / "run/checkpoints/40").rename(tmp_path / "away")
    (tmp_path / "run/checkpoints/60.orbax-checkpoint-tmp-1").mkdir()
    (tmp_path / "run/checkpoints/notes").mkdir()
    assert checkpoint.latest(tmp_path / "run") == 20
    resume(tmp_path / "run", quiet=True)
    assert_equal_runs(tmp_path / "run", undisturbed)


HOST = with_source(TINY, env="tests.cli_helpers:pointer")


@pytest.mark.slow
def test_an_interrupted_host_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """SIGINT in the middle of a host loop: what was learned and seen is kept, new episodes start."""
    folder, steps = tmp_path / "run", 0
    whole = Replay.open

    def interrupting(source: Replay, run: Run, trust: str):
        opened = whole(source, run, trust)
        env = opened.world.env
        step = type(env).step

        class Interrupting(type(env)):
            def step(self, state, action):
                nonlocal steps
                steps += 1
                if steps == 13:
                    os.kill(os.getpid(), signal.SIGINT)
                return step(self, state, action)

        env.__class__ = Interrupting
        return opened

    monkeypatch.setattr(Replay, "open", interrupting)
    result = train(HOST, folder, trust="all", quiet=True)
    assert result.interrupted and result.steps == 26 and checkpoint.latest(folder) == 26
    monkeypatch.setattr(Replay, "open", whole)
    policy = (folder / "policy/model.safetensors").read_bytes()

    half = carry_at(folder, HOST, 26).learner
    assert int(half.buffer.size) == 26 and int(half.iteration) == 13 and not half.returns.any()
    result = resume(folder, trust="all", quiet=True)
    assert not result.interrupted and result.steps == 40
    whole_learner = carry_at(folder, HOST, 40).learner
    assert int(whole_learner.buffer.size) == 40
    assert np.all(whole_learner.buffer.rows.next[:26] < 26), "n-step rows would join two episodes"
    assert np.array_equal(whole_learner.buffer.rows.reward[:26], half.buffer.rows.reward[:26])
    assert (folder / "policy/model.safetensors").read_bytes() != policy
    steps_seen = [(row["step"], "critic_loss" in row) for row in rows(folder)[0]]
    assert len(set(steps_seen)) == len(steps_seen) and sorted(steps_seen, key=lambda s: s[0]) == steps_seen
    assert [row["step"] for row in rows(folder)[1]] == ["20", "40"]
    assert np.isfinite([float(row["return_mean"]) for row in rows(folder)[1]]).all()
