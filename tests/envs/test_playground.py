"""The Playground adapter: its own logic on a stand-in for Playground, and (slow) on the real thing.

The stand-in: a copy stands at x, moves by its action, and is done beyond 9. It carries what real ones do: metrics, an
old-style key, an empty array.
"""

import importlib.machinery
import sys
import types
from types import SimpleNamespace
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from contraflow import UserError
from contraflow.envs import available, check, control, jittable, make, playground
from contraflow.envs.base import Env
from contraflow.envs.control import CartpoleSwingup
from contraflow.envs.playground import PlaygroundState
from contraflow.training import checkpoint

LIMIT = 5


class Sim(eqx.Module):
    x: Any
    obs: Any
    reward: Any
    done: Any
    metrics: dict
    info: dict
    empty: Any


class Line:
    """One copy; `resets` counts the resets that were really carried out, in compiled programs too."""

    action_size = 1
    resets: ClassVar[list[int]] = []

    def __init__(self, kind: str = "plain"):
        self.kind = kind

    def observe(self, x):
        two = jnp.stack([x, 2 * x])
        kinds = {"dict": {"privileged_state": jnp.zeros(7), "state": two}, "pixels": {"pixels": jnp.zeros((4, 4))}}
        return kinds.get(self.kind, two)

    def reset(self, rng):
        assert rng.dtype == jnp.uint32, "an old-style key"
        k_x, k_info = jr.split(rng)
        if self.kind == "counted":
            jax.debug.callback(lambda: self.resets.append(1))
        x = jr.uniform(k_x)
        zero = jnp.zeros(())
        return Sim(x, self.observe(x), zero, zero, {"moved": zero}, {"rng": k_info}, jnp.zeros((0, 3)))

    def step(self, state, action):
        x = state.x + action[0]
        x = jnp.where(x < -9, jnp.nan, x)
        state.metrics["moved"] = action[0]  # in place, as Playground does
        reward = jnp.where(x == 7.0, jnp.inf, x)
        done = (x > 9).astype(jnp.float32)
        return Sim(x, self.observe(x), reward, done, state.metrics, state.info, state.empty)


@pytest.fixture(autouse=True)
def no_leftovers():
    """What was loaded under a name in one test is not taken for it in another."""
    playground._load.cache_clear()
    yield
    playground._load.cache_clear()


@pytest.fixture
def loaded(monkeypatch, tmp_path) -> list[str]:
    """The stand-in as the package `mujoco_playground`; what was loaded of it."""
    names: list[str] = []

    def load(id, config_overrides):
        assert config_overrides == {"impl": "jax"}
        names.append(id)
        if id == "Broken":
            raise AttributeError("no such thing")
        return Line(id.lower())

    module: Any = types.ModuleType("mujoco_playground")
    module.__spec__ = importlib.machinery.ModuleSpec("mujoco_playground", None)
    module.__file__ = str(tmp_path / "__init__.py")
    own = ("Plain", "Dict", "Pixels", "Broken", "Counted")
    module.dm_control_suite = SimpleNamespace(ALL_ENVS=own)
    config = SimpleNamespace(episode_length=LIMIT, action_repeat=1)
    module.registry = SimpleNamespace(ALL_ENVS=(*own, "Robot"), load=load, get_default_config=lambda id: config)
    monkeypatch.setitem(sys.modules, "mujoco_playground", module)
    return names


def at(env, x, age=0):
    """A state of the stand-in with copies at these places."""
    state, _ = env.reset(jr.key(3))
    x = jnp.asarray(x, jnp.float32)
    sim = eqx.tree_at(lambda s: (s.x, s.obs), state.sim, (x, jnp.stack([x, 2 * x], 1)))
    return PlaygroundState(sim, jnp.broadcast_to(jnp.asarray(age, jnp.int32), x.shape), state.key)


