"""What an environment does wrong ends as one line that names it, what happened and what to do."""

import textwrap
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.cli_helpers import GUESS, cli

from contraflow.core.types import EnvSpec, Step, UserError
from contraflow.envs import available, check, close, jittable, make, notes
from contraflow.envs.chunk import Chunked
from contraflow.envs.gymnasium import Gymnasium
from contraflow.envs.probe import PROBES
from contraflow.training import checkpoint

Box, Dict, Tuple = gymnasium.spaces.Box, gymnasium.spaces.Dict, gymnasium.spaces.Tuple
Mode = gymnasium.vector.AutoresetMode
HERE = "tests.envs.test_env_faults"
KEY = jax.random.key(0)


class Faulty(gymnasium.Env):
    """Sound for two steps of each episode; what it does then, or in `reset` or `render`, is said by `fault`."""

    action_space = Box(-1, 1, (1,), np.float32)
    observation_space = Box(-np.inf, np.inf, (2,), np.float32)

    def __init__(self, fault: str = "none"):  # no render_mode
        self.fault, self.age, self.closed = fault, 0, 0
        if fault == "construction":
            raise RuntimeError("no licence,\nso nothing goes")

    def reset(self, *, seed=None, options=None):
        self.age = 0
        if self.fault == "reset":
            raise RuntimeError("no ground")
        return np.zeros(3 if self.fault == "first obs" else 2, np.float32), {}

    def step(self, action):
        self.age += 1
        now = self.fault if self.age == 3 else ""
        if now == "step":
            raise RuntimeError("the arm\n\nbroke")
        if now == "tuple":
            return np.zeros(2), 0.0
        obs = np.zeros({"obs": 3, "short obs": 1}.get(now, 2), np.float32)
        reward: Any = {"reward": np.array([1.0]), "no reward": None}.get(now, 1.0)
        return obs, reward, False, False, {}

    def render(self):
        raise gymnasium.error.DependencyNotInstalled("pygame is not there")

    def close(self):
        self.closed += 1


@dataclass(frozen=True)
class Held:
    """An environment of the user's own, on the host or in JAX; arrays of other shapes where `wrong` says so."""

    num_envs: int = 2
    jax: bool = False
    wrong: str = ""
    seen: list = field(default_factory=list, hash=False, compare=False)

    @property
    def spec(self):
        copies = self.num_envs + (self.wrong == "copies")
        return EnvSpec(2, 1, copies, 10, self.jax)

    def reset(self, key):
        xp: Any = jnp if self.jax else np
        return 0, xp.zeros((self.num_envs, 3 if self.wrong == "first obs" else 2))

    def step(self, state, action):
        xp: Any = jnp if self.jax else np
        if self.wrong == "raises":
            raise IndexError("out of\nrange")
        n, no = self.num_envs, xp.zeros(self.num_envs, bool)
        obs = xp.zeros((n, 3 if self.wrong == "obs" else 2))
        obs = obs + np.inf if self.wrong == "infinite" else obs
        reward = xp.zeros((n, 1) if self.wrong == "reward" else n)
        return state, Step(obs, obs, reward, no, no[:1] if self.wrong == "ends" else no, ~no)

    def close(self):
        self.seen.append("closed")


@dataclass
class Maker:
    """What `module:name` stands for: called with num_envs and seed."""

    build: Any

    def __call__(self, num_envs: int, seed: int) -> Any:
        return self.build(num_envs)


def raises_soon(num_envs: int, seed: int) -> Gymnasium:
    return Gymnasium(lambda: Faulty("step"), num_envs, seed)


