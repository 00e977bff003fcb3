"""The commands from start to end: training, resuming, evaluating, filming; in this process and in their own."""

import csv
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.cli_helpers import COMMAND, ENVIRON, FLAGS, TINY, Constant, Guess, cli, in_subprocess

from contraflow import RFM, EnvSpec, Step, load, train
from contraflow.cli import evaluate as command
from contraflow.envs import make
from contraflow.policy.artifact import save_policy
from contraflow.rl.critics import Critics
from contraflow.training import checkpoint
from contraflow.training.evaluate import Episodes, evaluate, margin
from contraflow.training.log import read_evaluations
from contraflow.training.run import read_config, write_config

# a run from start to end

SMALL = ["train", "sir", *FLAGS]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    code, out, err = cli(*SMALL, "--out", folder)
    assert code == 0 and err == "", err
    assert re.search(r"trained to step 40 in \d+ min \d+ s", out)
    assert re.search(r"best policy, greedy, 10 episodes +mean +-?\d+\.\d \+- \d+\.\d \(95 %\)  std.*min", out)
    step = max(read_evaluations(folder), key=lambda row: row["return_mean"])["step"]
    best = f"best policy  {folder / 'best'}, from step {int(step)}"
    assert f"{best}\nlast policy  {folder / 'policy'}\ncurve        {folder / 'curve.png'}\n" in out
    assert (folder / "curve.png").exists() and load(folder)(np.zeros(1)).shape == (1,)
    assert read_config(folder) == TINY
    return folder


def returns(folder: Path) -> list[str]:
    with (folder / "eval.csv").open() as file:
        return [row["return_mean"] for row in csv.DictReader(file)]


@pytest.mark.slow
def test_a_rerun_from_the_folder_repeats_the_run(trained: Path, tmp_path: Path):
    code, _, _ = cli("train", trained, "--out", tmp_path / "again", "--quiet")
    assert code == 0 and returns(tmp_path / "again") == returns(trained)


@pytest.mark.slow
def test_a_script_does_the_same(trained: Path, tmp_path: Path):
    train(read_config(trained), tmp_path, quiet=True)
    assert returns(tmp_path) == returns(trained)


def test_eval(trained: Path):
    code, out, _ = cli("eval", trained, "--episodes", "3", "--seed", "5")
    assert code == 0 and out.startswith("probe:obs-action, 3 episodes, seed 5\n")
    numbers = [float(x) for x in re.findall(r"-?\d+\.\d+", out)]
    policy = load(trained)
    with command.environment(policy, policy.env, 3, 5) as env:
        wanted = evaluate(policy.network, env, jax.random.key(5), 3)
    told = [wanted.mean(), margin(wanted), wanted.std(), wanted.min(), wanted.max()]
    assert np.allclose(numbers, told, atol=0.051)
    assert "(95 %)" in out and "(95 %)" not in cli("eval", trained, "--episodes", "1")[1], "one episode has none"
    assert cli("eval", trained / "policy", "--episodes", "3", "--seed", "5")[1] == out
    assert cli("eval", trained, "--episodes", "3", "--seed", "6")[1] != out
    assert cli("eval", trained, "--env", "probe:obs", "--episodes", "2")[1].startswith("probe:obs, 2 episodes")
    noted = cli("eval", trained, "--env", "tests.cli_helpers:far", "--trust", "all", "--episodes", "2")[1]
    assert noted.startswith("note: observations of Far reach 1e+09"), noted


def test_resume_on_a_finished_run_says_so(trained: Path):
    before = returns(trained)
    code, out, _ = cli("resume", trained, "--quiet")
    assert code == 0 and "is finished: 40 steps" in out and "--steps" in out
    assert returns(trained) == before


@pytest.mark.slow
def test_resume_extends(tmp_path: Path):
    assert cli("train", "tests.cli_helpers:Guess", "--trust", "all", *FLAGS[:-5], "--quiet", "--out", tmp_path)[0] == 0
    code, out, _ = cli("resume", tmp_path, "--steps", "60", "--trust", "all", "--quiet")
    assert code == 0 and "trained to step 60" in out
    assert len(returns(tmp_path)) == 3 and read_config(tmp_path, "all").steps == 60


