"""The loop: bookkeeping, one body for scans and host loops; `evaluate`."""

import re
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.train.loop_helpers import QUICK, WARM, begin, learner_of, run_epoch

from contraflow.agents.online.sir import SIR
from contraflow.core.types import Step, UserError
from contraflow.data.samplers import NStep, Uniform
from contraflow.envs.probe import Action, TwoStep
from contraflow.policy.best_of import Softmax
from contraflow.policy.uniform import uniform_policy
from contraflow.rl.critics import Critics
from contraflow.training.evaluate import evaluate
from contraflow.training.loop import _loop
from contraflow.training.sources.replay import Interact

LEARN = Interact(False, 2, 16, Uniform(0.99))


@dataclass(frozen=True)
class Host:
    """A probe dressed up as a host environment: NumPy in, NumPy out, and a row that does not count now and then.

    `fail_at` is the step at which it breaks; `calls` counts the steps, as simulators do, outside of the state.
    """

    env: Any
    skip: bool = False
    fail_at: int = -1
    fault: Exception = UserError("the simulator broke")
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
            raise self.fault
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
            two = jnp.isclose(batch.reward, 0.9)
            return state, {"joined": jnp.mean(two), "reward": jnp.sum(jnp.where(two, batch.reward, 0)) / two.sum()}

    env, agent = TwoStep(2), Spy(critic=Critics(width=8, depth=1, gamma=0.9))
    carry, _, _ = run_epoch(WARM, agent, env, begin(agent, env, jr.key(0)), jr.key(1), 30)
    for n, want in ((1, 0.0), (3, 0.5)):
        carry, metrics, _ = run_epoch(Interact(False, 2, 512, NStep(n, 0.9)), agent, env, carry, jr.key(1), 1)
        assert metrics["joined"] == pytest.approx(want, abs=0.06)
    assert metrics["reward"] == pytest.approx(0.9)


def test_counters_returns_and_buffer():
    env = TwoStep(3)  # rewards 0, 1 and the end: every episode is worth 1
    carry = begin(QUICK, env, jr.key(0))
    carry, metrics, error = run_epoch(WARM, QUICK, env, carry, jr.key(1), 5)
    learner = learner_of(carry)
    assert error is None
    assert (int(learner.steps), int(learner.iteration), int(learner.buffer.size)) == (15, 5, 15)
    assert metrics == {"episodes": 6.0, "return": 1.0}  # 2 episodes for each of 3 copies, and one step into the third
    np.testing.assert_array_equal(learner.returns, np.zeros(3))
    assert int(learner.agent.step) == 0
    rows = learner.buffer.rows
    obs, next_obs, reward, ends, action = (
        np.asarray(x)[:15] for x in (rows.obs, rows.next_obs, rows.reward, rows.terminated, rows.action)
    )
    np.testing.assert_array_equal(obs[:, 0], np.repeat([0, 1, 0, 1, 0], 3))
    np.testing.assert_array_equal(next_obs[:, 0], np.repeat([1, 2, 1, 2, 1], 3))  # never the one after a reset
    np.testing.assert_array_equal(reward, obs[:, 0])
    np.testing.assert_array_equal(ends, obs[:, 0] == 1)
    assert np.abs(action).max() <= 1 and len(np.unique(action)) == 15
    carry, metrics, _ = run_epoch(LEARN, QUICK, env, carry, jr.key(1), 4)
    assert int(learner_of(carry).agent.step) == 8 and int(learner_of(carry).iteration) == 9
    assert metrics["critic_loss"] > 0 and metrics["return"] == 1.0
    rows = np.asarray(learner_of(carry).buffer.rows.action[15:27, 0])
    assert len(np.unique(rows)) == 12  # every copy and every step has noise of its own


