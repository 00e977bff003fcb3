"""Whole runs on observations with an image: train, checkpoint, resume, evaluate, record, load and act; and learning
what only the image tells."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import jax
import jax.random as jr
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tests.cli_helpers import assert_refused, cli
from tests.contract.cases import TABLE
from tests.nets.test_encoder import with_pixels
from tests.train.pixel_helpers import PARTS, Dark, Spot, Wrong

from contraflow.agents.online.sac import SAC
from contraflow.core.observation import Part
from contraflow.core.optim import Optim
from contraflow.core.types import UserError
from contraflow.data.datasets.inspect import problems, summary
from contraflow.data.datasets.readers import load as load_data
from contraflow.data.datasets.write import write
from contraflow.envs import make
from contraflow.envs.chunk import Chunked
from contraflow.envs.gymnasium import Gymnasium
from contraflow.nets.encoder import Pixels
from contraflow.nets.mlp import MLPSpec
from contraflow.policy import base
from contraflow.policy.uniform import uniform_policy
from contraflow.rl.critics import Critics
from contraflow.runtime.collect import record
from contraflow.runtime.policy import Policy, load
from contraflow.training import checkpoint
from contraflow.training.evaluate import evaluate
from contraflow.training.run import Run, resume, train
from contraflow.training.sources import Dataset, OfflineToOnline, Replay, Rollouts

ID = "tests.train.pixel_helpers:Spot"
SHORT: dict[str, Any] = {"eval_every": 40, "log_every": 40, "eval_episodes": 4, "trackers": ()}
REPLAY = Replay(ID, num_envs=4, collect=20, batch_size=8, buffer_size=64, random_shift=2)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """Thirty uniform actions."""
    spec = Spot(1).spec
    policy = Policy(uniform_policy(1), spec, ID)
    return write(record(policy, 30, trust="all"), tmp_path_factory.mktemp("data") / "spots.npz")


def run_of(name: str, data: Path) -> Run:
    agent = with_pixels(TABLE[name])
    if name == "ppo":
        return Run(agent, Rollouts(ID, num_envs=4, unroll=5), steps=80, **SHORT)
    source = Dataset(str(data), ID, batch_size=8, random_shift=2) if name in ("bc", "fql") else REPLAY
    return Run(agent, source, steps=80, **SHORT)


SLOW = ("rfm", "fql", "bc")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in ("rfm", "sac", "ppo", "bc", "fql")]
)
def test_a_run_from_start_to_use(name, recorded, tmp_path):
    """Resumed after half of its steps it ends as the uninterrupted one, bit by bit; its policy acts on dicts."""
    run = run_of(name, recorded)
    whole = train(run, tmp_path / "whole", trust="all", quiet=True)
    train(replace(run, steps=40), tmp_path / "half", trust="all", quiet=True)
    again = resume(tmp_path / "half", steps=80, trust="all", quiet=True)
    assert whole.steps == again.steps == 80 and np.isfinite(whole.returns).all()
    np.testing.assert_array_equal(whole.returns, again.returns)
    contents = [checkpoint._contents(tmp_path / place, 80)["arrays"] for place in ("whole", "half")]
    assert contents[0] == contents[1] and any(shape.startswith("float32[9, 7]") for shape in contents[0].values())
    if run.source is REPLAY:
        assert contents[0]["learner/buffer/rows/obs/image"] == "uint8[64, 16, 16, 1]"
    policies = [load(tmp_path / place, trust="all") for place in ("whole", "half")]
    rng = np.random.default_rng(0)
    obs = {"image": rng.integers(0, 256, (3, 16, 16, 1), np.uint8), "state": rng.standard_normal((3, 2))}
    one, other = (policy(obs) for policy in policies)
    np.testing.assert_array_equal(one, other)
    assert one.shape == (3, 1) and np.abs(one).max() <= 1
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    assert all(np.isfinite(v) for line in lines for v in json.loads(line).values() if isinstance(v, float))
    assert evaluate(policies[0].network, Spot(4), jr.key(0), 8).shape == (8,)
    if name == "sac":
        code, out, err = cli("eval", tmp_path / "whole", "--episodes", "4", "--trust", "all")
        assert code == 0 and "4 episodes" in out, err


def sac_policy(seed: int = 0) -> Policy:
    agent = with_pixels(TABLE["sac"])
    return Policy(agent.policy(agent.init(jr.key(0), Spot(1).spec)), Spot(1).spec, ID, seed)


def test_a_policy_takes_one_or_many_and_names_what_does_not_fit():
    obs = jax.tree.map(np.asarray, Spot(3).reset(jr.key(0))[1])
    many = sac_policy()(obs)
    first = sac_policy()(jax.tree.map(lambda x: x[0], obs))
    assert many.shape == (3, 1) and first.shape == (1,)
    np.testing.assert_allclose(first, many[0], atol=1e-6)
    listed = {"image": obs["image"][0], "state": obs["state"][0].tolist()}
    np.testing.assert_allclose(sac_policy()(listed), first, atol=1e-6)
    assert "image [16, 16, 1] uint8 + state [2] float32" in repr(sac_policy())
    for bad, words in (
        ({"image": obs["image"]}, "parts image where image, state are needed"),
        (obs["state"], "no parts"),
        (obs | {"state": obs["state"][:, :1]}, r"state of shape \(3, 1\)"),
        (obs | {"image": obs["image"] / 255.0}, "float32 where .* uint8"),
        (obs | {"image": {"left": obs["image"]}}, "object where .* uint8"),
        ({}, "image, state are needed"),
    ):
        with pytest.raises(UserError, match=f"^this policy takes image .*{words}"):
            sac_policy()(bad)


def test_a_cloned_flow_brings_its_encoder():
    """The agent that starts from it acts as it does."""
    bc, spec = with_pixels(TABLE["bc"]), Spot(1).spec
    cloned = bc.policy(bc.init(jr.key(1), spec))
    for name in ("reinflow", "dacer"):
        agent = with_pixels(TABLE[name]).starting_from(cloned)
        flow = agent.policy(agent.adopt(agent.init(jr.key(2), spec), cloned))
        found = jax.tree.leaves(base.inner(flow, "flow").encoder)
        for one, other in zip(found, jax.tree.leaves(cloned.flow.encoder), strict=True):
            np.testing.assert_array_equal(one, other)


def test_data_with_images_are_written_and_read(recorded, tmp_path):
    data = load_data(recorded)
    assert data.observation == PARTS and data.spec().observation == PARTS and data.env == ID
    assert data.obs["image"].dtype == np.uint8 and data.obs["image"].shape == (30, 16, 16, 1)
    assert ("observations", "image [16, 16, 1] uint8 + state [2] float32") in summary(data)
    assert "nothing terminates" not in " ".join(problems(data))
    changed = replace(data, obs=data.obs | {"image": 255 - data.obs["image"]})
    assert changed.digest() != data.digest() == load_data(recorded).digest()
    with pytest.raises(UserError, match=r"Minari.*\.npz"):
        write(data, tmp_path / "folder")
    with pytest.raises(UserError, match=r"image .* observations and 1 actions, other has 3 and 1"):
        data.check(replace(Spot(1).spec, obs_dim=3, obs_parts=()), "other")
    arrays = dict(np.load(recorded))
    np.savez(tmp_path / "short.npz", **arrays | {"obs/state": arrays["obs/state"][:5]})
    with pytest.raises(UserError, match="obs has 5 rows, action has 30"):
        load_data(tmp_path / "short.npz")


def test_what_a_recording_holds_is_what_was_seen(recorded):
    """The reward that was recorded is that of the bright column and the recorded action."""
    data = load_data(recorded)
    column = data.obs["image"].reshape(30, 16, 16).max(1).argmax(1)
    np.testing.assert_allclose(data.reward, 1 - (data.action[:, 0] - (2 * column / 15 - 1)) ** 2, atol=1e-5)


def test_refusals_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"Wrong returned obs that has image of shape \(2, 8, 16, 1\)"):
        make("tests.train.pixel_helpers:Wrong", 2, 0, trust="all")
    assert Wrong(1).spec == Spot(1).spec
    flags = ["--env", ID, "--trust", "all", "--steps", "40", "--out", tmp_path / "run"]
    assert_refused(["train", "ppo", *flags], "cannot be normalised", "normalise_obs")


def test_shifts_are_part_of_the_update(recorded, tmp_path):
    """Two runs that differ in them alone learn something else, offline and from replay; vectors cannot be shifted."""
    for name, source in (("bc", Dataset(str(recorded), ID, batch_size=8)), ("sac", replace(REPLAY, random_shift=0))):
        flows = []
        for most in (0, 2):
            run = Run(with_pixels(TABLE[name]), replace(source, random_shift=most), steps=40, **SHORT)
            folder = tmp_path / f"{name}{most}"
            train(run, folder, trust="all", quiet=True)
            flows.append(jax.tree.leaves(load(folder, trust="all").network))
        assert not all(map(np.array_equal, *flows))
    mixed = OfflineToOnline(str(recorded), ID, random_shift=3)
    assert mixed.offline.random_shift == mixed.online.random_shift == 3
    assert_refused(
        ["train", "sac", "--env", "probe:obs", "--random-shift", "4", "--steps", "40", "--out", tmp_path / "run"],
        "vectors: set it to 0",
    )
    with pytest.raises(ValueError, match="random-shift must be at least 0"):
        replace(run, source=replace(REPLAY, random_shift=-1))


def test_chunks_of_actions_see_the_parts():
    env = Chunked(Spot(3), 2, 2)
    state, obs = env.reset(jr.key(0))
    step = env.step(state, np.zeros((3, 2), np.float32))[1]
    assert env.spec.observation == PARTS and step.next_obs["image"].shape == obs["image"].shape


# Gymnasium


class Camera(gymnasium.Env):
    """Frames of `age` and a state; three steps long."""

    action_space = Box(-1, 1, (1,), np.float32)
    observation_space = Dict(
        {"view": Dict({"left": Box(0, 255, (8, 9, 3), np.uint8)}), "grid": Box(-1, 1, (2, 2), np.float64)}
    )

    def observe(self) -> Any:
        return {"view": {"left": np.full((8, 9, 3), self.age, np.uint8)}, "grid": np.full((2, 2), self.age / 4)}

    def reset(self, *, seed=None, options=None):
        self.age = 0
        return self.observe(), {}

    def step(self, action):
        self.age += 1
        return self.observe(), 1.0, False, self.age >= 3, {}


class Frames(Camera):
    observation_space = Box(0, 255, (8, 9, 3), np.uint8)

    def observe(self):
        return super().observe()["view"]["left"]


def vector(mode: AutoresetMode) -> Any:
    return lambda: SyncVectorEnv([Camera, Camera], autoreset_mode=mode)


@pytest.mark.parametrize("build", [Camera, vector(AutoresetMode.SAME_STEP), vector(AutoresetMode.NEXT_STEP)])
def test_gymnasium_offers_the_parts(build):
    """By name, whatever the nesting; bytes stay bytes; the successor at an end is the true one."""
    env = Gymnasium(build, 2)
    assert env.spec.observation == (Part("grid", (4,)), Part("view/left", (8, 9, 3), "uint8"))
    assert env.spec.obs_dim == 4 + 216 and env.spec.obs_keys == ()
    state, obs = env.reset(jr.key(0))
    assert obs["view/left"].dtype == np.uint8 and obs["grid"].dtype == np.float32 and obs["grid"].shape == (2, 4)
    for age in (1, 2, 3):
        state, step = env.step(state, np.zeros((2, 1)))
        np.testing.assert_array_equal(step.next_obs["view/left"], np.full((2, 8, 9, 3), age))
        np.testing.assert_array_equal(step.next_obs["grid"], np.full((2, 4), age / 4))
    assert step.truncated.all()
    if build is not Camera and env._mode is AutoresetMode.NEXT_STEP:
        state, step = env.step(state, np.zeros((2, 1)))
        assert not step.valid.any()
    assert (step.obs["view/left"] == 0).all() and (step.obs["grid"] == 0).all()
    env.close()


def test_an_image_alone_is_the_observation():
    env = Gymnasium(Frames, 2)
    assert env.spec.observation == (Part("", (8, 9, 3), "uint8"),)
    state, obs = env.reset(jr.key(0))
    assert obs.shape == (2, 8, 9, 3) and obs.dtype == np.uint8
    assert env.step(state, np.zeros((2, 1)))[1].next_obs.max() == 1
    agent = with_pixels(TABLE["sac"])
    policy = Policy(agent.policy(agent.init(jr.key(0), env.spec)), env.spec, "x")
    assert policy(obs).shape == (2, 1) and policy(obs[0]).shape == (1,)


def test_a_host_environment_with_images_is_learned_in(tmp_path):
    source = Replay("tests.train.test_pixels:camera", num_envs=2, collect=10, batch_size=8, buffer_size=64)
    run = Run(with_pixels(TABLE["sac"]), source, steps=24, **SHORT | {"eval_every": 24})
    assert train(run, tmp_path / "run", trust="all", quiet=True).returns.mean() == 3


def camera(num_envs: int, seed: int) -> Gymnasium:
    return Gymnasium(Camera, num_envs, seed)


# learning

SEES = Pixels((8, 8), (2, 2), features=16)
LEARNER = SAC(
    init_alpha=0.05,
    critic=Critics(width=32, pixels=SEES, optim=Optim(3e-3)),
    actor=MLPSpec(32, 2, pixels=SEES),
    optim=Optim(3e-3),
)


@pytest.mark.learn
@pytest.mark.parametrize("env", [Spot, Dark])
def test_what_only_the_image_tells_is_learned(env, tmp_path):
    """1 is the best, .622 the best of what does not see it: .70 leaves four standard errors of 1024 episodes."""
    source = Replay(f"tests.train.pixel_helpers:{env.__name__}", 16, 800, 2, 64, buffer_size=8000)
    run = Run(LEARNER, source, steps=12_000, **SHORT | {"eval_every": 12_000, "eval_episodes": 1024})
    mean = train(run, tmp_path / "run", trust="all", quiet=True).returns.mean()
    assert mean < 0.7 if env is Dark else mean > 0.85