def test_resume_starts_again_without_a_checkpoint(tmp_path: Path):
    write_config(replace(TINY, agent=Guess()), tmp_path)
    code, out, _ = cli("resume", tmp_path, "--trust", "all", "--quiet")
    assert code == 0 and "trained to step 40" in out


def test_require(tmp_path: Path):
    """Every action of the probe `constant` is worth 1: met at 1, missed at 1.5; one line says so."""
    flags = ["--trust", "all", *FLAGS[2:-5], "--quiet", "--env", "probe:constant"]
    start = ["train", "tests.cli_helpers:Guess", *flags]
    assert cli(*start, "--require", "1", "--out", tmp_path / "a")[0] == 0
    code, out, err = cli(*start, "--require", "1.5", "--out", tmp_path / "b")
    said = "1.0 is below the bar of 1.5; random actions score 1.0, no action 1.0"
    assert code == 1 and out.splitlines()[-2] == said and err == ""


def test_the_flow_is_compared_with_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """RFM: one particle instead of the best of many, and uniform actions ranked by the same critic."""
    agent = replace(RFM(), critic=Critics(width=8, depth=1))
    env = make("probe:action")
    states = [agent.init(jax.random.key(seed), env.spec) for seed in (0, 1)]
    for name, state in zip(("best", "policy"), states, strict=True):
        save_policy(tmp_path / name, agent.policy(state), env.spec, "probe:action")
    seen = []

    def evaluated(policy, env, key, episodes):
        seen.append((policy, jax.random.key_data(key).tolist(), env.spec.num_envs))
        return Episodes(np.zeros(episodes))

    monkeypatch.setattr(command, "evaluate_one", evaluated)
    table = command.final_returns(tmp_path, "")
    assert len(table) == 6 and next(iter(table)) == "best policy, greedy, 10 episodes"
    assert list(table)[-3:] == ["last policy, greedy", "random actions", "no action (zeros)"]
    assert all(r.returns.shape == (10,) for r in table.values())
    assert len({(str(key), n) for _, key, n in seen}) == 1, "the same episodes for all"
    leaves = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(policy)]) for policy, *_ in seen]
    assert leaves[0].shape == leaves[-3].shape and not np.array_equal(leaves[0], leaves[-3])
    assert leaves[-4].size < leaves[0].size, "no actor is left"
    assert not leaves[-1].any() and leaves[-1].shape == (env.spec.action_dim,), "no action"


@pytest.mark.slow
def test_a_flow_from_start_to_end(tmp_path: Path):
    flags = ["agent.flow.solver:heun", "--agent.target.estimator.samples", "4"]
    code, out, err = cli("train", "rfm", *FLAGS, "--out", tmp_path / "run", *flags)
    assert code == 0 and err == "" and out.count(" mean ") == 4


@pytest.mark.slow
def test_without_an_environment_there_is_no_evaluation(tmp_path: Path):
    """Data alone are enough: what is printed then names the policy, and the exit code is 0."""
    rows, end = np.linspace(-1, 1, 40, dtype=np.float32)[:, None], np.arange(40) % 10 == 9
    np.savez(
        tmp_path / "data.npz", observations=rows, actions=0.5 * rows, rewards=rows[:, 0], terminals=end & False,
        timeouts=end,
    )  # fmt: skip
    out = tmp_path / "run"
    flags = ["--steps", "20", "--eval-every", "10", "--log-every", "10", "--batch-size", "8", "--trackers"]
    code, text, err = cli("train", "bc", "--data", tmp_path / "data.npz", *flags, "--out", out)
    assert code == 0 and err == "", err
    assert text.startswith(f"BC on {tmp_path / 'data.npz'}, 20 steps, seed 0, in {out}\n")
    assert "note: " in text and "no action bounds are stated" in text
    assert f"no environment to evaluate in: `contraflow eval {out} --env ID`" in text
    assert load(out)(np.zeros(1)).shape == (1,)
    code, text, err = cli("resume", out, "--steps", "30", "--quiet")
    assert code == 0 and "trained to step 30" in text