def test_contract(loaded):
    env = make("playground:Plain", 3, 0)
    assert isinstance(env, Env) and env.spec.jittable
    assert (env.spec.obs_dim, env.spec.action_dim, env.spec.num_envs, env.spec.episode_length) == (2, 1, 3, LIMIT)
    state, obs = env.reset(jr.key(0))
    state, step = env.step(state, jnp.full((3, 1), 0.5))
    for x in (obs, step.obs, step.next_obs):
        assert x.shape == (3, 2) and x.dtype == jnp.float32
    assert step.reward.dtype == jnp.float32 and step.terminated.dtype == step.truncated.dtype == bool
    assert step.valid.all() and not (step.terminated | step.truncated).any()
    np.testing.assert_allclose(step.reward, obs[:, 0] + 0.5, rtol=1e-6)
    np.testing.assert_array_equal(step.obs, step.next_obs)


def test_ends_are_kept_apart_and_the_last_observation_is_true(loaded):
    """Copies that go on, are done, are out of time, and both at once: each on its own."""
    env = make("playground:Plain", 5, 0)
    before = at(env, [0.0, 8.5, 3.0, 8.5, 8.5], [0, 0, LIMIT - 1, LIMIT - 1, LIMIT - 2])
    after, step = env.step(before, jnp.array([[1.0], [1.0], [1.0], [1.0], [-1.0]]))
    np.testing.assert_array_equal(step.terminated, [False, True, False, True, False])
    np.testing.assert_array_equal(step.truncated, [False, False, True, True, False])
    np.testing.assert_array_equal(step.next_obs, [[1, 2], [9.5, 19], [4, 8], [9.5, 19], [7.5, 15]])
    np.testing.assert_array_equal(step.reward, [1, 9.5, 4, 9.5, 7.5])
    ended = np.array([False, True, True, True, False])
    np.testing.assert_array_equal(step.obs[~ended], step.next_obs[~ended])
    assert ((step.obs[ended, 0] >= 0) & (step.obs[ended, 0] < 1)).all(), "a new episode"
    np.testing.assert_array_equal(after.age, [1, 0, 0, 0, LIMIT - 1])
    np.testing.assert_array_equal(after.sim.obs, step.obs)
    np.testing.assert_array_equal(after.sim.x, step.obs[:, 0])


def test_every_episode_starts_in_a_fresh_state(loaded):
    """Of all copies, and again and again; the key of `reset` is all the randomness."""
    env, zero = make("playground:Plain", 3, 0), jnp.zeros((3, 1))

    def starts(key):
        state, obs = env.reset(key)
        found = [obs[:, 0]]
        for _ in range(3 * LIMIT):
            state, step = env.step(state, zero)
            if step.truncated.all():
                found.append(step.obs[:, 0])
        return np.array(found)

    one, two, other = starts(jr.key(0)), starts(jr.key(0)), starts(jr.key(1))
    assert one.shape == (4, 3) and len(np.unique(np.concatenate([one, other]))) == 24
    np.testing.assert_array_equal(one, two)


def test_many_seeds_at_once_equal_each_alone(loaded):
    """vmap over seeds, through ends of both kinds, and again as one scan under jit."""
    env = make("playground:Plain", 2, 0)
    actions = jr.uniform(jr.key(9), (12, 2, 1), minval=-0.5, maxval=1.0)

    def roll(key):
        state, _ = env.reset(key)
        near_the_end = eqx.tree_at(lambda s: s.sim.x, state, state.sim.x + jnp.array([0.0, 8.5]))
        return jax.lax.scan(env.step, near_the_end, actions)[1]

    with jax.debug_key_reuse(False):  # it takes keys split in a vmapped scan for used ones (jax 0.10)
        together = jax.jit(jax.vmap(roll))(jr.split(jr.key(0), 3))
    assert together.truncated.any() and together.terminated.any()
    for i, key in enumerate(jr.split(jr.key(0), 3)):
        alone = jax.jit(roll)(key)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-6), together, alone)


def test_no_reset_is_computed_while_no_copy_ends(loaded, monkeypatch):
    """Nor with seeds under vmap, where `cond` would compute one in every step."""
    env = make("playground:Counted", 2, 0)
    monkeypatch.setattr(Line, "resets", [])
    with jax.debug_key_reuse(False):
        states, _ = jax.jit(jax.vmap(env.reset))(jr.split(jr.key(0), 3))
        step = jax.jit(jax.vmap(env.step))
        counts = []
        for _ in range(LIMIT):
            states, _ = step(states, jnp.zeros((3, 2, 1)))
            jax.effects_barrier()
            counts.append(len(Line.resets))
    assert counts[0] > 0 and counts[:-1] == [counts[0]] * (LIMIT - 1) and counts[-1] > counts[0]


