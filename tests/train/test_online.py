"""The loop: bookkeeping, one body for scans and host loops; `evaluate`."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.train.loop_helpers import QUICK, WARM, begin

from contraflow.agents.online.sir import SIR
from contraflow.core.types import Step, UserError
from contraflow.envs.probe import TwoStep
from contraflow.rl.critics import Critics
from contraflow.train.evaluate import evaluate
from contraflow.train.loop import epoch
from contraflow.train.offpolicy import OffPolicy

LEARN = OffPolicy(False, 2, 16)


@dataclass(frozen=True)
class Host:
    """A probe dressed up as a host environment: NumPy in, NumPy out, and a row that does not count now and then.

    `fail_at` is the step at which it breaks; `calls` counts the steps, as simulators do, outside of the state.
    """

    env: Any
    skip: bool = False
    fail_at: int = -1
    calls: list = None

    @property
    def spec(self):
        return replace(self.env.spec, jittable=False)

    def reset(self, key):
        self.calls.clear()
        state, obs = self.env.reset(key)
        return state, np.asarray(obs)

    def step(self, state, action):
        self.calls.append(1)
        if len(self.calls) == self.fail_at:
            raise UserError("the simulator broke")
        state, step = self.env.step(state, jnp.asarray(action))
        step = jax.tree.map(np.asarray, step)
        if self.skip and len(self.calls) % 2 == 0:
            step = eqx.tree_at(lambda s: s.valid, step, step.valid & (np.arange(len(step.valid)) > 0))
        return state, step

    def __hash__(self):
        return id(self)


def test_n_step_rows_reach_the_agent():
    """TwoStep's episodes are two steps long, worth 0 and then 1: half of the rows join both."""

    class Spy(SIR):
        def update(self, state, batch, key):
            two = batch.span == 2
            return state, {"joined": jnp.mean(two), "reward": jnp.sum(jnp.where(two, batch.reward, 0)) / two.sum()}

    env, agent = TwoStep(2), Spy(critic=Critics(width=8, depth=1, gamma=0.9))
    carry, _, _ = epoch(WARM, agent, env, begin(agent, env, jr.key(0)), jr.key(1), 30)
    for n, want in ((1, 0.0), (3, 0.5)):
        carry, metrics, _ = epoch(replace(LEARN, batch_size=512, n_step=n), agent, env, carry, jr.key(1), 1)
        assert metrics["joined"] == pytest.approx(want, abs=0.06)
    assert metrics["reward"] == pytest.approx(0.9)


def test_counters_returns_and_buffer():
    env = TwoStep(3)  # rewards 0, 1 and the end: every episode is worth 1
    carry = begin(QUICK, env, jr.key(0))
    carry, metrics, error = epoch(WARM, QUICK, env, carry, jr.key(1), 5)
    learner = carry.learner
    assert error is None
    assert (int(learner.steps), int(learner.iteration), int(learner.buffer.size)) == (15, 5, 15)
    assert metrics == {"episodes": 6.0, "return": 1.0}  # 2 episodes for each of 3 copies, and one step into the third
    np.testing.assert_array_equal(learner.returns, np.zeros(3))
    assert int(learner.agent.step) == 0
    rows = jax.tree.map(lambda x: np.asarray(x[:15]), learner.buffer.rows)
    np.testing.assert_array_equal(rows.obs[:, 0], np.repeat([0, 1, 0, 1, 0], 3))
    np.testing.assert_array_equal(rows.next_obs[:, 0], np.repeat([1, 2, 1, 2, 1], 3))  # never the one after a reset
    np.testing.assert_array_equal(rows.reward, rows.obs[:, 0])
    np.testing.assert_array_equal(rows.terminated, rows.obs[:, 0] == 1)
    assert np.abs(rows.action).max() <= 1 and len(np.unique(rows.action)) == 15
    carry, metrics, _ = epoch(LEARN, QUICK, env, carry, jr.key(1), 4)
    assert int(carry.learner.agent.step) == 8 and int(carry.learner.iteration) == 9
    assert metrics["critic_loss"] > 0 and metrics["return"] == 1.0
    rows = np.asarray(carry.learner.buffer.rows.action[15:27, 0])
    assert len(np.unique(rows)) == 12  # every copy and every step has noise of its own


