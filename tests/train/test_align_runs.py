"""Runs of alignment: rewards inside and outside of JAX, resumed runs, and `contraflow align`."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.cli_helpers import COMMAND, ENVIRON, assert_refused, cli

from contraflow import train, train_seeds
from contraflow.agents.align.nft import NFT
from contraflow.agents.offline.bc import BC
from contraflow.core.types import UserError
from contraflow.flow.model import Ddim, FlowSpec
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.artifact import load_policy
from contraflow.training.run import Run, resume
from contraflow.training.sources import Conditions, Dataset

pytestmark = pytest.mark.usefixtures("allow_rank_promotion")
MINE = "tests.envs.test_envs_align"
FLOW = FlowSpec(network=ResidualMLP(8, 1, 8), solver=Ddim(2))
RATES = {"eval_every": 64, "log_every": 32, "eval_episodes": 16, "trackers": ()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a flow that saw the data of the plane a few times."""
    folder = tmp_path_factory.mktemp("model")
    assert cli("data", "make", "align:mixture2d", "--out", folder / "data.npz")[0] == 0
    train(Run(BC(FLOW), Dataset(str(folder / "data.npz")), steps=3, **RATES), folder / "run", quiet=True)
    return folder / "run"


def run_of(model: Path, *reward: str, **changes) -> Run:
    source = Conditions("align:mixture2d", reward, prompts=2, group=8)
    return replace(Run(NFT(), source, steps=96, pretrained=str(model), **RATES), **changes)


def learned(folder: Path) -> list[np.ndarray]:
    policy, _, _ = load_policy(folder / "policy")
    return [np.asarray(x) for x in jax.tree.leaves(policy)]


def gap(one: Path, other: Path) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(learned(one), learned(other), strict=True))


@pytest.mark.parametrize("name", ["right", f"{MINE}:first_of_arrays"])
def test_a_resumed_run_is_the_uninterrupted_one(name: str, model: Path, tmp_path: Path):
    """Bitwise: inside one compiled loop, and with a reward in another process between two compiled parts."""
    train(run_of(model, name), tmp_path / "whole", trust="tests", quiet=True)
    train(run_of(model, name, steps=32), tmp_path / "parts", trust="tests", quiet=True)
    resume(tmp_path / "parts", steps=96, trust="tests", quiet=True)
    assert gap(tmp_path / "whole", tmp_path / "parts") == 0.0
    assert gap(tmp_path / "whole", model) > 1e-4


def test_a_run_with_a_reward_beside_is_that_with_the_reward_in_jax(model: Path, tmp_path: Path):
    """Two programs in place of one: the same up to the last digits of float32."""
    trains = lambda name: train(run_of(model, f"{MINE}:{name}"), tmp_path / name, trust="tests", quiet=True)
    inside, beside = trains("first"), trains("first_of_arrays")
    np.testing.assert_allclose(inside.returns, beside.returns, rtol=1e-4, atol=1e-5)
    assert gap(tmp_path / "first", tmp_path / "first_of_arrays") < 1e-4


def test_several_rewards_are_weighted_and_logged_one_by_one(model: Path, tmp_path: Path):
    source = Conditions("align:mixture2d", ("right", f"{MINE}:first"), (1.0, -1.0), prompts=2, group=8)
    run = replace(run_of(model), source=source)
    result = train(run, tmp_path / "run", trust="tests", quiet=True)
    np.testing.assert_allclose(result.returns, 0.0, atol=1e-6)  # the second is the first
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "reward_0" in row]
    assert rows and all(row["reward_0"] == row["reward_1"] != 0.0 for row in rows)


@pytest.mark.slow
def test_seeds_with_a_reward_beside_are_trained_one_after_the_other(model: Path, tmp_path: Path):
    run = run_of(model, f"{MINE}:first_of_arrays", steps=32)
    results = train_seeds(run, [0, 1], tmp_path / "seeds", trust="tests", quiet=True)
    assert [result.steps for result in results] == [32, 32]
    assert gap(tmp_path / "seeds" / "seed0", tmp_path / "seeds" / "seed1") > 0.0


class Gradient(NFT):
    """A method that needs the gradient of the reward."""

    def update(self, state, scored, key):
        if scored.score is None:
            raise UserError("this method needs the gradient of the reward: give it one in JAX")
        x, cond = jnp.zeros(2), scored.cond[0]
        return super().update(state, scored, key)[0], {"slope": jax.grad(scored.score)(x, cond)[0]}