def test_numbers_that_are_not_finite_end_the_episode(loaded):
    """NaN in the observation, infinity in the reward: nothing of it leaves the adapter, and the copy starts anew."""
    env = make("playground:Plain", 3, 0)
    after, step = env.step(at(env, [-8.5, 6.0, 1.0]), jnp.array([[-1.0], [1.0], [1.0]]))
    np.testing.assert_array_equal(step.terminated, [True, True, False])
    np.testing.assert_array_equal(step.next_obs, [[-8.5, -17], [6, 12], [2, 4]])
    np.testing.assert_array_equal(step.reward, [0, 0, 2])
    assert not step.truncated.any() and np.isfinite(step.obs).all() and np.isfinite(after.sim.x).all()
    assert (step.obs[:2, 0] < 1).all()


def test_actions_outside_the_range_are_clipped(loaded):
    env = make("playground:Plain", 2, 0)
    _, step = env.step(at(env, [0.0, 0.0]), jnp.array([[3.0], [-3.0]]))
    np.testing.assert_array_equal(step.reward, [1, -1])


def test_observations_are_flat_or_the_entry_state(loaded):
    env = make("playground:Dict", 2, 0)
    state, obs = env.reset(jr.key(0))
    assert env.spec.obs_dim == 2 and obs.shape == env.step(state, jnp.zeros((2, 1)))[1].obs.shape == (2, 2)
    with pytest.raises(UserError, match="no flat observation or entry `state`"):
        make("playground:Pixels", 2, 0)


@pytest.mark.parametrize(
    ("id", "says"),
    [
        ("playground:CartpolBalance", "did you mean playground:CartpoleBalance"),
        ("playground:", "unknown environment"),
        ("playground:Robot", r"needs robot models; fetch them once with: python -c .*registry.load\('Robot'\)"),
    ],
)
def test_ids_are_refused_in_one_line(loaded, id, says):
    for refuse in (make, check, jittable):
        with pytest.raises(UserError, match=says) as error:
            refuse(id)
        assert "\n" not in str(error.value)


def test_what_cannot_be_built_is_refused_in_one_line(loaded):
    with pytest.raises(UserError, match=r"Broken cannot be built \(no such thing\)"):
        make("playground:Broken")
    with pytest.raises(UserError, match="num_envs >= 1"):
        make("playground:Plain", 0)
    with pytest.raises(UserError, match="cannot be rendered"):
        make("playground:Plain", render=True)


def test_robots_are_built_once_their_models_are_there(loaded, tmp_path):
    (tmp_path / "external_deps" / "mujoco_menagerie").mkdir(parents=True)
    assert make("playground:Robot").spec.obs_dim == 2


def test_a_missing_package_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco_playground", None)
    for refuse in (make, check, jittable):
        with pytest.raises(UserError, match=r"pip install \"contraflow\[playground\]\""):
            refuse("playground:CartpoleBalance")
    assert available()["playground"] == []


def test_looking_up_builds_nothing(loaded):
    for id in ("playground:CartpoleBalance", "playground:Plain"):  # one that is listed, one that Playground knows
        check(id)
        assert jittable(id)
    assert "CartpoleBalance" in available()["playground"] and loaded == []


def test_equal_environments_share_what_was_built_and_compiled(loaded):
    """As the static arguments of compiled epochs must."""
    one, two = make("playground:Plain", 3, 0), make("playground:Plain", 3, 7)
    assert one == two and hash(one) == hash(two) and one != make("playground:Plain", 2, 0)
    assert loaded == ["Plain"]
    traced = []

    @jax.jit
    def count(x):
        traced.append(1)
        return x

    run = jax.jit(lambda env, key: count(env.reset(key)[1]), static_argnums=0)
    run(one, jr.key(0)), run(two, jr.key(1))
    assert len(traced) == 1


