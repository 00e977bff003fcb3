"""Sources: what an agent is given, and when; offline to online in both of its parts."""

import json
import os
import signal
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.cli_helpers import TINY, Guess, with_source

from contraflow import Dataset, OfflineToOnline, Replay, Run, UserError, resume, train
from contraflow.cli.settings import as_run, parse_train
from contraflow.data.samplers import Mixed, NStep, Uniform
from contraflow.experiments.report.scores import collect
from contraflow.presets import PRESETS
from contraflow.training import checkpoint
from contraflow.training import run as driver
from contraflow.training.log import read_evaluations
from contraflow.training.plot import plot_curve
from contraflow.training.sources.base import discount
from contraflow.training.sources.offline_to_online import filled
from contraflow.training.sources.replay import Interact


@dataclass(frozen=True)
class Watcher(Guess):
    """Tells what its batches are made of; recorded actions are all .25."""

    gamma: float = 0.9

    def update(self, state, batch, key):
        state, metrics = super().update(state, batch, key)
        recorded = jnp.mean(jnp.isclose(batch.action[:, 0], 0.25))
        return state, metrics | {"recorded": recorded, "discount": batch.discount.mean(), "reward": batch.reward.mean()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty steps of the probe obs-action, in trajectories of four."""
    rows, end = np.linspace(-1, 1, 41, dtype=np.float32)[:, None], np.arange(40) % 4 == 3
    file = tmp_path_factory.mktemp("data") / "rows.npz"
    np.savez(
        file, obs=rows[:-1], next_obs=rows[1:], action=np.full((40, 1), 0.25), reward=np.ones(40, np.float32),
        terminated=end & False, end=end, low=np.array([-1.0]), high=np.array([1.0]),
    )  # fmt: skip
    return file


@pytest.fixture
def both(data: Path) -> Run:
    source = OfflineToOnline(str(data), "probe:obs-action", offline_steps=20, num_envs=2, batch_size=8, buffer_size=64)
    return replace(TINY, agent=Watcher(), source=source)


def rows_of(folder: Path) -> dict[int, dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows if "recorded" in row}


def test_offline_and_then_online(both: Run, tmp_path: Path):
    train(both, tmp_path / "run", quiet=True)
    rows = rows_of(tmp_path / "run")
    assert list(rows) == [10, 20, 30, 40]
    assert [row["recorded"] for row in rows.values()] == [1, 1, 0.5, 0.5]
    assert "episodes" not in rows[20] and rows[30]["episodes"] == 10, "every step online is an episode"
    assert [row["step"] for row in read_evaluations(tmp_path / "run")] == [20, 40]


@pytest.mark.parametrize("stop", [10, 20, 30])
def test_resume_is_exact_in_both_parts(both: Run, stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Broken off within the offline part, between the two, and within the online one."""
    train(both, tmp_path / "whole", quiet=True)
    real = driver.epoch

    def interrupted(*args):
        out = real(*args)
        if int(np.max(out[0].learner.steps)) == stop:
            os.kill(os.getpid(), signal.SIGINT)
        return out

    monkeypatch.setattr(driver, "epoch", interrupted)
    assert train(both, tmp_path / "parts", quiet=True).steps == stop
    monkeypatch.setattr(driver, "epoch", real)
    resume(tmp_path / "parts", quiet=True, trust="all")
    whole, parts = (load_file(tmp_path / name / "policy/model.safetensors")["bias"] for name in ("whole", "parts"))
    np.testing.assert_array_equal(whole, parts)
    assert rows_of(tmp_path / "whole").keys() == rows_of(tmp_path / "parts").keys()


@pytest.mark.parametrize("mix", [0.0, 0.25, 1.0])
def test_the_share_of_the_data(both: Run, mix: float, tmp_path: Path):
    train(with_source(both, mix=mix), tmp_path / "run", quiet=True)
    assert rows_of(tmp_path / "run")[40]["recorded"] == mix


def test_the_data_may_fill_the_replay(both: Run, tmp_path: Path):
    """Then they are drawn like any other row: 40 of 42 at first."""
    run = with_source(both, mix=None, batch_size=256)
    train(run, tmp_path / "run", quiet=True)
    assert rows_of(tmp_path / "run")[30]["recorded"] == pytest.approx(40 / 45, abs=0.05)
    with pytest.raises(UserError, match="raise --buffer-size"):
        train(with_source(run, buffer_size=30), tmp_path / "small", quiet=True)


def test_a_filled_replay_goes_on_behind_the_data(both: Run):
    with closing(both.source.open(both, "")) as opened:
        rows = opened.world.data
        learner = both.source.learner(both.agent, opened, jr.key(0))
    buffer = filled(learner.buffer, rows)
    assert int(buffer.size) == int(buffer.index) == 40
    np.testing.assert_array_equal(buffer.rows.next[:40], rows.next)
    np.testing.assert_array_equal(buffer.rows.reward[:41], np.append(np.ones(40), 0))


def test_half_of_the_steps_are_offline_unless_said():
    """So that the word for the source can come with any number of steps."""
    assert OfflineToOnline().resolved(41).offline_steps == 20
    assert OfflineToOnline(offline_steps=5).resolved(41).offline_steps == 5
    options = parse_train(
        "fql", ["source:offline-to-online", "--data", "a.npz", "--offline-steps", "3", "--steps", "9"]
    )
    assert as_run(options).source == OfflineToOnline("a.npz", offline_steps=3)


def test_the_step_of_the_switch_is_drawn(both: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In the curve of the run, and in those of a report by environment steps, gradient steps and time."""
    from matplotlib.axes import Axes

    from contraflow.experiments.report import charts
    from contraflow.experiments.report.runs import read

    lines, real = [], Axes.axvline
    monkeypatch.setattr(Axes, "axvline", lambda self, x, **style: lines.append(float(x)) or real(self, x, **style))
    train(both, tmp_path / "run", quiet=True)
    assert lines == [20]
    assert plot_curve(tmp_path / "run") and lines == [20], "an ordinary run has none"
    (record,), _ = read(tmp_path / "run")
    assert (record.switch("steps"), record.switch("updates")) == (0, 20)
    first = record.evaluations[0]["seconds"] / 60  # the evaluation in step 20
    assert record.switch("time") == pytest.approx(first)
    lines.clear()
    figures = charts.draw([record], collect([record], {}), record.agent)
    assert sorted(lines) == pytest.approx(sorted([0, 20, first])) and {"curves-steps", "curves-time"} < set(figures)
    curve = record.curve("steps")
    assert curve is not None and curve[0].tolist() == [0, 20], "what was evaluated offline is one place"


# discounts


def test_no_discount_is_not_a_discount_of_one():
    assert discount(Watcher(gamma=0.0)) == 0 and discount(Guess()) is None
    source = Replay(n_step=3, collect=1)
    assert source.sampler(Watcher(gamma=0.0)) == NStep(3, 0.0)
    assert Replay().sampler(Watcher(gamma=0.9)) == Uniform(0.9) and Replay().sampler(Guess()) == Uniform(1.0)
    stage, _ = OfflineToOnline(offline_steps=5).stage(Watcher(gamma=0.0), 5, 10)
    assert isinstance(stage, Interact) and isinstance(stage.sampler, Mixed)
    assert stage.sampler.offline.gamma == stage.sampler.online.gamma == 0


def test_chunks_of_replay_are_discounted_step_by_step(tmp_path: Path):
    """Two-step: rewards 0 and 1. A chunk of both is worth gamma and ends; returns are not discounted."""
    source = replace(TINY.source, env="probe:two-step", horizon=2, execute=2)
    train(replace(TINY, agent=Watcher(), source=source), tmp_path / "run", quiet=True)
    row = rows_of(tmp_path / "run")[40]
    assert row["reward"] == pytest.approx(0.9) and row["discount"] == 0 and row["return"] == 1
    assert source.sampler(Watcher()) == Uniform(0.9), "rows know of how many steps they are"


def test_no_discount_within_a_chunk_is_not_one_either():
    """gamma = 0 counts the first reward only; a rollout's decision is worth the plain sum, as in DPPO."""
    run = replace(TINY, agent=Watcher(gamma=0.0), source=replace(TINY.source, horizon=2, execute=2))
    ppo = with_source(PRESETS["ppo"], env="probe:obs-action", num_envs=2, horizon=2, execute=2)
    for one, gamma in ((run, 0.0), (ppo, 1.0)):
        with closing(one.source.open(one, "")) as opened:
            assert opened.world.env.gamma == gamma


# budgets


def test_the_warm_up_depends_on_the_budget():
    run = replace(PRESETS["rfm"], steps=3000)
    assert run.resolve("").source.collect == 150
    assert PRESETS["rfm"].resolve("").source.collect == 5000
    assert replace(TINY, source=replace(TINY.source, collect=None), steps=5).resolve("").source.collect == 1


@pytest.mark.parametrize(
    ("run", "total"),
    [
        (replace(PRESETS["reinflow"], steps=2000), 2048),
        (with_source(replace(PRESETS["reinflow"], steps=2000), horizon=4, execute=4), 4096),
        (with_source(replace(PRESETS["rfm"], steps=1000), num_envs=7), 1001),
        (replace(PRESETS["bc"], steps=123), 123),
        (Run(source=OfflineToOnline(offline_steps=5, num_envs=4), steps=10), 13),
        (Run(source=OfflineToOnline(num_envs=4), steps=14), 15),  # seven, and eight
    ],
)
def test_whole_iterations_are_trained(run: Run, total: int):
    assert run.total == total


# ranges of actions


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Actions up to 1.05 in a range that is not stated, for an environment whose range is [-2, 2]."""
    rng = np.random.default_rng(0)
    obs = rng.uniform(-1, 1, (60, 3)).astype(np.float32)
    file = tmp_path_factory.mktemp("double") / "rows.npz"
    np.savez(
        file, observations=obs, actions=1.05 * np.sign(obs[:, :1]), rewards=obs[:, 0], terminals=np.zeros(60, bool),
        timeouts=np.arange(60) % 10 == 9,
    )  # fmt: skip
    return file


def test_the_range_of_the_environment_counts_where_the_data_state_none(double: Path):
    pytest.importorskip("gymnasium")
    run = replace(PRESETS["bc"], source=Dataset(str(double), "gym:Pendulum-v1"), trackers=(), eval_episodes=1)
    with closing(run.source.open(run, "")) as opened:
        assert (opened.world.spec.low, opened.world.spec.high) == ((-2.0,), (2.0,))
        np.testing.assert_allclose(np.unique(opened.world.data.action), [-0.525, 0.525], rtol=1e-6)
        assert any("no stated bounds" in note for note in opened.data.notes)


def test_a_policy_of_another_range_is_not_fine_tuned(double: Path, tmp_path: Path):
    pytest.importorskip("gymnasium")
    bc = PRESETS["bc"]
    flow = replace(bc.agent.flow, network=replace(bc.agent.flow.network, width=8, depth=1))
    run = replace(
        bc, agent=replace(bc.agent, flow=flow), source=Dataset(str(double)), steps=2, eval_every=2, trackers=()
    )
    train(run, tmp_path / "bc", quiet=True)
    tuned = with_source(
        replace(PRESETS["reinflow"], trackers=(), pretrained=str(tmp_path / "bc")), env="gym:Pendulum-v1"
    )
    with pytest.raises(UserError, match=r"trained for actions in \[-1.05, 1.05\], gym:Pendulum-v1 takes \[-2, 2\]"):
        train(tuned, tmp_path / "tuned", quiet=True)
    assert not (tmp_path / "tuned").exists()


# the dataset of a checkpoint


def test_changed_data_are_not_trained_on(data: Path, tmp_path: Path):
    file = tmp_path / "copy.npz"
    file.write_bytes(data.read_bytes())
    run = replace(TINY, agent=Watcher(), source=Dataset(str(file), batch_size=8))
    train(run, tmp_path / "run", quiet=True)
    arrays = dict(np.load(file))
    arrays["reward"][3] += 1
    np.savez(file, **arrays)
    with pytest.raises(UserError, match=r"the dataset or frozen policy of .* is not the one that checkpoint 40"):
        resume(tmp_path / "run", steps=60, quiet=True, trust="all")


# per-episode state


def test_what_belongs_to_ended_episodes_is_forgotten(tmp_path: Path):
    """PPO on a host simulator: its running returns are of episodes that ended with the process."""
    ppo = PRESETS["ppo"]
    settings = replace(ppo.agent.ppo, minibatches=2, epochs=1)
    source = replace(ppo.source, env="tests.cli_helpers:pointer", num_envs=2, unroll=3)
    run = replace(ppo, agent=replace(ppo.agent, ppo=settings), source=source, steps=6, eval_every=6, log_every=6)
    run = replace(run, eval_episodes=1, trackers=())
    train(run, tmp_path / "run", trust="all", quiet=True)
    with closing(run.source.open(run, "all")) as opened:
        key = driver.root_keys(run)[0]
        shapes = jax.eval_shape(lambda: run.source.learner(run.agent, opened, key))
        saved = checkpoint.load(
            tmp_path / "run", 6, driver.Carry(shapes, None, None), driver.about(run, opened)
        ).learner
        carry = driver.first_carry(run, tmp_path / "run", opened, key, 6)
    assert np.asarray(saved.agent.scale.running).any() and np.asarray(saved.returns).any()
    assert not np.asarray(carry.learner.agent.scale.running).any() and not np.asarray(carry.learner.returns).any()


# environments are released


def test_environments_are_closed_where_the_data_do_not_fit(double: Path, monkeypatch: pytest.MonkeyPatch):
    """The data have three observations, the environment one."""
    from contraflow.envs.gymnasium import Gymnasium

    closed = []
    real = Gymnasium.close
    monkeypatch.setattr(Gymnasium, "close", lambda self: (closed.append(self), real(self)))
    place = str(double), "tests.cli_helpers:pointer"
    for source, count in ((Dataset(*place), 1), (OfflineToOnline(*place, offline_steps=20), 3)):
        run = replace(TINY, agent=Watcher(), source=source)
        with pytest.raises(UserError, match="has 3 observations"):
            run.source.open(run, "all")
        assert len({id(env) for env in closed}) == count


def test_environments_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from contraflow.envs.gymnasium import Gymnasium

    closed = []
    real = Gymnasium.close
    monkeypatch.setattr(Gymnasium, "close", lambda self: (closed.append(self), real(self)))
    run = with_source(replace(TINY, agent=Guess()), env="tests.cli_helpers:pointer")
    train(run, tmp_path / "run", trust="all", quiet=True)
    assert len({id(env) for env in closed}) == 2
    with pytest.raises(UserError):
        train(replace(run, agent=Guess(explode_at=3)), tmp_path / "bad", trust="all", quiet=True)
    assert len({id(env) for env in closed}) == 4