def test_only_rewards_in_jax_have_a_gradient(model: Path, tmp_path: Path):
    run = run_of(model, "right", f"{MINE}:first", agent=Gradient(), steps=16)
    train(run, tmp_path / "inside", trust="tests", quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "inside" / "metrics.jsonl").read_text().splitlines()]
    assert next(row["slope"] for row in rows if "slope" in row) == pytest.approx(4.0)
    with pytest.raises(UserError, match="needs the gradient"):
        train(
            run_of(model, "right", f"{MINE}:says_host", agent=Gradient(), steps=16),
            tmp_path / "beside",
            trust="tests",
            quiet=True,
        )


def test_a_failing_reward_leaves_no_run(model: Path, tmp_path: Path):
    with pytest.raises(UserError, match="index 99"):
        train(run_of(model, f"{MINE}:broken"), tmp_path / "run", trust="tests", quiet=True)
    assert not (tmp_path / "run").exists()


# the command


TINY = ["--steps", "32", "--eval-every", "32", "--eval-episodes", "8", "--trackers", "--quiet"]


def test_align_without_anything_lists_the_methods():
    code, out, err = cli("align")
    assert code == 0 and err == "" and "  nft " in out and "  flow-grpo " in out and "  bc " not in out
    assert "mixture2d" in out and cli("align", "--help")[1] == out
    code, out, _ = cli("align", "nft", "--help")
    assert code == 0 and "--model DIR stands for --pretrained" in out and "--reward" in out


def test_from_nothing_to_an_aligned_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    small = ["--agent.flow.network.width", "8", "--agent.flow.network.depth", "1"]
    code, out, err = cli("align", "pretrain", "mixture2d", "--out", "base", *TINY, *small)
    assert code == 0 and err == "" and "align nft --model base" in out, err
    assert {"base", "base-data.npz"} <= set(os.listdir()) and (tmp_path / "base" / "samples.png").stat().st_size > 1000
    for model, reward in (
        ("--model=base", "--reward=pair"),
        ("--model base", "--problem mixture2d --reward pair right"),
    ):
        code, out, err = cli("align", "nft", *model.split(), *reward.split(), "--out", "run", "--group=8", *TINY)
        assert code == 0 and err == "", err
        assert "before " in out and "judge approves" in out and (tmp_path / "run" / "before_after.png").exists()
        settings = json.loads(Path("run/config.json").read_text())["run"]
        assert settings["pretrained"] == "base" and settings["source"]["env"] == "align:mixture2d"
        assert settings["source"]["reward"] == reward.split("reward")[1].strip("= ").split()
        assert cli("resume", "run")[0] == 0
        Path("run").rename(f"run-{len(reward)}")
    missed = cli("align", "nft", "--model", "base", "--out", "low", "--require", "99", *TINY)
    assert missed[0] == 1 and "below the bar of 99" in missed[1]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("nft", ["--model DIR", "align pretrain"]),
        ("--model x", ["the method comes first"]),
        ("fql --model x", ["fql learns from a dataset", "contraflow train fql", "nft"]),
        ("nft --model nowhere", ["nowhere", "holds no policy"]),
        ("nft --model MODEL --problem digit", ["unknown environment align:digit", "align:digits"]),
        ("nft --model MODEL --problem digits", ["was trained for"]),
        ("nft --model MODEL --reward rigth", ["did you mean 'right'"]),
        ("nft --model MODEL --reward mine:r", ["--trust mine"]),
        ("nft --model MODEL --reward right pair --weights 1", ["--weights needs a number for each reward"]),
        ("nft --model MODEL --rewards right", ["no flag --rewards", "--reward"]),
        ("pretrain nothing --out x", ["unknown environment align:nothing"]),
        ("pretrain mixture2d", ["--out DIR"]),
        ("pretrain --out x", ["the problem comes first"]),
    ],
)
def test_mistakes_are_said_in_a_line(args: str, words: list[str], model: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(["align", *args.replace("MODEL", str(model)).split()], *words)


def alive(group: int) -> Iterator[str]:
    """Processes of a group that have not ended."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            state, _, of_group, *_ = file.read_text().rpartition(")")[2].split()
            if int(of_group) == group and state not in "ZX":
                yield file.parent.name


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_ctrl_c_saves_a_run_and_ends_the_process_of_its_reward(model: Path, tmp_path: Path):
    """The signal goes to all processes of the terminal; the one of the reward ignores it and ends with the run."""
    flags = ["--model", model, "--reward", f"{MINE}:first_of_arrays", "--trust", "tests", "--prompts", "2"]
    command = [*COMMAND, "align", "nft", *flags, "--group", "8", "--steps", "1e8", "--log-every", "16", "--out", "run"]
    process = subprocess.Popen(
        [*map(str, command), "--quiet"], cwd=tmp_path, env=ENVIRON, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    end = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < end and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, 2)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "contraflow resume run" in out, err
    left = list(alive(process.pid))
    for _ in range(50):
        if left:
            time.sleep(0.1)
            left = list(alive(process.pid))
    assert not left
