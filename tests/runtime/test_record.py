"""Rolling out and keeping it: what is recorded is what the environment saw, and a file gives it back."""

from dataclasses import replace
from pathlib import Path

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tests.cli_helpers import assert_refused, cli

from contraflow import SIR, EnvSpec, Policy, UserError
from contraflow.core.bounds import check_fit
from contraflow.data.datasets.readers import load
from contraflow.data.datasets.write import write
from contraflow.envs import TASKS, make
from contraflow.envs.control import Pendulum
from contraflow.envs.episodes import Camera
from contraflow.envs.gymnasium import Gymnasium
from contraflow.policy.artifact import save_policy
from contraflow.rl.critics import Critics
from contraflow.runtime import collect as module
from contraflow.runtime.collect import Behaviour, record
from contraflow.runtime.variants import environment


class Logged(gymnasium.Env):
    """Keeps what it was given and returned; copy i has episodes of 3 + 2 i steps, every other one terminates."""

    action_space = gymnasium.spaces.Box(np.float32([-2, 0]), np.float32([6, 1]))
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)

    def __init__(self, number: int):
        self.length, self.steps, self.episodes, self.age = 3 + 2 * number, [], 0, 0
        self.base = 100.0 * number

    def observe(self):
        return np.array([self.base + 10 * self.episodes + self.age], np.float32)

    def reset(self, *, seed=None, options=None):
        self.episodes, self.age = self.episodes + 1, 0
        return self.observe(), {}

    def step(self, action):
        before, self.age = self.observe(), self.age + 1
        over = self.age == self.length
        terminated = over and self.episodes % 2 == 0
        reward = float(action.sum() + self.age)
        self.steps.append((before, action.copy(), reward, self.observe(), terminated, over))
        return self.observe(), reward, terminated, over and not terminated, {}


class Ramp(eqx.Module):
    """Chunks of `horizon` actions that begin at `start` and rise by .1; exploring, they fall."""

    horizon: int = eqx.field(static=True)
    dim: int = eqx.field(static=True)
    start: float = eqx.field(static=True)

    def __call__(self, obs, key, greedy=True):
        steps = self.start + 0.1 * jnp.arange(self.horizon) * (1 if greedy else -1)
        return jnp.repeat(steps, self.dim)


def ramp(horizon: int = 1, execute: int = 1, dim: int = 2, env: str = "logged", start: float = 0.0) -> Policy:
    bounds = ((-2.0, 0.0), (6.0, 1.0)) if env in ("logged", "next-step") else ((), ())
    spec = EnvSpec(1, dim * horizon, 2, None, False, horizon, execute, *bounds)
    return Policy(Ramp(horizon, dim, start), spec, env)


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[Logged]:
    """The copies of the environment called `logged`."""
    copies: list[Logged] = []

    def build(id, num_envs, seed, *, trust=""):
        copies[:] = (Logged(i) for i in range(num_envs))
        mode = AutoresetMode.NEXT_STEP if id == "next-step" else AutoresetMode.DISABLED
        return Gymnasium(SyncVectorEnv([lambda c=c: c for c in list(copies)], autoreset_mode=mode), num_envs)

    monkeypatch.setattr(module, "make", build)
    monkeypatch.setattr(module, "COPIES", 2)
    return copies


@pytest.mark.parametrize("env", ["logged", "next-step"])
def test_the_rows_are_what_the_environment_saw(env: str, logged: list[Logged]):
    data = record(ramp(env=env), 5, behaviour=Behaviour(noise=0.4, random=0.2), seed=3)
    assert data.lengths.tolist() == [3, 5, 3, 5, 3], "as many of each copy, in turn"
    np.testing.assert_array_equal(data.low, [-2, 0])
    np.testing.assert_array_equal(data.high, [6, 1])
    for k, start in enumerate(data.starts):
        copy, rows = logged[k % 2], slice(start, start + data.lengths[k])
        first = k // 2 * copy.length
        obs, action, reward, next_obs, terminated, end = map(
            np.array, zip(*copy.steps[first : first + copy.length], strict=True)
        )
        np.testing.assert_array_equal(data.obs[rows], obs)
        np.testing.assert_array_equal(data.next_obs[rows], next_obs)
        np.testing.assert_allclose(data.raw_action[rows], action, atol=1e-6)
        np.testing.assert_allclose(data.reward[rows], reward, rtol=1e-6)
        np.testing.assert_array_equal(data.terminated[rows], terminated)
        np.testing.assert_array_equal(data.end[rows], end)
    assert 0 < data.terminated.sum() < data.end.sum() == 5 and data.env == env
    assert abs(data.action).max() <= 1 and data.action.std() > 0.2