# films


class Screen:
    """An environment of two steps whose pictures show the step: 10, 20, ... on all pixels."""

    spec = EnvSpec(1, 1, 1, 100, False)

    def __init__(self):
        self.age, self.closed = 0, False

    def reset(self, key):
        return None, np.zeros((1, 1), np.float32)

    def step(self, state, action):
        self.age += 1
        obs, false = np.zeros((1, 1), np.float32), np.zeros(1, bool)
        return None, Step(obs, obs, np.zeros(1, np.float32), np.array([self.age == 4]), false, ~false)

    def frame(self):
        return np.full((64, 64, 3), 10 + 40 * self.age, np.uint8)

    def close(self):
        self.closed = True


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # imageio's reader leaves pipes open
def test_a_film_of_one_episode(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import imageio.v2 as imageio

    screen = Screen()
    made = []

    def fake(id, num_envs, seed, trust="", render=False):
        made.append((id, num_envs, seed, render))
        return screen if render else make("probe:obs-action", num_envs, seed)

    monkeypatch.setattr("contraflow.runtime.variants.make", fake)
    video = tmp_path / "deep" / "film.mp4"
    code, out, err = cli("eval", trained, "--episodes", "2", "--video", video, "--seed", "3", "--fps", "20")
    assert code == 0, err
    assert str(video) in out and made[0] == ("probe:obs-action", 1, 3, True) and screen.closed
    with imageio.get_reader(video) as reader:
        frames = [float(reader.get_data(i).mean()) for i in range(reader.count_frames())]  # pyright: ignore
    assert np.allclose(frames, [10, 50, 90, 130], atol=4), "one picture per step, none of the next episode"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # imageio's reader leaves pipes open
def test_a_film_through_egl(tmp_path: Path):
    import imageio.v2 as imageio

    env = make("envpool:CartpoleSwingup-v1")
    save_policy(tmp_path / "policy", Constant(jnp.zeros(1)), env.spec, "envpool:CartpoleSwingup-v1")
    code = "import sys; from contraflow.cli import main; sys.exit(main(sys.argv[1:]))"
    done = in_subprocess(code, "eval", tmp_path, "--episodes", 1, "--video", tmp_path / "film.mp4", "--trust", "all")
    assert done.returncode == 0, done.stderr
    with imageio.get_reader(tmp_path / "film.mp4") as reader:
        count = reader.count_frames()  # pyright: ignore
        frames = [np.asarray(reader.get_data(i)) for i in (0, count - 1)]
    assert count == 1000 and frames[0].shape == (480, 480, 3) and frames[0].std() > 10
    assert np.abs(frames[0].astype(int) - frames[-1]).mean() > 0.1, "something moved"


# processes


def test_interrupt_saves_and_says_how_to_go_on(tmp_path: Path):
    args = [
        "train",
        "tests.cli_helpers:Guess",
        "--trust",
        "tests.cli_helpers",
        *FLAGS[2:-5],
        "--steps",
        "1000000",
        "--env",
        "tests.cli_helpers:pointer",
    ]
    process = subprocess.Popen(
        [*COMMAND, *args, "--out", "a run"],
        cwd=tmp_path,
        env=ENVIRON,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    folder, deadline = tmp_path / "a run", time.monotonic() + 240
    while not (folder / "eval.csv").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 130 and err == "interrupt noted; saving after this step (again to stop at once)\n"
    (step,) = re.findall(r"interrupted at step ([\d,]+); the run is saved: contraflow resume 'a run'\n", out)
    step = int(step.replace(",", ""))
    assert checkpoint.latest(folder) == step >= 20
    code, out, _ = cli("resume", folder, "--trust", "all", "--quiet", "--steps", "1000000", "--help")
    assert code == 0
    write_config(replace(read_config(folder, "all"), steps=step + 20), folder)
    code, out, _ = cli("resume", folder, "--trust", "all", "--quiet")
    assert code == 0 and re.search(r"trained to step", out)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seen = [(row["step"], "episodes" in row) for row in rows]
    assert len(seen) == len(set(seen)) and [s for s, _ in seen] == sorted(s for s, _ in seen)


@pytest.mark.parametrize(
    ("number", "delay"),
    [
        *((signal.SIGINT, delay) for delay in (0.3, 1.0, 6.0)),
        pytest.param(signal.SIGINT, 3.0, marks=pytest.mark.slow),
        (signal.SIGTERM, 3.0),
    ],
)
def test_an_interrupt_before_training_ends_the_command(number: signal.Signals, delay: float, tmp_path: Path):
    """During imports, set-up or compilation: one line, no crash of the interpreter, nothing to save."""
    args = ["train", "sac", "--env", "jax:pendulum", "--trackers", "--out", tmp_path / "run"]
    process = subprocess.Popen(
        [*COMMAND, *args], cwd=tmp_path, env=ENVIRON, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    time.sleep(delay)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)  # the run itself would take longer
    begun = "interrupt noted; saving after this step (again to stop at once)\n"  # on a fast machine, after 6 s
    assert process.returncode == 130 and err in ("contraflow: interrupted\n", "", begun), err


SLOW = """
import os, sys, threading, time
from contraflow.core.interrupt import guard, noted

with guard(), noted() as notice:
    notice.started = True
    print("ready", flush=True)
    while not notice:
        time.sleep(0.01)
    print("saving", flush=True)
    time.sleep(60)
"""


def test_a_second_interrupt_ends_a_command_at_once():
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW], env=ENVIRON, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == "interrupt noted; saving after this step (again to stop at once)\ncontraflow: interrupted\n"


def test_modules_in_the_current_folder_are_found(tmp_path: Path):
    """As an installed script: the folder of the script, not the current one, is on the path."""
    (tmp_path / "mine.py").write_text("from tests.cli_helpers import Guess as Base\n\nclass Mine(Base):\n    pass\n")
    script = tmp_path / "bin" / "contraflow"
    script.parent.mkdir()
    script.write_text("import sys\nfrom contraflow.__main__ import main\nsys.exit(main())\n")
    args = ["train", "mine:Mine", "--help"]
    done = subprocess.run([sys.executable, script, *args], cwd=tmp_path, env=ENVIRON, capture_output=True, text=True)
    assert done.returncode == 2 and "--trust mine" in done.stderr and len(done.stderr.splitlines()) == 1
    done = subprocess.run(
        [sys.executable, script, *args, "--trust", "mine"], cwd=tmp_path, env=ENVIRON, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--agent.rate" in done.stdout


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import contraflow", ["jax", "numpy", "tyro"]),
        ("from contraflow.cli import main; main(['--help']); main(['--version'])", ["jax", "numpy", "tyro"]),
        (
            "from contraflow.cli import main; main(['list', 'presets'])",
            ["orbax", "tensorboardX", "matplotlib", "envpool", "gymnasium", "mujoco"],
        ),
    ],
)
def test_nothing_is_loaded_that_is_not_needed(code: str, heavy: list[str]):
    done = in_subprocess(f"import sys; {code}; print(sorted(sys.modules))")
    assert done.returncode == 0 and [name for name in heavy if f"'{name}'" in done.stdout] == []


def test_names_of_the_package():
    """All that it promises is there, and its parts can be imported beside the function `train`."""
    code = "import contraflow, contraflow.training.run as run; from contraflow import *; "
    code += "assert contraflow.train is run.train is train; print([hasattr(contraflow, n) for n in contraflow.__all__])"
    done = in_subprocess(code)
    assert done.returncode == 0 and "False" not in done.stdout, done.stderr
