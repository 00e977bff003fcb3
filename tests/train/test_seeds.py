"""Many seeds at once: each folder is that of a single run, whatever happens to the others."""

import json
import os
import re
import shutil
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
from tests.cli_helpers import FLAGS, TINY, Constant, Guess, State, assert_refused, cli, with_source
from tests.train.loop_helpers import OnHost

from contraflow import SAC, UserError, load, resume, resume_seeds, train, train_seeds
from contraflow.data.samplers import Uniform
from contraflow.envs.control import Pendulum
from contraflow.envs.probe import ObsAction
from contraflow.rl.critics import Critics
from contraflow.training import checkpoint
from contraflow.training import run as driver
from contraflow.training.evaluate import evaluate, evaluate_seeds
from contraflow.training.log import read_evaluations
from contraflow.training.loop import Carry, World, epoch, stacked
from contraflow.training.run import read_config
from contraflow.training.sources.base import first_learner
from contraflow.training.sources.replay import Interact

SEEDS = (0, 7, 3)
GUESS = replace(TINY, agent=Guess())


@pytest.fixture(autouse=True)
def batched_keys():
    # jax 0.10 takes the keys that the inner scan splits for used ones once it is vmapped.
    with jax.debug_key_reuse(False):
        yield


def metrics(folder: Path) -> list[dict]:
    """Rows of metrics.jsonl without what is not the run's own."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "seeds_at_once")} for row in rows]


def evaluations(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_evaluations(folder)]


def final_carry(folder: Path):
    run = read_config(folder, "all")
    with closing(run.source.open(run, "all")) as opened:
        return driver.first_carry(run, folder, opened, driver.root_keys(run)[0], checkpoint.latest(folder))


def numbers(tree) -> list[np.ndarray]:
    return [
        np.asarray(jr.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x) for x in jax.tree.leaves(tree)
    ]


def assert_same_run(folder: Path, other: Path, rtol: float, atol: float) -> None:
    """Records, policies and the checkpoint with its replay. The tolerance is for float32 sums in another order; an
    action of another seed is off by the whole range."""
    close = {"rtol": rtol, "atol": atol}
    assert (folder / "config.json").read_bytes() == (other / "config.json").read_bytes()
    names = [
        sorted(p.relative_to(f).as_posix() for p in f.rglob("*") if "default" not in p.parts) for f in (folder, other)
    ]
    assert names[0] == names[1]
    for read in (metrics, evaluations):
        rows, others = read(folder), read(other)
        assert [list(row) for row in rows] == [list(row) for row in others]
        for row, wanted in zip(rows, others, strict=True):
            # The entropy of a histogram jumps when one action falls into another bin.
            loose = {"diagnostics/action_entropy"}
            for name in row.keys() - loose:
                np.testing.assert_allclose(row[name], wanted[name], **close, err_msg=name)
    # Which of two equally good policies is the best is a matter of rounding.
    returns = np.sort([row["return_mean"] for row in evaluations(other)])
    for policy in ("policy", "best") if np.all(np.diff(returns) > 10 * atol) else ("policy",):
        arrays, wanted = (load_file(f / policy / "model.safetensors") for f in (folder, other))
        assert arrays.keys() == wanted.keys()
        for name in wanted:
            np.testing.assert_allclose(arrays[name], wanted[name], **close, err_msg=name)
    one, two = final_carry(folder), final_carry(other)
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(numbers(one), numbers(two), strict=True):
        np.testing.assert_allclose(a, b, **close)


def assert_same_seeds(out: Path, other: Path, rtol: float = 0.0, atol: float = 0.0) -> None:
    for seed in SEEDS:
        assert_same_run(out / f"seed{seed}", other / f"seed{seed}", rtol, atol)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("seeds") / "together"
    with jax.debug_key_reuse(False):
        results = train_seeds(GUESS, SEEDS, out, quiet=True)
    assert [result.folder for result in results] == [out / f"seed{seed}" for seed in SEEDS]
    assert all(result.steps == 40 and result.returns.shape == (2,) and not result.interrupted for result in results)
    assert sorted(path.name for path in out.iterdir()) == ["seed0", "seed3", "seed7", "seeds.json"]
    return out


def test_each_seed_is_the_run_that_it_would_be_alone(together: Path, tmp_path: Path):
    for seed in SEEDS:
        train(replace(GUESS, seed=seed), tmp_path / f"seed{seed}", quiet=True)
    assert_same_seeds(together, tmp_path, rtol=2e-3, atol=2e-4)


@pytest.mark.slow
def test_so_it_is_with_a_real_agent(tmp_path: Path):
    run = with_source(replace(TINY, agent=SAC(critic=Critics(width=8, depth=1))), env="jax:pendulum", n_step=2)
    train_seeds(run, SEEDS, tmp_path / "together", quiet=True)
    for seed in SEEDS:
        train(replace(run, seed=seed), tmp_path / f"seed{seed}", quiet=True)
    assert_same_seeds(tmp_path / "together", tmp_path, rtol=5e-3, atol=1e-3)


HOST = with_source(GUESS, env="tests.cli_helpers:pointer")


def test_host_environments_take_the_seeds_in_turn(tmp_path: Path):
    """Bitwise the runs that they would be alone; one after the other, in environments of their own."""
    results = train_seeds(HOST, (0, 7), tmp_path / "together", trust="all", quiet=True)
    assert [result.steps for result in results] == [40, 40]
    train(replace(HOST, seed=7), tmp_path / "alone", trust="all", quiet=True)
    assert evaluations(tmp_path / "together/seed7") == evaluations(tmp_path / "alone")
    assert evaluations(tmp_path / "together/seed7") != evaluations(tmp_path / "together/seed0")
    policy = "policy/model.safetensors"
    assert (tmp_path / "together/seed7" / policy).read_bytes() == (tmp_path / "alone" / policy).read_bytes()
    shutil.rmtree(tmp_path / "together/seed7/checkpoints/40")
    results = resume_seeds(tmp_path / "together", quiet=True, trust="all")
    assert [result.steps for result in results] == [40, 40]


def test_the_comparison_sees_another_seed(together: Path, tmp_path: Path):
    """What it would miss if all seeds shared a key, or one got the data of another."""
    alike = tmp_path / "alike"
    shutil.copytree(together / "seed7", alike)
    shutil.copy(together / "seed3/config.json", alike)
    with pytest.raises(AssertionError):
        assert_same_run(alike, together / "seed3", 2e-3, 2e-4)
    for part in ("metrics.jsonl", "eval.csv", "policy", "best", "checkpoints"):
        mixed = tmp_path / part
        shutil.copytree(together / "seed3", mixed)
        whole, new = mixed / part, together / "seed7" / part
        if whole.is_dir():
            shutil.rmtree(whole)
            shutil.copytree(new, whole)
        else:
            shutil.copy(new, whole)
        with pytest.raises(AssertionError):
            assert_same_run(mixed, together / "seed3", 2e-3, 2e-4)


def test_one_body_for_one_and_many(monkeypatch: pytest.MonkeyPatch):
    """Both trace `iterate`: what is planted there shows in both."""
    real = Interact.iterate

    def planted(*args):
        carry, info = real(*args)
        return carry, info | {"planted": carry.learner.steps}

    monkeypatch.setattr(Interact, "iterate", planted)
    # A rate of its own: nothing is cached yet.
    agent, env, stage = Guess(rate=0.123), ObsAction(2), Interact(False, 1, 8, Uniform(1.0))
    starts = []
    for seed in range(3):
        learner = first_learner(agent, env.spec, jr.key(seed), 32)
        state, obs = env.reset(jr.key(seed + 10))
        starts.append(Carry(learner, state, jnp.copy(obs)))
    world, copied = World(env.spec, env), jax.tree.map(jnp.copy, starts[0])
    _, many, _ = epoch(stage, agent, world, stacked(starts), jr.split(jr.key(5), 3), 4)
    _, one, _ = epoch(stage, agent, world, stacked([copied]), jr.key(5)[None], 4)
    assert [m["planted"] for m in [*many, *one]] == [5.0] * 4


def test_a_seed_is_read_and_continued_alone(together: Path, tmp_path: Path):
    folder = tmp_path / "seed3"
    shutil.copytree(together / "seed3", folder)
    code, out, err = cli("eval", folder, "--episodes", "2", "--trust", "all")
    assert code == 0 and err == "" and "mean" in out
    assert load(folder / "best", trust="all")(np.zeros(1)).shape == (1,)
    result = resume(folder, steps=60, quiet=True, trust="all")
    assert result.steps == 60 and [row["step"] for row in evaluations(folder)] == [20, 40, 60]
    train(replace(GUESS, seed=3, steps=60), tmp_path / "alone", quiet=True)
    assert_same_run(folder, tmp_path / "alone", 2e-3, 2e-4)


# interruptions: the same program goes on, so what comes out is the same to the last bit


def test_an_interrupted_program_goes_on(together: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = driver.epoch

    def interrupted(*args):
        out = real(*args)
        os.kill(os.getpid(), signal.SIGINT)
        return out

    monkeypatch.setattr(driver, "epoch", interrupted)
    results = train_seeds(GUESS, SEEDS, tmp_path / "run", quiet=True)
    assert all(result.interrupted and result.steps == 10 == checkpoint.latest(result.folder) for result in results)
    monkeypatch.setattr(driver, "epoch", real)
    results = resume_seeds(tmp_path / "run", quiet=True, trust="all")
    assert all(result.steps == 40 and not result.interrupted for result in results)
    for seed in SEEDS:  # an interruption leaves a checkpoint of its own behind, which is dropped later
        assert checkpoint.steps(tmp_path / f"run/seed{seed}") == [20, 40]
    assert_same_seeds(tmp_path / "run", together)


def test_killed_between_two_checkpoints(together: Path, tmp_path: Path):
    """Some seeds have saved, some have not: all go on from the newest step that they share."""
    out = tmp_path / "run"
    shutil.copytree(together, out)
    shutil.rmtree(out / "seed7/checkpoints/40")
    assert {row["step"] for row in metrics(out / "seed0")} == {10, 20, 30, 40}
    results = resume_seeds(out, quiet=True, trust="all")
    assert [result.steps for result in results] == [40] * 3
    assert_same_seeds(out, together)


@pytest.mark.slow
def test_extended_together(together: Path, tmp_path: Path):
    shutil.copytree(together, tmp_path / "run")
    resume_seeds(tmp_path / "run", steps=60, quiet=True, trust="all")
    train_seeds(replace(GUESS, steps=60), SEEDS, tmp_path / "long", quiet=True)
    assert_same_seeds(tmp_path / "run", tmp_path / "long")


def test_seeds_that_parted_are_not_continued_together(together: Path, tmp_path: Path):
    out = tmp_path / "run"
    shutil.copytree(together, out)
    resume(out / "seed7", steps=80, quiet=True, trust="all")
    with pytest.raises(UserError, match=r"no longer have the same settings.*contraflow resume .*seed0"):
        resume_seeds(out, quiet=True, trust="all")
    (out / "seed7/config.json").write_bytes((out / "seed0/config.json").read_bytes())
    with pytest.raises(UserError, match=r"no checkpoint in common.*contraflow resume .*seed0"):
        resume_seeds(out, quiet=True, trust="all")
    with pytest.raises(UserError, match="give the total"):
        resume_seeds(together, steps=20, quiet=True, trust="all")
    (out / "seeds.json").write_text("{}")
    with pytest.raises(UserError, match=r"seeds\.json is damaged"):
        resume_seeds(out, quiet=True, trust="all")


@dataclass(frozen=True)
class Fragile(Guess):
    """Breaks after 12 updates where the first bias, which only the seed decides, was positive."""

    def init(self, key, spec):
        return State(
            (jr.normal(key, (spec.action_dim,)), jr.normal(jr.clone(key), (spec.action_dim,))), jnp.zeros((), jnp.int32)
        )

    def policy(self, state):
        return Constant(state.bias[0])

    def update(self, state, batch, key):
        loss = jnp.where((state.step >= 12) & (state.bias[1][0] > 0), jnp.inf, jnp.mean(batch.reward))
        bias = state.bias[0] + self.rate * jnp.mean(batch.action, 0)
        return State((bias, state.bias[1]), state.step + 1), {"guess_loss": loss}


@pytest.mark.slow
def test_a_failing_seed_does_not_stop_the_others(tmp_path: Path):
    run, out = replace(TINY, agent=Fragile()), tmp_path / "run"
    env = ObsAction(2)
    keys = [jr.split(driver.root_keys(replace(run, seed=seed))[0])[0] for seed in range(12)]
    breaks = [float(run.agent.init(key, env.spec).bias[1][0]) > 0 for key in keys]
    bad, good = (np.flatnonzero(np.array(breaks) == b).tolist() for b in (True, False))
    some = (good[0], bad[0], good[1])
    with pytest.raises(UserError, match="1 of 3 seeds failed; the other 2 are finished; ") as error:
        train_seeds(run, some, out, quiet=True)
    assert re.findall(r"seed (\d+): guess_loss became inf", str(error.value)) == [str(bad[0])]
    assert [checkpoint.latest(out / f"seed{seed}") for seed in some] == [40, 20, 40]
    train_seeds(run, good[:3], tmp_path / "sound", quiet=True)
    for seed in good[:2]:
        assert_same_run(out / f"seed{seed}", tmp_path / f"sound/seed{seed}", 2e-3, 2e-4)
    with pytest.raises(UserError, match=f"3 of 3 seeds failed; seed {bad[0]}: guess_loss"):
        train_seeds(run, bad[:3], tmp_path / "all", quiet=True)


# evaluation


class Noisy(Constant):
    """Random in evaluation too: the key of every step shows."""

    def __call__(self, obs, key, greedy=True):
        return super().__call__(obs, key, False)


class Brief(Pendulum):
    @property
    def spec(self):
        return replace(super().spec, episode_length=25)


def test_evaluation_of_many_is_that_of_each(monkeypatch: pytest.MonkeyPatch):
    """Episodes of 25 steps, two of each copy: longer than a chunk; one policy per seed."""
    monkeypatch.setattr("contraflow.training.evaluate.CHUNK", 10)
    policies = [Noisy(jr.normal(jr.key(seed), (1,))) for seed in range(3)]
    keys = jr.split(jr.key(9), 3)
    many, _ = evaluate_seeds(policies, Brief(2), keys, 3)
    for s, policy in enumerate(policies):
        np.testing.assert_allclose(many[s], evaluate(policy, OnHost(Brief(2)), keys[s], 3), rtol=1e-4)
    np.testing.assert_allclose(evaluate_seeds(policies, OnHost(Brief(2)), keys, 3).returns, many, rtol=1e-4)
    assert many.shape == (3, 3) and len(np.unique(many.round(2))) == 9


# the command line

COMMAND = ["train", "tests.cli_helpers:Guess", "--trust", "all", *FLAGS[:-5], "--quiet"]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(*COMMAND, "--seeds", "4", "2", "9")
    assert code == 0 and err == "", err
    assert re.search(r"trained 3 seeds to step 40 in \d+ min \d+ s", out)
    folder = Path("runs/Guess-obs-action-seeds4-2-9")
    assert re.findall(r"^seed\d$", out, re.MULTILINE) == ["seed4", "seed2", "seed9"]
    assert out.count("best policy, greedy") == 3
    assert read_config(folder / "seed4", "all") == replace(GUESS, seed=4)
    code, out, err = cli("resume", folder, "--trust", "all", "--quiet")
    assert code == 0 and f"{folder} is finished: 40 steps" in out, err
    code, out, _ = cli("resume", folder, "--trust", "all", "--quiet", "--steps", "60", "--require", "9")
    assert code == 1 and "trained 3 seeds to step 60" in out and out.count("below the bar of 9") == 3


def test_what_is_shown_meanwhile(tmp_path: Path, capsys: pytest.CaptureFixture):
    train_seeds(GUESS, (5, 1, 2), tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Guess on {TINY.env}, 40 steps, seeds 5, 1, 2, in {tmp_path / 'run'}"
    means = [
        np.mean([row["return_mean"] for row in rows])
        for rows in zip(*(evaluations(tmp_path / f"run/seed{s}") for s in (5, 1, 2)), strict=True)
    ]
    shown = [float(re.findall(r"evaluation return +(-?\d+\.\d)", line)[0]) for line in lines[1:]]
    np.testing.assert_allclose(shown, means, atol=0.051)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--seeds 0 1 0", ["different numbers", "got 0 1 0"]),
        ("--seeds", ["at least one"]),
        ("--seeds 0 -1", ["from 0 on", "got 0 -1"]),
        ("--seeds 0 one", ["--seeds", "one"]),
        ("--seed 3 --seeds 0 1", ["give one of the two"]),
        ("--seed=3 --seeds 0 1", ["give one of the two"]),
    ],
)
def test_mistakes(args: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert_refused([*COMMAND, *args.split()], *words)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_a_folder_in_use_is_left_alone(together: Path):
    before = sorted(together.rglob("*"))
    assert_refused([*COMMAND, "--seeds", "8", "--out", str(together)], "already exists", "contraflow resume")
    assert sorted(together.rglob("*")) == before