def test_what_behaviour_does(logged: list[Logged]):
    def actions(seed: int = 0, **behaviour) -> np.ndarray:
        return record(ramp(start=0.5), 80, behaviour=Behaviour(**behaviour), seed=seed).action

    assert (actions() == 0.5).all()
    noisy = actions(noise=0.1)
    assert abs(noisy.mean() - 0.5) < 0.02 and abs(noisy.std() - 0.1) < 0.01
    np.testing.assert_array_equal(noisy, actions(noise=0.1))
    assert not np.array_equal(noisy, actions(seed=1, noise=0.1))
    mixed = actions(random=0.3)
    assert abs((mixed[:, 0] != 0.5).mean() - 0.3) < 0.06 and ((mixed[:, 0] != 0.5) == (mixed[:, 1] != 0.5)).all()
    uniform = actions(random=1.0)
    assert uniform.min() < -0.97 and uniform.max() > 0.97 and abs(uniform.mean()) < 0.06
    assert abs(actions(noise=3.0)).max() == 1
    for wrong in ({"noise": -0.1}, {"noise": np.nan}, {"random": 1.5}):
        with pytest.raises(ValueError, match="must not be negative and random must lie"):
            Behaviour(**wrong)


@pytest.mark.parametrize(("execute", "wanted"), [(1, [0] * 3), (2, [0, 1, 0]), (3, [0, 1, 2])])
def test_chunks_begin_anew_with_their_episode(execute: int, wanted: list[int], logged: list[Logged]):
    data = record(ramp(3, execute), 4)
    short, long = data.action[:3, 0], data.action[3:8, 0]
    np.testing.assert_allclose(short, np.array(wanted) / 10, atol=1e-6)
    np.testing.assert_allclose(long, (np.arange(5) % execute) / 10, atol=1e-6)
    np.testing.assert_array_equal(data.action[8:11, 0], short)
    exploring = record(ramp(3, execute), 4, behaviour=Behaviour(explore=True)).action
    np.testing.assert_allclose(exploring[:3, 0], -short, atol=1e-6)


class Halves(eqx.Module):
    """Half of the last number of an observation."""

    def __call__(self, obs, key, greedy=True):
        return jnp.tanh(0.5 * obs[-1:])


def test_a_camera_records_what_another_policy_does():
    """The actions follow from the states, and the images are those of the same bodies: the observation of the pendulum
    tells its angle. A task in which something else happens is refused, and one with other actions."""
    policy = Policy(Halves(), make("jax:pendulum", 1, 0).spec, "jax:pendulum")
    plain, seen = (record(policy, 3, camera=camera) for camera in (None, "jax:pendulum/pixels"))
    for key in ("action", "reward", "terminated", "end"):
        np.testing.assert_array_equal(getattr(plain, key), getattr(seen, key))
    assert seen.env == seen.name == "jax:pendulum/pixels" and seen.obs.dtype == np.uint8
    camera = Camera(Pendulum(), TASKS["pendulum"][1])
    draw = jax.jit(lambda o: camera.observe(jnp.stack([jnp.arctan2(o[1], o[0]), o[2]])))
    for row in (0, 7, 199, 200, 333):
        np.testing.assert_allclose(seen.obs[row, ..., 6:].astype(int), draw(plain.obs[row]), atol=1)
        np.testing.assert_allclose(seen.next_obs[row, ..., 6:].astype(int), draw(plain.next_obs[row]), atol=1)
    with pytest.raises(UserError, match="saw another episode, from step 0 on"):
        record(policy, 3, camera="jax:cartpole-swingup/pixels")
    with pytest.raises(UserError, match="2 actions"):
        record(policy, 3, camera="jax:multi-goal/pixels")


def test_an_environment_that_does_not_fit(logged: list[Logged]):
    with pytest.raises(UserError, match=r"logged has 1 observations and 2 actions, the policy was trained for 1 and 3"):
        record(ramp(dim=3), 1)
    wide = ramp()
    wide.spec = replace(wide.spec, high=(60.0, 1.0))
    ranges = r"the policy was trained for actions in \[-2, 60\] \[0, 1\], logged takes \[-2, 6\] \[0, 1\]: choose an"
    with pytest.raises(UserError, match=ranges):
        record(wide, 1)
    with pytest.raises(UserError, match="no episode ended within 2 steps: give the environment a time limit"):
        record(ramp(), 2, max_steps=2)


def test_the_order_of_the_parts_of_an_observation_must_agree():
    spec = EnvSpec(2, 1, 1, None, False, obs_keys=("angle", "speed"))
    check_fit(spec, replace(spec, num_envs=8), "it", "there")
    check_fit(spec, replace(spec, obs_keys=()), "it", "there")  # one array: nothing is known of its order
    with pytest.raises(UserError, match="there observes speed, angle, it was trained for angle, speed: choose an env"):
        check_fit(spec, replace(spec, obs_keys=("speed", "angle")), "it", "there", "jax:pendulum")