def refused(says: str, call: Any) -> str:
    """The one line of the UserError that `call` raises, which says all that is in `says`, split at `|`."""
    with pytest.raises(UserError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and len(text) < 500
    for part in says.split("|"):
        assert part in text
    return text


def three_steps(env: Any) -> None:
    state, _ = env.reset(KEY)
    for _ in range(3):
        state, _ = env.step(state, np.zeros((env.spec.num_envs, 1)))


@pytest.fixture
def registered():
    for fault in ("none", "first obs", "construction", "step"):
        gymnasium.register(f"Faulty-{fault.replace(' ', '')}-v0", lambda fault=fault: Faulty(fault))
    yield
    for fault in ("none", "first obs", "construction", "step"):
        del gymnasium.registry[f"Faulty-{fault.replace(' ', '')}-v0"]


# Gymnasium


def test_a_constructor_need_not_take_a_render_mode(registered):
    env = make("gym:Faulty-none-v0", 2)
    three_steps(env)
    refused("Faulty-none-v0|no render_mode|leave out the video", lambda: make("gym:Faulty-none-v0", 1, render=True))


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("construction", "failed in init|test_env_faults.py:|RuntimeError: no licence, so nothing goes|fix"),
        ("reset", "Faulty|failed in init|test_env_faults.py:|no ground"),
        ("step", "Faulty|failed in step|test_env_faults.py:|RuntimeError: the arm broke|fix"),
        ("tuple", "Faulty|failed in step|not enough values to unpack"),
        ("first obs", "Faulty|observation of 3 numbers|observation_space has 2|fix"),
        ("obs", "Faulty|observation of 3 numbers|observation_space has 2|fix"),
        ("short obs", "Faulty|observation of 1 numbers|observation_space has 2|fix"),
        ("reward", "Faulty|reward of shape (1,)|return a number"),
        ("no reward", "Faulty|non-finite reward"),
    ],
)
def test_what_a_gymnasium_environment_does_wrong_is_one_line(fault: str, says: str):
    refused(says, lambda: three_steps(Gymnasium(lambda: Faulty(fault), 2)))
    held = Gymnasium(lambda: Faulty(fault), 2) if fault not in ("construction", "reset", "first obs") else None
    if held:  # a step of some copies, as chunks take them
        state, _ = held.reset(KEY)
        active = np.array([True, False])
        refused(says, lambda: [held.step(state, np.zeros((2, 1)), active) for _ in range(3)])


@pytest.mark.parametrize("mode", [Mode.SAME_STEP, Mode.NEXT_STEP])
@pytest.mark.parametrize("fault", ["step", "obs", "reset"])
def test_what_a_vector_environment_does_wrong_is_one_line(fault: str, mode):
    def build():
        return gymnasium.vector.SyncVectorEnv([lambda: Faulty(fault)] * 2, autoreset_mode=mode)

    refused("SyncVectorEnv", lambda: three_steps(Gymnasium(build(), 2)))


def test_a_vector_environment_with_columns_for_rewards():
    class Columns(gymnasium.vector.SyncVectorEnv):
        def step(self, actions):
            obs, reward, *rest = super().step(actions)
            return obs, reward[:, None], *rest

    env = Gymnasium(Columns([Faulty] * 2, autoreset_mode=Mode.SAME_STEP), 2)
    refused("Columns|reward of shape (2, 1)|(2,)", lambda: three_steps(env))


def test_a_picture_that_cannot_be_drawn(monkeypatch):
    env = Gymnasium(Faulty, 1)
    env._copies[0].render_mode = "rgb_array"
    refused("Faulty|pygame is not there|install", env.frame)


