"""The command line, command by command. What goes wrong is in test_bad_input.py."""

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import contraflow
from contraflow import RFM, SIR, EnvSpec, Run, Step, load, train
from contraflow.agents import AGENTS
from contraflow.cli import COMMANDS
from contraflow.cli import evaluate as command
from contraflow.cli.settings import as_run, parse_train
from contraflow.cli.train import default_folder
from contraflow.envs import make
from contraflow.flow.path import Cosine
from contraflow.flow.posterior import Fixed, MinVariance, Reverse
from contraflow.flow.proposal import Mixture, Noise
from contraflow.flow.solve import Heun
from contraflow.presets import PRESETS
from contraflow.rl.select import Argmax, First
from contraflow.rl.temperature import Anneal
from contraflow.train import checkpoint
from contraflow.train.artifact import save_policy
from contraflow.train.evaluate import evaluate
from contraflow.train.run import read_config, write_config
from tests.cli_helpers import FLAGS, ROOT, TINY, Guess, cli, in_subprocess

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
assert isinstance(ESTIMATOR, Reverse)


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        ("--steps 7000 --seed 3 --num-envs 4", replace(BASE, steps=7000, seed=3, num_envs=4)),
        ("--trackers wandb tensorboard", replace(BASE, trackers=("wandb", "tensorboard"))),
        ("--trackers", replace(BASE, trackers=())),
        ("--agent.gamma .98 --agent.width 8", replace(AGENT, gamma=0.98, width=8)),
        ("--agent.condition-on-temperature", replace(AGENT, condition_on_temperature=True)),
        ("--agent.max-grad-norm None", replace(AGENT, max_grad_norm=None)),
        ("--agent.endpoint buffer", replace(AGENT, endpoint="buffer")),
        ("--agent.estimator.samples 64", replace(AGENT, estimator=replace(ESTIMATOR, samples=64))),
        ("--agent.exploit.particles 4", replace(AGENT, exploit=Argmax(4))),
        ("agent.solver:heun --agent.solver.steps 5", replace(AGENT, solver=Heun(5))),
        ("--agent.solver.steps 5 agent.solver:heun", replace(AGENT, solver=Heun(5))),
        ("agent.path:cosine agent.exploit:first", replace(AGENT, path=Cosine(), exploit=First())),
        (
            "agent.estimator.control:min-variance --agent.gamma 0.5 --agent.estimator.control.clip 1",
            replace(AGENT, gamma=0.5, estimator=replace(ESTIMATOR, control=MinVariance(clip=1.0))),
        ),
        (
            "--agent.estimator.samples 9 agent.estimator.proposal:noise agent.estimator:reverse",
            replace(AGENT, estimator=replace(ESTIMATOR, samples=9, proposal=Noise())),
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
    assert parsed("--agent.target-entropy", "-2.5", preset="sac").agent == replace(PRESETS["sac"].agent, target_entropy=-2.5)


def shares(t):
    return [1 - t, t]


def test_a_function_is_named_by_module():
    flags = ["agent.estimator.proposal:mixture", "--agent.estimator.proposal.shares", "tests.test_cli:shares"]
    agent = parsed(*flags, "--trust").agent
    assert isinstance(agent, RFM) and isinstance(agent.estimator, Reverse)
    mixture = agent.estimator.proposal
    assert isinstance(mixture, Mixture) and getattr(mixture.shares, "__name__", "") == "shares"
    code, _, err = cli("train", "rfm", *flags)
    assert code == 2 and "--trust" in err


def test_a_preset_may_be_a_run_folder_or_a_file(tmp_path: Path):
    run = replace(TINY, agent=RFM(gamma=0.5, solver=Heun(3)))
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
    assert folder("sac", "--env", "gym:dm_control/cheetah-run-v0", "--seed", "4") == "runs/sac-dm_control-cheetah-run-v0-seed4"
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
    flags = [f"--agent.{n.replace('_', '-')}" for n in scalars if n != "behaviour"]
    flags += [f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(Run) if f.name != "agent"]
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


# a run from start to end

SMALL = ["train", "sir", *FLAGS]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    code, out, err = cli(*SMALL, "--out", folder)
    assert code == 0 and err == "", err
    assert re.search(r"trained to step 40 in \d+ min \d+ s", out)
    assert re.search(r"greedy policy, 10 episodes +mean +-?\d+\.\d +std", out)
    assert f"policy  {folder / 'policy'}\ncurve   {folder / 'curve.png'}\n" in out
    assert (folder / "curve.png").exists() and load(folder)(np.zeros(1)).shape == (1,)
    assert read_config(folder) == replace(TINY, agent=replace(TINY.agent, width=8, depth=1))
    return folder


def returns(folder: Path) -> list[str]:
    with (folder / "eval.csv").open() as file:
        return [row["return_mean"] for row in csv.DictReader(file)]


def test_a_rerun_from_the_folder_repeats_the_run(trained: Path, tmp_path: Path):
    code, _, _ = cli("train", trained, "--out", tmp_path / "again", "--quiet")
    assert code == 0 and returns(tmp_path / "again") == returns(trained)


def test_a_script_does_the_same(trained: Path, tmp_path: Path):
    train(read_config(trained), tmp_path, quiet=True)
    assert returns(tmp_path) == returns(trained)


def test_eval(trained: Path):
    code, out, _ = cli("eval", trained, "--episodes", "3", "--seed", "5")
    assert code == 0 and out.startswith("probe:obs-action, 3 episodes, seed 5\n")
    numbers = [float(x) for x in re.findall(r"-?\d+\.\d+", out)]
    policy = load(trained)
    with command.environment(policy, policy.env, 3, 5) as env:
        wanted = command.evaluate(policy.agent, policy.state, env, jax.random.key(5), 3)
    assert np.allclose(numbers, [wanted.mean(), wanted.std(), wanted.min(), wanted.max()], atol=0.051)
    assert cli("eval", trained / "policy", "--episodes", "3", "--seed", "5")[1] == out
    assert cli("eval", trained, "--episodes", "3", "--seed", "6")[1] != out
    assert cli("eval", trained, "--env", "probe:obs", "--episodes", "2")[1].startswith("probe:obs, 2 episodes")


def test_resume_on_a_finished_run_says_so(trained: Path):
    before = returns(trained)
    code, out, _ = cli("resume", trained, "--quiet")
    assert code == 0 and "is finished: 40 steps" in out and "--steps" in out
    assert returns(trained) == before


def test_resume_extends(tmp_path: Path):
    assert cli("train", "tests.cli_helpers:Guess", "--trust", *FLAGS[:-5], "--quiet", "--out", tmp_path)[0] == 0
    code, out, _ = cli("resume", tmp_path, "--steps", "60", "--trust", "--quiet")
    assert code == 0 and "trained to step 60" in out
    assert len(returns(tmp_path)) == 3 and read_config(tmp_path, True).steps == 60


def test_resume_starts_again_without_a_checkpoint(tmp_path: Path):
    write_config(replace(TINY, agent=Guess()), tmp_path)
    code, out, _ = cli("resume", tmp_path, "--trust", "--quiet")
    assert code == 0 and "trained to step 40" in out


def test_require(tmp_path: Path):
    """Every action of the probe `constant` is worth 1: met at 1, missed at 1.5; one line says so."""
    flags = ["--trust", *FLAGS[2:-5], "--quiet", "--env", "probe:constant"]
    start = ["train", "tests.cli_helpers:Guess", *flags]
    assert cli(*start, "--require", "1", "--out", tmp_path / "a")[0] == 0
    code, out, err = cli(*start, "--require", "1.5", "--out", tmp_path / "b")
    assert code == 1 and out.splitlines()[-1] == "the mean return 1.0 is below the required 1.5" and err == ""


def test_the_flow_is_compared_with_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """RFM: one particle instead of the best of many, and uniform actions ranked by the same critic."""
    agent = RFM(width=8, depth=1)
    env = make("probe:action")
    state = agent.init(jax.random.key(0), env.spec)
    save_policy(tmp_path / "policy", agent, env.spec, "probe:action", state)
    seen = []

    def evaluated(agent, state, env, key, episodes):
        seen.append((agent, state, jax.random.key_data(key).tolist(), env.spec.num_envs))
        return evaluate(agent, state, env, key, episodes)

    monkeypatch.setattr(command, "evaluate", evaluated)
    table = command.final_returns(tmp_path, False)
    assert list(table) == [
        "greedy policy, 10 episodes", "the same with one particle", "32 uniform actions in place of the actor",
    ]  # fmt: skip
    assert all(r.shape == (10,) for r in table.values())
    agents = [agent for agent, *_ in seen]
    assert agents[0] == agent and agents[1] == replace(agent, exploit=First())
    assert isinstance(agents[2], SIR) and agents[2].exploit == Argmax(32) and agents[2].base == 1
    leaves = [jax.tree.leaves(state.critic) for _, state, *_ in seen]
    assert all(np.array_equal(a, b) for other in leaves[1:] for a, b in zip(leaves[0], other, strict=True))
    assert len({(str(key), n) for *_, key, n in seen}) == 1, "the same episodes for all"


@pytest.mark.slow
def test_a_flow_from_start_to_end(tmp_path: Path):
    code, out, err = cli("train", "rfm", *FLAGS, "--out", tmp_path, "agent.solver:heun", "--agent.estimator.samples", "4")
    assert code == 0 and err == ""
    assert [line.split("mean")[0].strip() for line in out.splitlines() if " mean " in line] == [
        "greedy policy, 10 episodes", "the same with one particle", "32 uniform actions in place of the actor",
    ]  # fmt: skip


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


def test_a_film_of_one_episode(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import imageio.v2 as imageio

    screen = Screen()
    made = []

    def fake(id, num_envs, seed, trust=False, render=False):
        made.append((id, num_envs, seed, render))
        return screen if render else make("probe:obs-action", num_envs, seed)

    monkeypatch.setattr(command, "make", fake)
    video = tmp_path / "deep" / "film.mp4"
    code, out, err = cli("eval", trained, "--episodes", "2", "--video", video, "--seed", "3", "--fps", "20")
    assert code == 0, err
    assert str(video) in out and made[0] == ("probe:obs-action", 1, 3, True) and screen.closed
    frames = [float(frame.mean()) for frame in imageio.get_reader(video)]
    assert np.allclose(frames, [10, 50, 90, 130], atol=4), "one picture per step, none of the next episode"


@pytest.mark.slow
def test_a_film_through_egl(tmp_path: Path):
    import imageio.v2 as imageio

    env = make("envpool:CartpoleSwingup-v1")
    agent = Guess()
    state = agent.init(jax.random.key(0), env.spec)
    save_policy(tmp_path / "policy", agent, env.spec, "envpool:CartpoleSwingup-v1", state)
    code = "import sys; from contraflow.cli import main; sys.exit(main(sys.argv[1:]))"
    done = in_subprocess(code, "eval", tmp_path, "--episodes", 1, "--video", tmp_path / "film.mp4", "--trust")
    assert done.returncode == 0, done.stderr
    frames = [np.asarray(frame) for frame in imageio.get_reader(tmp_path / "film.mp4")]
    assert len(frames) == 1000 and frames[0].shape == (480, 480, 3) and frames[0].std() > 10
    assert np.abs(frames[0].astype(int) - frames[-1]).mean() > 0.1, "something moved"


# processes


MAIN = [sys.executable, "-m", "contraflow"]
ENVIRON = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}


def test_interrupt_saves_and_says_how_to_go_on(tmp_path: Path):
    args = ["train", "tests.cli_helpers:Guess", "--trust", *FLAGS[2:-5], "--steps", "1000000", "--env", "tests.cli_helpers:pointer"]
    process = subprocess.Popen(
        [*MAIN, *args, "--out", "a run"], cwd=tmp_path, env=ENVIRON, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    folder, deadline = tmp_path / "a run", time.monotonic() + 240
    while not (folder / "eval.csv").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 130 and "Traceback" not in err
    (step,) = re.findall(r"interrupted at step ([\d,]+); the run is saved: contraflow resume 'a run'\n", out)
    step = int(step.replace(",", ""))
    assert checkpoint.latest(folder) == step > 20
    code, out, _ = cli("resume", folder, "--trust", "--quiet", "--steps", "1000000", "--help")
    assert code == 0
    write_config(replace(read_config(folder, True), steps=step + 20), folder)
    code, out, _ = cli("resume", folder, "--trust", "--quiet")
    assert code == 0 and re.search(r"trained to step", out)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seen = [(row["step"], "episodes" in row) for row in rows]
    assert len(seen) == len(set(seen)) and [s for s, _ in seen] == sorted(s for s, _ in seen)


def test_modules_in_the_current_folder_are_found(tmp_path: Path):
    """As an installed script: the folder of the script, not the current one, is on the path."""
    (tmp_path / "mine.py").write_text("from tests.cli_helpers import Guess as Base\n\nclass Mine(Base):\n    pass\n")
    script = tmp_path / "bin" / "contraflow"
    script.parent.mkdir()
    script.write_text("import sys\nfrom contraflow.__main__ import main\nsys.exit(main())\n")
    args = ["train", "mine:Mine", "--help"]
    done = subprocess.run([sys.executable, script, *args], cwd=tmp_path, env=ENVIRON, capture_output=True, text=True)
    assert done.returncode == 2 and "--trust" in done.stderr and len(done.stderr.splitlines()) == 1
    done = subprocess.run(
        [sys.executable, script, *args, "--trust"], cwd=tmp_path, env=ENVIRON, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--agent.rate" in done.stdout


def test_help_does_not_load_what_it_does_not_need():
    code = "import sys; from contraflow.cli import main; main(['--help']); main(['list', 'presets']); print(sorted(sys.modules))"
    done = in_subprocess(code)
    heavy = [name for name in ("orbax", "tensorboardX", "matplotlib", "envpool", "gymnasium", "mujoco") if f"'{name}'" in done.stdout]
    assert done.returncode == 0 and heavy == []
