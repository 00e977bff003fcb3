"""The Gymnasium adapter against a counter whose observation says which episode, step and action it belongs to."""

import jax
import numpy as np
import pytest

from contraflow.core.types import UserError
from contraflow.envs import jittable, make
from contraflow.envs.gymnasium import Gymnasium

gym = pytest.importorskip("gymnasium")
Box, Dict, Tuple = gym.spaces.Box, gym.spaces.Dict, gym.spaces.Tuple
Mode = gym.vector.AutoresetMode
KEY = jax.random.key(0)


def box(n):
    return Box(-np.inf, np.inf, (n,), np.float64)


class Counter(gym.Env):
    """Episodes of `length` steps that terminate when even and are truncated when odd; reward 10 episode + step."""

    LOW, HIGH = np.array([-2.0, 0.0], np.float32), np.array([2.0, 10.0], np.float32)

    def __init__(self, length=3, kind="box", bad=None):
        self.length, self.kind, self.bad, self.episode = length, kind, bad, -1
        self.action_space = Box(self.LOW, self.HIGH)
        self.observation_space = {
            "box": box(4),
            "dict": Dict({"z": box(1), "a": Dict({"n": box(2), "m": box(1)})}),
            "tuple": Tuple((box(1), Tuple((box(2), box(1))))),
        }[kind]

    def _obs(self, action):
        e, t, a = np.array([self.episode]), np.array([self.t]), np.asarray(action, np.float64)
        if self.kind == "dict":
            return {"z": e, "a": {"n": a, "m": t}}
        return (t, (a, e)) if self.kind == "tuple" else np.concatenate([t, a, e])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode = 0 if seed is not None else self.episode + 1
        self.t = 0
        return self._obs([0, 0]), {}

    def step(self, action):
        assert self.t < self.length, "stepped after the end"
        self.t += 1
        end, even = self.t == self.length, self.episode % 2 == 0
        reward = np.nan if self.bad == "reward" and self.t == 2 else 10.0 * self.episode + self.t
        obs = self._obs([np.inf, 0] if self.bad == "obs" and self.t == 2 else action)
        return obs, reward, end and even, end and not even, {"noise": self.t}


def vector(mode, kind="box", lengths=(3, 4, 2)):
    return gym.vector.SyncVectorEnv([lambda n=n: Counter(n, kind) for n in lengths], autoreset_mode=mode)


class Reference:
    """What one copy must report, written without any vector environment."""

    def __init__(self, length, wastes):
        self.length, self.wastes, self.episode, self.t, self.ended = length, wastes, 0, 0, False

    def step(self, a):
        """(obs, next_obs, reward, terminated, truncated, valid) after a, the action in the environment's units."""
        if self.ended:  # only with `wastes`: the action is ignored
            self.ended, self.t, self.episode = False, 0, self.episode + 1
            start = [0, 0, 0, self.episode]
            return start, start, 0, False, False, False
        self.t += 1
        next_obs, end = [self.t, *a, self.episode], self.t == self.length
        row = [
            next_obs,
            next_obs,
            10 * self.episode + self.t,
            end and self.episode % 2 == 0,
            end and self.episode % 2 == 1,
        ]
        if end and self.wastes:
            self.ended = True
        elif end:
            self.episode, self.t = self.episode + 1, 0
            row[0] = [0, 0, 0, self.episode]
        return (*row, True)


def check_rows(env, lengths, wastes, steps=25):
    """Step `env` with random actions and compare every field of every row with the reference; returns valid rows."""
    n = len(lengths)
    state, obs = env.reset(KEY)
    assert obs.dtype == np.float32 and obs.shape == (n, 4) and not obs.any()
    references = [Reference(length, wastes) for length in lengths]
    rng, count, kept = np.random.default_rng(0), 0, []
    for _ in range(steps):
        action = rng.uniform(-1, 1, (n, 2)).astype(np.float32)
        scaled = np.stack([2 * action[:, 0], 5 + 5 * action[:, 1]], axis=1)
        state, step = env.step(state, action if count % 2 else jax.numpy.asarray(action))
        want = [np.array(x) for x in zip(*[r.step(a) for r, a in zip(references, scaled, strict=True)], strict=True)]
        for name, value in zip(("obs", "next_obs", "reward", "terminated", "truncated", "valid"), want, strict=True):
            got = getattr(step, name)
            np.testing.assert_allclose(got, value, atol=1e-5, err_msg=name)
            assert got.dtype == (np.float32 if name in ("obs", "next_obs", "reward") else np.bool_), name
        count += int(step.valid.sum())
        kept.append((step, step.next_obs.copy(), step.obs.copy()))
    for step, next_obs, obs in kept:  # nothing handed out is a view of a buffer that later steps overwrite
        np.testing.assert_array_equal(step.next_obs, next_obs)
        np.testing.assert_array_equal(step.obs, obs)
    return count


