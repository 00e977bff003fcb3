"""Chunks of actions: sums, ends within a chunk, copies that wait for each other."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from contraflow.core.types import EnvSpec, Step, UserError
from contraflow.envs import make
from contraflow.envs.chunk import Chunked, chunked
from contraflow.envs.envpool import EnvPool
from contraflow.envs.gymnasium import Gymnasium
from contraflow.policy.uniform import uniform_policy
from contraflow.runtime.policy import Policy


@dataclass(frozen=True)
class Count:
    """Copy i terminates after 3 + i steps, everyone is truncated after 7; the observation is the age, the reward the
    action. Its state is all there is to hold."""

    num_envs: int = 2

    @property
    def spec(self):
        return EnvSpec(1, 1, self.num_envs, 7, True)

    def reset(self, key):
        return jnp.zeros((self.num_envs, 1)), jnp.zeros((self.num_envs, 1))

    def step(self, state, action):
        age = state + 1
        terminated = age[:, 0] == 3 + jnp.arange(self.num_envs)
        truncated = age[:, 0] == 7
        now = jnp.where((terminated | truncated)[:, None], 0.0, age)
        return now, Step(now, age, action[:, 0], terminated, truncated, jnp.ones(self.num_envs, bool))


class OnHost:
    """The same as a simulator that keeps its state and can hold copies."""

    def __init__(self, holds: bool = True):
        self.env, self.holds, self.name = Count(), holds, "count"
        self.state: Any = None

    @property
    def spec(self):
        return replace(self.env.spec, jittable=False)

    def reset(self, key):
        self.state, obs = self.env.reset(key)
        return None, np.asarray(obs)

    def step(self, state, action, active=None):
        active = np.ones(2, bool) if active is None else active
        new, step = jax.tree.map(np.asarray, self.env.step(self.state, jnp.asarray(action)))
        self.state = np.where(active[:, None], new, self.state)
        rows = [
            np.where(active.reshape(-1, *[1] * (x.ndim - 1)), x, np.zeros_like(x)) for x in jax.tree.leaves(step)[:6]
        ]
        return None, Step(*rows)


@pytest.mark.parametrize("kind", ["jax", "host"])
def test_a_chunk_ends_with_its_episode(kind: str):
    env = Chunked(Count() if kind == "jax" else OnHost(), horizon=3, execute=2)
    assert env.spec.action_dim == 3 and env.spec.episode_length == 4 and env.spec.horizon == 3
    state, _ = env.reset(jr.key(0))
    chunk = jnp.array([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]])
    seen = []
    for _ in range(4):
        state, step = env.step(state, chunk if kind == "jax" else np.asarray(chunk))
        seen.append(jax.tree.map(np.asarray, step))
    # Copy 0 lives three steps, copy 1 four: the second chunk of copy 0 is cut, and it waits.
    np.testing.assert_array_equal([s.reward for s in seen], [[11, 22], [1, 22], [11, 22], [1, 22]])
    np.testing.assert_array_equal([s.terminated for s in seen], [[0, 0], [1, 1], [0, 0], [1, 1]])
    np.testing.assert_array_equal([s.next_obs[:, 0] for s in seen], [[2, 2], [3, 4], [2, 2], [3, 4]])
    np.testing.assert_array_equal([s.obs[:, 0] for s in seen], [[2, 2], [0, 0], [2, 2], [0, 0]])
    np.testing.assert_array_equal([s.steps for s in seen], [[2, 2], [1, 2], [2, 2], [1, 2]])
    assert all(s.valid.all() and not s.truncated.any() for s in seen)


@pytest.mark.parametrize("kind", ["jax", "host"])
@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_the_reward_of_a_chunk_is_the_discounted_sum(kind: str, gamma: float):
    """Against the environment stepped by hand, copies of different length, ends within chunks, for 24 decisions."""
    env = Chunked(Count() if kind == "jax" else OnHost(), horizon=4, execute=3, gamma=gamma)
    state, _ = env.reset(jr.key(0))
    chunks = np.random.default_rng(0).normal(size=(24, 2, 4)).astype(np.float32)
    age = [0, 0]
    for chunk in chunks:
        state, step = env.step(state, jnp.asarray(chunk) if kind == "jax" else chunk)
        for copy, life in enumerate((3, 4)):  # what `Count` does: the reward is the action
            taken = min(3, life - age[copy])
            earned = chunk[copy, :taken].astype(float)
            age[copy] = (age[copy] + taken) % life
            np.testing.assert_allclose(step.reward[copy], (gamma ** np.arange(taken) * earned).sum(), rtol=1e-5)
            assert step.steps[copy] == taken
            if gamma == 1:
                assert step.undiscounted is None, "both are the same"
            else:
                np.testing.assert_allclose(step.undiscounted[copy], earned.sum(), rtol=1e-5)


class Screen(OnHost):
    """Whose picture shows the age of copy 0, in tens."""

    spec = replace(Count(1).spec, jittable=False)

    def __init__(self):
        super().__init__()
        self.env = Count(1)

    def step(self, state, action, active=None):
        assert active is None
        self.state, step = jax.tree.map(np.asarray, self.env.step(self.state, jnp.asarray(action)))
        return None, step

    def frame(self):
        return np.full((64, 64, 3), 10 + 40 * int(self.state[0, 0]), np.uint8)


@pytest.mark.parametrize(("horizon", "execute"), [(1, 1), (4, 2), (3, 3)])
def test_a_film_shows_every_step_of_a_chunk(tmp_path, monkeypatch, horizon: int, execute: int):
    """An episode of three steps: three pictures, also where that is two decisions or one, and none of the next."""
    imageio = pytest.importorskip("imageio.v2")
    from contraflow.cli import evaluate

    env = chunked(Screen(), horizon, execute)
    decisions = []

    def act(policy, obs, key, first):
        decisions.append(first)
        return np.zeros((1, horizon))

    monkeypatch.setattr(evaluate, "environment", lambda *args, **options: nullcontext(env))
    monkeypatch.setattr(evaluate, "act_batch", act)
    monkeypatch.setattr(evaluate, "PATIENCE", -1.0)
    policy = Policy(uniform_policy(horizon), env.spec, "count")
    evaluate.film(policy, "count", 0, tmp_path / "film.gif", 20)
    frames = [float(frame[..., :3].mean()) for frame in imageio.mimread(tmp_path / "film.gif")]
    np.testing.assert_allclose(frames, [10, 50, 90], atol=4)  # a palette of 256 colours
    assert decisions == list(range(-(-3 // execute)))
    evaluate.film(policy, "count", 0, tmp_path / "short.gif", 20, 2)
    assert len(imageio.mimread(tmp_path / "short.gif")) == 2


def test_simulators_hold_copies():
    """Two steps of one copy of a pool leave the other where it was."""
    for env in (make("envpool:HalfCheetah-v5", 2), Gymnasium("Pendulum-v1", 2)):
        assert env.holds
        state, first = env.reset(jr.key(0))
        action = np.full((2, env.spec.action_dim), 0.3, np.float32)
        for _ in range(2):
            state, step = env.step(state, action, np.array([True, False]))
            assert step.valid.tolist() == [True, False] and not step.obs[1].any() and step.reward[1] == 0
        state, both = env.step(state, action)
        twin_state, again = env.reset(jr.key(0))
        np.testing.assert_allclose(again, first)
        _, one = env.step(twin_state, action)
        np.testing.assert_allclose(both.next_obs[1], one.next_obs[1], atol=1e-5)
        assert np.abs(both.next_obs[0] - one.next_obs[0]).max() > 1e-4
        env.close()


def test_what_cannot_be_held_is_refused():
    with pytest.raises(UserError, match="count cannot hold"):
        Chunked(OnHost(holds=False), 2, 2)
    assert Chunked(OnHost(holds=False), 2, 1).spec.execute == 1
    with pytest.raises(ValueError, match="execute"):
        Chunked(Count(), 2, 3)
    with pytest.raises(ValueError, match="already"):
        Chunked(Chunked(Count(), 2, 2), 2, 2)
    env = Count()
    assert chunked(env, 1, 1) is env
    assert EnvPool.holds