@pytest.mark.slow
def test_scans_of_any_length_and_the_host_loop_do_the_same():
    """Bitwise for scans; the host loop is another program and differs by rounding."""
    env = TwoStep(2)
    results = []
    for pieces in ((6,), (3, 3)):
        carry = begin(QUICK, env, jr.key(0))
        carry, _, _ = run_epoch(WARM, QUICK, env, carry, jr.key(1), 4)
        for n in pieces:
            carry, metrics, _ = run_epoch(LEARN, QUICK, env, carry, jr.key(2), n)
        results.append(learner_of(carry))
    jax.tree.map(np.testing.assert_array_equal, results[0], results[1])
    host = Host(env, calls=[])
    carry = begin(QUICK, host, jr.key(0))
    carry, _, _ = run_epoch(WARM, QUICK, host, carry, jr.key(1), 4)
    carry, metrics, _ = run_epoch(LEARN, QUICK, host, carry, jr.key(2), 6)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), learner_of(carry), results[0])
    assert metrics["episodes"] == 6


def test_rows_that_do_not_count():
    env = Host(TwoStep(2), skip=True, calls=[])
    carry = begin(QUICK, env, jr.key(0))
    carry, metrics, _ = run_epoch(WARM, QUICK, env, carry, jr.key(1), 6)
    # Copy 0 loses every second step, which is the last of its episodes: its ends are not seen either.
    assert int(learner_of(carry).steps) == int(learner_of(carry).buffer.size) == 9
    assert metrics["episodes"] == 3


def test_stop_and_failure_leave_a_good_carry():
    env = Host(TwoStep(2), calls=[])
    carry = begin(QUICK, env, jr.key(0))
    carry, _, error = run_epoch(WARM, QUICK, env, carry, jr.key(1), 50, lambda: len(env.calls) >= 3)
    assert error is None and int(learner_of(carry).iteration) == 3
    broken = Host(TwoStep(2), fail_at=4, calls=[])
    carry = begin(QUICK, broken, jr.key(0))
    carry, _, error = run_epoch(WARM, QUICK, broken, carry, jr.key(1), 50)
    assert isinstance(error, UserError) and "broke" in str(error)
    assert int(learner_of(carry).iteration) == 3 and int(learner_of(carry).buffer.size) == 6
    broken = Host(TwoStep(2), fail_at=4, fault=KeyError("joint"), calls=[])
    _, _, error = run_epoch(WARM, QUICK, broken, begin(QUICK, broken, jr.key(0)), jr.key(1), 50)
    assert re.search(r"environment Host failed in step at test_online.py:\d+ \(KeyError: 'joint'\)", str(error))


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


def test_one_program_for_epochs_of_any_length():
    """143 and 142 iterations take turns where num_envs does not divide an interval."""
    env, agent = TwoStep(2), SIR(explore=Softmax(3), critic=Critics(width=8, depth=1))
    carry = begin(agent, env, jr.key(0))
    before = _loop._cache_size()
    for n in (3, 4, 1):
        carry, _, _ = run_epoch(WARM, agent, env, carry, jr.key(1), n)
    assert _loop._cache_size() == before + 1 and int(learner_of(carry).iteration) == 8


def test_evaluation_counts_the_same_number_of_episodes_for_every_copy():
    policy = QUICK.policy(jax.jit(lambda k: QUICK.init(k, Scripted().spec))(jr.key(0)))
    returns = evaluate(policy, Scripted(), jr.key(1), 6)
    np.testing.assert_array_equal(returns, [0, 10, 20, 1, 11, 21])
    np.testing.assert_array_equal(evaluate(policy, Scripted(), jr.key(1), 4), [0, 10, 20, 1])
    with pytest.raises(UserError, match="time limit"):
        evaluate(policy, Scripted(4), jr.key(1), 4, max_steps=2)


def test_every_action_of_an_evaluation_has_noise_of_its_own():
    """Two copies, three episodes of one step each: the return tells the action, and no two are alike."""
    policy = uniform_policy(1)
    together = evaluate(policy, Action(2), jr.key(1), 6)
    assert len(np.unique(together.round(5))) == 6
    on_host = evaluate(policy, Host(Action(2), calls=[]), jr.key(1), 6)
    np.testing.assert_allclose(on_host, together, rtol=1e-5)