@pytest.mark.parametrize("kind", ["box", "dict", "tuple"])
@pytest.mark.parametrize("mode", list(Mode))
def test_vector_env_rows(mode, kind):
    wastes = mode is Mode.NEXT_STEP
    env = Gymnasium(vector(mode, kind), 3)
    assert (env.spec.obs_dim, env.spec.action_dim, env.spec.num_envs, env.spec.jittable) == (4, 2, 3, False)
    count = check_rows(env, (3, 4, 2), wastes)
    assert count < 75 if wastes else count == 75


@pytest.mark.parametrize("kind", ["box", "dict"])
def test_callable_wastes_no_step(kind):
    assert check_rows(Gymnasium(lambda: Counter(3, kind), 4), (3,) * 4, wastes=False) == 100


def test_a_class_is_an_id():
    """`module:Class` names a class of Gymnasium's kind: as many copies of it as are wanted."""
    env = make(f"{__name__}:Counter", 3, trust="all")
    assert isinstance(env, Gymnasium) and env.spec.num_envs == 3 and not jittable(f"{__name__}:Counter", trust="all")
    state, _ = env.reset(KEY)
    _, step = env.step(state, np.zeros((3, 2)))
    np.testing.assert_array_equal(step.reward, [1.0, 1.0, 1.0])
    with pytest.raises(UserError, match="render_mode"):
        make(f"{__name__}:Counter", 1, trust="all", render=True)


def test_callable_may_build_a_vector_env():
    assert check_rows(Gymnasium(lambda: vector(Mode.SAME_STEP), 3), (3, 4, 2), wastes=False) == 75


@pytest.mark.parametrize("bad", ["obs", "reward"])
def test_non_finite_is_a_user_error(bad):
    env = Gymnasium(lambda: Counter(3, bad=bad), 2)
    state, _ = env.reset(KEY)
    env.step(state, np.zeros((2, 2)))
    with pytest.raises(UserError, match="non-finite " + {"obs": "observation"}.get(bad, bad)):
        env.step(state, np.zeros((2, 2)))


class Odd(Counter):
    def __init__(self, **spaces):
        super().__init__()
        for name, space in spaces.items():
            setattr(self, name, space)


@pytest.mark.parametrize(
    ("spaces", "says"),
    [
        ({"action_space": gym.spaces.Discrete(3)}, "choose one with continuous"),
        ({"action_space": Box(0, 255, (2,), np.uint8)}, "choose one with continuous"),
        ({"action_space": Box(-np.inf, np.inf, (2,))}, "finite bounds"),
        ({"observation_space": gym.spaces.Discrete(3)}, "returns arrays"),
        ({"observation_space": Dict({"a": box(4), "b": gym.spaces.Text(3)})}, "returns arrays"),
    ],
)
def test_unfit_spaces_are_refused(spaces, says):
    with pytest.raises(UserError, match=says) as error:
        Gymnasium(lambda: Odd(**spaces), 1)
    assert "\n" not in str(error.value)


def test_unfit_vector_envs_are_refused():
    with pytest.raises(UserError, match="holds 3 copies"):
        Gymnasium(vector(Mode.DISABLED), 2)
    silent = vector(Mode.SAME_STEP)
    silent.metadata = {}
    with pytest.raises(UserError, match="autoreset_mode"):
        Gymnasium(silent, 3)
    forgetful = vector(Mode.DISABLED)
    forgetful.metadata = {"autoreset_mode": Mode.SAME_STEP}
    env = Gymnasium(forgetful, 3)
    with pytest.raises(UserError, match="final_obs"):
        [env.step(np.zeros(3, bool), np.zeros((3, 2))) for _ in range(2)]
    with pytest.raises(UserError, match="num_envs >= 1"):
        Gymnasium(Counter, 0)
    with pytest.raises(UserError, match="render=True"):
        Gymnasium(Counter, 1).frame()


def test_reset_follows_key_and_seed():
    def start(seed, key):
        return Gymnasium("Pendulum-v1", 2, seed).reset(jax.random.key(key))[1]

    env = Gymnasium("Pendulum-v1", 2, 0)
    assert env.spec.episode_length == 200
    first = env.reset(KEY)[1]
    assert not np.allclose(first[0], first[1])
    np.testing.assert_array_equal(first, env.reset(KEY)[1])
    np.testing.assert_array_equal(first, start(0, 0))
    assert not np.allclose(first, start(1, 0))
    assert not np.allclose(first, start(0, 1))


def test_the_range_of_actions_is_told():
    spec = Gymnasium("Pendulum-v1", 2, 0).spec
    assert (spec.low, spec.high) == ((-2.0,), (2.0,))


def test_dm_control_episode_is_truncated():
    pytest.importorskip("shimmy")
    pytest.importorskip("dm_control")
    env = Gymnasium("dm_control/cartpole-swingup-v0", 1)
    assert (env.spec.obs_dim, env.spec.action_dim, env.spec.episode_length) == (5, 1, 1000)
    state, _ = env.reset(KEY)
    for i in range(1, 1002):
        state, step = env.step(state, np.zeros((1, 1)))
        assert (step.terminated[0], step.truncated[0], step.valid[0]) == (False, i == 1000, True)
        assert np.array_equal(step.obs, step.next_obs) == (i != 1000)