def test_a_checkpoint_holds_what_a_simulator_carries(loaded, tmp_path):
    """Empty arrays, which Orbax refuses, and old-style keys among them."""
    env = make("playground:Plain", 2, 0)
    state, _ = env.reset(jr.key(4))
    checkpoint.save(tmp_path, 0, state, {})
    back = checkpoint.load(tmp_path, 0, jax.eval_shape(env.reset, jr.key(0))[0], {})
    assert back.sim.empty.shape == (2, 0, 3)
    np.testing.assert_array_equal(jr.key_data(back.key), jr.key_data(state.key))
    jax.tree.map(np.testing.assert_array_equal, (back.sim, back.age), (state.sim, state.age))


# Playground itself


@pytest.fixture(scope="module")
def real():
    return pytest.importorskip("mujoco_playground")


@pytest.mark.slow
def test_the_suite_is_the_one_that_is_listed_and_acts_in_the_unit_box(real):
    """Reacher does not load with mujoco 3.17, and says so in one line."""
    assert set(playground.SUITE) == set(real.dm_control_suite.ALL_ENVS) == set(available()["playground"])
    refused = []
    for id in playground.SUITE:
        try:
            env = real.registry.load(id, config_overrides={"impl": "jax"})
        except AttributeError:
            refused.append(id)
            with pytest.raises(UserError, match="cannot be built") as error:
                make(f"playground:{id}")
            assert "\n" not in str(error.value)
            continue
        np.testing.assert_array_equal(env.mj_model.actuator_ctrlrange, [[-1, 1]] * env.action_size)
        config = real.registry.get_default_config(id)
        assert env.mj_model.actuator_ctrllimited.all() and (config.episode_length, config.action_repeat) == (1000, 1)
    assert set(refused) <= {"ReacherEasy", "ReacherHard"}


@pytest.mark.slow
@pytest.mark.usefixtures("allow_rank_promotion")
def test_cartpole_moves_by_the_mechanics_of_dm_control(real):
    """100 steps of two copies, one out of time half-way: each step is one of semi-implicit Euler (dm_control takes RK4)
    with the accelerations of `jax:cartpole-swingup`. The angle that is observed and rewarded is that before the step:
    Playground reads it from what MJX computed on the way."""
    env = make("playground:CartpoleSwingup", 2, 0)
    assert env.spec == CartpoleSwingup(2).spec
    state, obs = env.reset(jr.key(0))
    again, other = (env.reset(jr.key(k))[1] for k in (0, 1))
    np.testing.assert_array_equal(obs, again)
    assert not np.any(obs == other) and not np.any(obs[0] == obs[1])
    state = PlaygroundState(state.sim, jnp.array([0, 950], jnp.int32), state.key)
    actions = jr.uniform(jr.key(2), (100, 2, 1), minval=-1.0, maxval=1.0)

    def move(state, action):
        body = jnp.concatenate([state.sim.data.qpos, state.sim.data.qvel], 1)
        state, step = env.step(state, action)
        return state, (body, step)

    _, (bodies, steps) = jax.jit(lambda s, a: jax.lax.scan(move, s, a))(state, actions)

    def euler(body, action):
        x, angle, dx, dangle = body
        _, _, ddx, ddangle = control.cartpole_rates(body, 10.0 * action[0])
        dx, dangle = dx + 0.01 * ddx, dangle + 0.01 * ddangle
        seen = jnp.stack([x + 0.01 * dx, angle, dx, dangle])
        return CartpoleSwingup().observe(seen), control.cartpole_reward(seen, action)

    want, reward = jax.jit(jax.vmap(jax.vmap(euler)))(bodies, actions)
    np.testing.assert_allclose(steps.next_obs, want, atol=2e-5)
    np.testing.assert_allclose(steps.reward, reward, atol=2e-5)
    assert not steps.terminated.any()
    np.testing.assert_array_equal(np.argwhere(steps.truncated), [[49, 1]])
    assert abs(steps.obs[49, 1, 1] + 1) < 0.01 and not np.allclose(steps.obs[49, 1], obs[1]), "hangs, freshly drawn"