def test_simulators_are_silent(registered, capfd):
    """Neither what is out of date nor what Gymnasium's checker thinks of an environment is printed."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        refused("another id or version", lambda: make("HalfCheetah-v3"))
        refused("Faulty-firstobs-v0|observation of 3 numbers", lambda: make("gym:Faulty-firstobs-v0"))
        refused("did you mean envpool:CheetahRun-v1", lambda: check("envpool:CheetaRun-v1"))
        make("HalfCheetah-v4").reset(KEY)
    printed = [line for text in capfd.readouterr() for line in text.splitlines()]
    # What MuJoCo thinks of Gymnasium's own model; nothing is printed where dm_control is there, which takes it over.
    assert not said and not [line for line in printed if line and "settotalmass" not in line]


def test_a_broken_renderer_hides_no_other_environment(monkeypatch):
    """Where OpenGL is broken the import of dm_control ends in an AttributeError."""

    def broken():
        raise AttributeError("'NoneType' object has no attribute 'glGetError'")

    monkeypatch.setattr("contraflow.envs.gymnasium.register_shimmy", broken)
    assert "Pendulum-v1" in available()["gym"]
    for call in (check, make):
        refused("dm_control/cheetah-run-v0|glGetError", lambda call=call: call("dm_control/cheetah-run-v0"))


class Space(Faulty):
    def __init__(self, observation: Any = Faulty.observation_space, action: Any = Faulty.action_space):
        super().__init__()
        self.observation_space, self.action_space = observation, action

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}


@pytest.mark.parametrize(
    "bound", [float(np.finfo(np.float32).max), np.finfo(np.float64).max / 2, np.finfo(np.float64).max, 1e30]
)
def test_a_number_that_stands_for_no_bound(bound: float):
    dtype = np.float32 if bound < 1e39 else np.float64
    for low, high in ((-bound, bound), (-1, bound), (-bound, 1)):
        space = Box(low, high, (1,), dtype)
        refused("Space|unbounded|finite bounds", lambda space=space: Gymnasium(lambda: Space(action=space), 1))
    assert Gymnasium(lambda: Space(action=Box(-1e6, 1e6, (1,))), 1).spec.high == (1e6,)


def image(*shape: int, dtype: Any = np.uint8) -> Box:
    return Box(0, 255, shape, dtype)


@pytest.mark.parametrize(
    "space",
    [
        image(84, 84),
        image(4, 84, 84, dtype=np.float32),
        image(4, 84, 84, 3),
        Dict({"state": Box(-1, 1, (3,)), "view": Dict({"left": image(3, 8, 8)})}),
    ],
)
def test_images_of_other_ranks_are_refused(space):
    refused("Space|images|[height, width, channels]|wrap", lambda: Gymnasium(lambda: Space(space), 1))


@pytest.mark.parametrize("space", [image(128), Box(-1, 1, (20, 20)), Box(-1, 1, (2, 3, 4))])
def test_other_arrays_are_not_taken_for_images(space):
    assert Gymnasium(lambda: Space(space), 1).spec.obs_dim == np.prod(space.shape)


def test_images_of_envpool_are_refused():
    pytest.importorskip("envpool")
    refused("envpool:CarRacing-v3|images (96, 96, 3)|gym:|observes states", lambda: make("envpool:CarRacing-v3"))


# order of parts, precision


def test_parts_follow_each_other_by_string(monkeypatch):
    """ "10" before "2", as in datasets; numbers as keys are no exception."""
    ten, two = Box(10, 10, (1,)), Box(2, 2, (1,))
    for keys in ({"2": two, "10": ten}, {2: two, 10: ten}):
        space = Dict()
        space.spaces = keys  # the space itself sorts what it is given
        env = Gymnasium(lambda space=space: Ordered(space), 2)
        assert env.spec.obs_keys == ("10", "2")
        np.testing.assert_array_equal(env.reset(KEY)[1], [[10, 2]] * 2)


class Ordered(Space):
    def reset(self, *, seed=None, options=None):
        return {key: part.low for key, part in self.observation_space.spaces.items()}, {}


def test_the_order_is_stated():
    space = Tuple((Box(0, 1, (2,)), Dict({"b": Box(0, 1, (1,)), "a": Tuple((Box(0, 1, (1,)),))})))
    assert Gymnasium(lambda: Space(space), 1).spec.obs_keys == ("0", "1/a/0", "1/b")
    assert Gymnasium(Faulty, 1).spec.obs_keys == () == PROBES["obs"](1).spec.obs_keys
    pool = pytest.importorskip("contraflow.envs.envpool").EnvPool("CheetahRun-v1", 1)
    assert Chunked(pool, 2, 1).spec.obs_keys == ("position", "velocity")
    pool.close()


class Far(Faulty):
    observation_space = Box(-np.inf, np.inf, (2,), np.float64)
    start = 1e9

    def reset(self, *, seed=None, options=None):
        return np.array([0.0, -self.start]), {}


def test_precision_that_is_lost_is_noted(monkeypatch):
    """Once, when it is built: 1e9 and 1e9 + 20 are one number in float32."""
    env = Gymnasium(Far, 2)
    assert len(notes(env)) == 1 and notes(env) == notes(Chunked(env, 2, 2))
    for part in ("Far", "1e+09", "float32", "64"):
        assert part in notes(env)[0]
    monkeypatch.setattr(Far, "start", 1e6)
    assert notes(Gymnasium(Far, 2)) == () == notes(PROBES["obs"](1))
    assert notes(Gymnasium(lambda: Space(Box(2**30, 2**30, (1,), np.int64)), 1))


# closing


def test_closing_twice_does_no_harm():
    env = Gymnasium(Faulty, 3)
    for _ in range(2):
        close(Chunked(env, 2, 2))
    assert [copy.closed for copy in env._copies] == [1, 1, 1]
    vector = gymnasium.vector.SyncVectorEnv([Faulty] * 2, autoreset_mode=Mode.DISABLED)
    for _ in range(2):
        close(Gymnasium(vector, 2))
    assert [copy.closed for copy in vector.envs] == [1, 1]
    pool = pytest.importorskip("contraflow.envs.envpool").EnvPool("Pendulum-v1", 1)
    for env in (pool, pool, make("jax:pendulum")):
        close(env)
    refused("Pendulum-v1|failed in step", lambda: pool.step(None, np.zeros((1, 1))))


# the user's own


def own(monkeypatch, **options) -> str:
    maker = Maker(lambda n: Held(n, **options))
    monkeypatch.setattr(f"{HERE}.mine", maker, raising=False)
    return f"{HERE}:mine"


@pytest.mark.parametrize("in_jax", [False, True])
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("copies", "holds 3 copies, not 2"),
        ("first obs", "obs of shape (2, 3)|(2, 2)"),
        ("obs", "obs of shape (2, 3)|(2, 2)"),
        ("reward", "reward of shape (2, 1)|(2,)"),
        ("ends", "truncated of shape (1,)"),
        ("raises", "failed in|test_env_faults.py:|IndexError: out of range"),
    ],
)
def test_what_the_users_class_does_wrong_is_one_line(monkeypatch, wrong: str, says: str, in_jax: bool):
    id = own(monkeypatch, wrong=wrong, jax=in_jax)
    if in_jax:
        refused(f"{id}|{says}", lambda: make(id, 2, trust="all"))
    else:
        refused(f"{id}|{says}", lambda: three_steps(make(id, 2, trust="all")))


def test_the_users_class_as_it_should_be(monkeypatch):
    id = own(monkeypatch)
    env: Any = make(id, 2, trust="all")
    three_steps(env)
    close(env)
    assert env.env.seen == ["closed"]
    refused("non-finite observation", lambda: three_steps(make(own(monkeypatch, wrong="infinite"), 2, trust="all")))
    assert not jittable(id, trust="all")
    id = own(monkeypatch, jax=True)
    assert make(id, 2, trust="all") == Held(2, True) and jittable(id, trust="all")


@pytest.mark.parametrize("code", ["def f(:", "1 / 0", "import absent"])
def test_a_module_that_cannot_be_imported(tmp_path: Path, monkeypatch, code: str):
    (tmp_path / "brought_along.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(tmp_path)
    for call in (check, make):
        refused("brought_along:Mine|cannot be loaded", lambda call=call: call("brought_along:Mine", trust="all"))


def test_a_run_whose_environment_breaks_is_saved(tmp_path: Path):
    """Two steps of two copies are sound; the third ends the run with one line and exit code 2."""
    args = [*GUESS, "--env", f"{HERE}:raises_soon", "--out", str(tmp_path / "run")]
    code, _, err = cli(*args)
    assert code == 2 and err.count("\n") == 1
    for part in ("Faulty failed in step", "test_env_faults.py:", "the arm broke", "what was learned is saved"):
        assert part in err
    assert checkpoint.latest(tmp_path / "run") == 4


def test_a_saved_spec_states_the_order():
    from contraflow.core.settings import from_json, to_json

    spec = EnvSpec(2, 1, 1, None, False, low=(-2.0,), high=(2.0,), obs_keys=("a", "b/c"))
    assert from_json(to_json(spec), EnvSpec) == spec
    older = {key: value for key, value in to_json(spec).items() if key != "obs_keys"}
    assert from_json(older, EnvSpec) == replace(spec, obs_keys=())