def test_an_evaluation_elsewhere_takes_actions_of_the_same_range():
    policy = ramp(dim=1, env="jax:pendulum")
    policy.spec = replace(policy.spec, obs_dim=3)
    with environment(policy, "jax:pendulum", 1, 0) as env:
        assert env.spec.num_envs == 1
    policy.spec = replace(policy.spec, low=(-2.0,), high=(2.0,))
    ranges = r"in \[-2, 2\], jax:pendulum takes \[-1, 1\]: choose an environment with"
    with pytest.raises(UserError, match=ranges), environment(policy, "jax:pendulum", 1, 0):
        pass


def saved(folder: Path, env: str = "jax:pendulum") -> None:
    agent, spec = SIR(critic=Critics(width=8, depth=1)), make(env).spec
    save_policy(folder, agent.policy(agent.init(jr.key(0), spec)), spec, env)


def test_a_compiled_environment_moves_by_its_own_law(tmp_path: Path):
    policy = ramp(dim=1, env="jax:pendulum")
    policy.spec = replace(policy.spec, obs_dim=3)
    data = record(policy, 3, behaviour=Behaviour(noise=0.5), seed=1)
    assert data.lengths.tolist() == [200] * 3 and not data.terminated.any()
    angle, speed, torque = np.arctan2(data.obs[:, 1], data.obs[:, 0]), data.obs[:, 2], 2 * data.action[:, 0]
    np.testing.assert_allclose(data.reward, -(angle**2 + 0.1 * speed**2 + 0.001 * torque**2), rtol=1e-3, atol=1e-3)
    after = np.clip(speed + 0.05 * (15 * np.sin(angle) + 3 * torque), -8, 8)
    np.testing.assert_allclose(data.next_obs[:, 2], after, atol=1e-3)
    inner = ~data.end
    np.testing.assert_array_equal(data.next_obs[inner], data.obs[np.flatnonzero(inner) + 1])
    assert len(np.unique(data.obs[data.starts], axis=0)) == 3
    for target in ("set", "arrays.npz"):
        again = load(write(data, tmp_path / target))
        for key in ("obs", "action", "reward", "next_obs", "terminated", "end", "known"):
            np.testing.assert_array_equal(getattr(again, key), getattr(data, key))
        assert again.env == "jax:pendulum"


# the command line


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "library"))
    return tmp_path


def test_record_and_info(place: Path):
    saved(place / "run" / "policy", "probe:obs-action")
    for target, where in (("mine/probe-v0", "library/mine/probe-v0"), ("./set", "set"), ("a.npz", "a.npz")):
        code, out, err = cli("record", "run", "--out", target, "--episodes", "5", "--noise", "0.2", "--seed", "4")
        assert (code == 0 and err == "" and out.splitlines()[-1].split() == ["written", str(Path(where))]) or (
            out.splitlines()[-1].endswith(where)
        ), out
        code, told, err = cli("data", "info", target)
        assert code == 0 and err == ""
        lines = dict(line.split(maxsplit=1) for line in told.splitlines())
        assert lines["environment"] == "probe:obs-action" and lines["trajectories"].startswith("5 of 1 to 1")
        assert lines["ends"] == "5 terminated, 0 truncated" and "problem" not in told
        assert told.splitlines()[1:] == out.splitlines()[1:-1], "what was recorded is what is read"
    assert (load("a.npz").action == load("set").action).all()
    assert_refused(["record", "run", "--out", "./set"], "set already exists; choose another name")


def test_problems_are_printed(place: Path):
    arrays = {
        "observations": np.zeros((6, 2)), "actions": np.full((6, 1), 3.0), "terminals": np.arange(6) == 5,
    }  # fmt: skip
    np.savez("odd.npz", **arrays)
    code, out, _ = cli("data", "info", "odd.npz")
    told = [line.split(maxsplit=1)[1] for line in out.splitlines() if line.startswith("problem")]
    assert code == 0 and len(told) == 8
    assert "100.0% of the actions lay outside their bounds and were clipped (column 0 of action is 3 in row 0)" in told
    assert "observation columns that never vary: 0, 1" in told


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("record none --out a.npz", ["holds no policy", "give the folder of a run"]),
        ("record policy", ["--out"]),
        ("record policy --out a.npz --episodes 0", ["episodes must be at least 1"]),
        ("record policy --out a.npz --noise -1", ["noise must not be negative"]),
        ("record policy --out a.npz --random 2", ["random must lie in [0, 1]"]),
        ("record policy --out a.npz --env probe:action", ["probe:action has 1 observations", "trained for 3 and 1"]),
        ("record policy --out a.npz --env jax:pendulm", ["unknown environment jax:pendulm", "did you mean"]),
        ("data info nothing.npz", ["there is no dataset nothing.npz: give a Minari folder or id"]),
        ("data info policy", ["policy is no dataset that is known"]),
        ("data look a.npz", ["invalid choice"]),
        ("data info policy --success post", ["is no OGBench file"]),
    ],
)
def test_mistakes(args: str, words: list[str], place: Path):
    saved(place / "policy")
    assert_refused(args.split(), *words)
    assert [path.name for path in place.iterdir()] == ["policy"], "nothing is left behind"