@pytest.mark.slow
def test_scans_of_any_length_and_the_host_loop_do_the_same():
    """Bitwise for scans; the host loop is another program and differs by rounding."""
    env = TwoStep(2)
    results = []
    for pieces in ((6,), (3, 3)):
        carry = begin(QUICK, env, jr.key(0))
        carry, _, _ = epoch(WARM, QUICK, env, carry, jr.key(1), 4)
        for n in pieces:
            carry, metrics, _ = epoch(LEARN, QUICK, env, carry, jr.key(2), n)
        results.append(carry.learner)
    jax.tree.map(np.testing.assert_array_equal, results[0], results[1])
    host = Host(env, calls=[])
    carry = begin(QUICK, host, jr.key(0))
    carry, _, _ = epoch(WARM, QUICK, host, carry, jr.key(1), 4)
    carry, metrics, _ = epoch(LEARN, QUICK, host, carry, jr.key(2), 6)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), carry.learner, results[0])
    assert metrics["episodes"] == 6


def test_rows_that_do_not_count():
    env = Host(TwoStep(2), skip=True, calls=[])
    carry = begin(QUICK, env, jr.key(0))
    carry, metrics, _ = epoch(WARM, QUICK, env, carry, jr.key(1), 6)
    # Copy 0 loses every second step, which is the last of its episodes: its ends are not seen either.
    assert int(carry.learner.steps) == int(carry.learner.buffer.size) == 9
    assert metrics["episodes"] == 3


def test_stop_and_failure_leave_a_good_carry():
    env = Host(TwoStep(2), calls=[])
    carry = begin(QUICK, env, jr.key(0))
    carry, _, error = epoch(WARM, QUICK, env, carry, jr.key(1), 50, stop=lambda: len(env.calls) >= 3)
    assert error is None and int(carry.learner.iteration) == 3
    broken = Host(TwoStep(2), fail_at=4, calls=[])
    carry = begin(QUICK, broken, jr.key(0))
    carry, _, error = epoch(WARM, QUICK, broken, carry, jr.key(1), 50)
    assert isinstance(error, UserError) and "broke" in str(error)
    assert int(carry.learner.iteration) == 3 and int(carry.learner.buffer.size) == 6


@dataclass(frozen=True)
class Scripted:
    """Copies with episodes of length 1, 2, 3, ...; the reward of copy i in its e-th episode is 10 i + e per episode."""

    num_envs: int = 3

    @property
    def spec(self):
        return replace(TwoStep(self.num_envs).spec, jittable=False)

    def reset(self, key):
        n = self.num_envs
        return (np.zeros(n, int), np.zeros(n, int)), np.zeros((n, 1), np.float32)

    def step(self, state, action):
        age, episode = state
        n = self.num_envs
        valid = np.ones(n, bool)
        done = age == np.arange(n)
        reward = np.where(done, 10.0 * np.arange(n) + episode, 0.0).astype(np.float32)
        obs = np.zeros((n, 1), np.float32)
        step = Step(obs, obs, reward, done & (episode % 2 == 0), done & (episode % 2 == 1), valid)
        return (np.where(done, 0, age + 1), episode + done), step


def test_evaluation_counts_the_same_number_of_episodes_for_every_copy():
    state = jax.jit(lambda k: QUICK.init(k, Scripted().spec))(jr.key(0))
    returns = evaluate(QUICK, state, Scripted(), jr.key(1), 6)
    np.testing.assert_array_equal(returns, [0, 10, 20, 1, 11, 21])
    np.testing.assert_array_equal(evaluate(QUICK, state, Scripted(), jr.key(1), 4), [0, 10, 20, 1])
    with pytest.raises(UserError, match="time limit"):
        evaluate(QUICK, state, Scripted(4), jr.key(1), 4, max_steps=2)
