"""The simulated control loop against plans by hand, and against the loop without a delay."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from contraflow.core.types import EnvSpec, UserError
from contraflow.envs.control import Pendulum
from contraflow.envs.ways import MultiGoal
from contraflow.flow.model import Ddim, FlowSpec
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.flow import FlowPolicy
from contraflow.policy.realtime import Prefix, RealTime
from contraflow.policy.uniform import uniform_policy
from contraflow.runtime.delayed import Delayed, delay_steps, latency, simulate
from contraflow.runtime.policy import Policy
from contraflow.runtime.receding import Receding

HORIZON = 6


class Counting(Policy):
    """Plans obs + 1, 2, ..., 6 (times 10 in the second coordinate), so that a plan shows when it was made."""

    def __init__(self, execute=3):
        self.spec, self.network = EnvSpec(1, 2 * HORIZON, 3, 100, False, HORIZON, execute), None
        self.seed, self.env, self.calls = 0, "", 0

    def __call__(self, obs, explore=False):
        self.calls += 1
        steps = np.asarray(obs) + 1 + np.arange(HORIZON)[None]
        return np.stack([steps, 10 * steps], -1).astype(np.float32)


class Continuing(Counting):
    """Continues the previous chunk for all that it holds, and notes what it was given."""

    def __init__(self):
        super().__init__()
        self.network, self.given = RealTime(uniform_policy(2), Prefix(3)), []

    def resume(self, obs, previous, left, delay, explore=False):
        self.given.append((previous.copy(), left.copy(), delay))
        return np.where((np.arange(HORIZON)[None] < left[:, None])[..., None], previous, self(obs))


def obs(*values):
    return np.array(values, np.float32)[:, None]


def played(act, steps=12):
    """First actions at the times t of one copy that observes 100 t."""
    return [float(act(obs(100 * t))[0, 0]) for t in range(steps)]


def test_waiting_stands_still_and_then_carries_out_all():
    """Inference at steps 0 (before the episode), 3 and 8; its chunk begins 2 steps later with its first action."""
    act, stalled = Delayed(Counting(), delay=2, mode="wait"), []
    got = []
    for t in range(13):
        got.append(float(act(obs(100 * t))[0, 0]))
        stalled.append(bool(act.stalled[0]))
    np.testing.assert_array_equal(got, [1, 2, 3, 0, 0, 301, 302, 303, 0, 0, 801, 802, 803])
    assert stalled == [g == 0 for g in got]


def test_switching_leaves_out_what_is_late():
    """Inference every 3 steps; its chunk takes over 2 steps later, at its third action."""
    got = played(Delayed(Counting(), delay=2, mode="switch"))
    np.testing.assert_array_equal(got, [1, 2, 3, 4, 5, 303, 304, 305, 603, 604, 605, 903])


def test_a_delay_as_long_as_the_period():
    """One inference begins as the other ends."""
    got = played(Delayed(Counting(execute=1), delay=3, mode="switch"), 10)
    np.testing.assert_array_equal(got, [1, 2, 3, 4, 5, 6, 304, 305, 306, 604])


def test_what_is_resumed_begins_now():
    """The previous chunk is shifted to the step of the observation, and its end is known."""
    policy = Continuing()
    got = played(Delayed(policy, delay=2), 9)
    assert [(left.tolist(), delay) for _, left, delay in policy.given] == [([0], 2), ([3], 2), ([3], 2)]
    np.testing.assert_array_equal(policy.given[1][0][0, :, 0], [4, 5, 6, 0, 0, 0])
    np.testing.assert_array_equal(policy.given[2][0][0, :, 0], [304, 305, 306, 0, 0, 0])
    np.testing.assert_array_equal(got, [1, 2, 3, 4, 5, 6, 304, 305, 306])


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_without_delay_it_is_the_receding_horizon(decay):
    """And ensembling at every step is that of `Receding`."""
    for pair in (
        (Delayed(Counting(), 2, 0, "switch"), Receding(Counting(), 2)),
        (Delayed(Counting(), 2, 0, "wait"), Receding(Counting(), 2)),
        (Delayed(Counting(), 2, 0, "ensemble", 1, decay), Receding(Counting(), 2, ensemble=decay)),
    ):
        for t in range(10):
            first, second = (act(obs(7 * t**2, -t)) for act in pair)
            np.testing.assert_allclose(first, second, rtol=1e-6)
            if t == 4:
                for act in pair:
                    act.reset(np.array([True, False]))


def test_ensembling_by_hand():
    """Delay 1, inference every 2 steps: step 5 was planned at 0, 2 and 4; the oldest weighs most."""
    got = played(Delayed(Counting(), 1, 1, "ensemble", 2, 0.3), 6)
    weight = np.exp(-0.3 * np.arange(3))
    np.testing.assert_allclose(got[5], weight @ [6, 204, 402] / weight.sum(), rtol=1e-6)
    assert got[2] == 3 and got[0] == 1
    np.testing.assert_allclose(got[3], (4 * 1 + 202 * weight[1]) / (1 + weight[1]), rtol=1e-6)


@pytest.mark.parametrize("delay", [0, 1, 2, 3])
def test_ensembling_equal_plans_gives_the_plan(delay):
    """A policy whose plans agree on every step: they are carried out as planned, whatever the delay and the mode."""

    class Agreeing(Counting):
        def __call__(self, obs, explore=False):
            return super().__call__(np.asarray(obs) / 100)

    for mode in ("ensemble", "switch"):
        got = played(Delayed(Agreeing(), 1, delay, mode, 3))
        np.testing.assert_allclose(got, 1 + np.arange(12), rtol=1e-6)


def test_copies_begin_episodes_at_other_times():
    act = Delayed(Counting(), 2, 2, "switch")
    for t in range(4):
        act(obs(100 * t, 100 * t))
    act.reset(np.array([False, True]))
    got = np.stack([act(obs(100 * t, 100 * t))[:, 0] for t in range(4, 8)])
    np.testing.assert_array_equal(got[:, 0], [5, 303, 304, 305])
    np.testing.assert_array_equal(got[:, 1], [401, 402, 403, 404])


def flow_policy(env, horizon=6, execute=2):
    spec = env.spec
    spec = EnvSpec(spec.obs_dim, spec.action_dim * horizon, 1, None, True, horizon, execute)
    flow = FlowSpec(solver=Ddim(2), network=ResidualMLP(8, 1, 4)).init(
        jr.key(0), spec.action_dim, spec.obs_dim, horizon
    )
    return Policy(FlowPolicy(flow), spec, "")


def test_episodes_are_counted_once():
    """A policy that heads straight for a goal, and one that never gets there; returns are sums of rewards."""

    class Heading(Policy):
        def __init__(self):
            self.spec, self.network, self.env, self.seed = EnvSpec(2, 8, 1, 40, True, 4, 2), None, "", 0

        def __call__(self, obs, explore=False):
            way = np.array([1.149, 0.964 - 1.0]) - np.asarray(obs)  # the goal at 50 degrees to the right
            return np.broadcast_to((10 * way)[:, None], (len(way), 4, 2)).clip(-1, 1).astype(np.float32)

    found = simulate(Delayed(Heading(), 5, 0, "switch"), MultiGoal(5))
    assert found.terminated.all() and (found.steps < 20).all() and (found.stalled == 0).all()
    late = simulate(Delayed(Heading(), 5, 2, "wait"), MultiGoal(5))
    assert (late.steps > 1.5 * found.steps).all() and (np.abs(late.stalled - 0.5) < 0.1).all()
    assert (late.returns < found.returns).all()
    env = Pendulum(3)
    act = Delayed(flow_policy(env), 3, 1, "resume")
    trial = simulate(act, env)
    assert (trial.steps == 200).all() and not trial.terminated.any() and (trial.jump > 0).all()
    np.testing.assert_array_equal(trial.returns, simulate(Delayed(flow_policy(env), 3, 1), env).returns)
    with pytest.raises(UserError, match="time limit"):
        simulate(Delayed(flow_policy(env), 3), env, max_steps=20)


def test_resuming_keeps_what_is_under_way():
    """The actions carried out during an inference are those of the chunk before, bit for bit."""
    env, delay = Pendulum(4), 2
    policy = flow_policy(env)
    plan = np.asarray(policy(np.zeros((4, 3), np.float32)))
    act = Delayed(flow_policy(env), 4, delay)
    got = np.stack([act(np.zeros((4, 3), np.float32)) for _ in range(4)], 1)
    np.testing.assert_array_equal(got, plan[:, :4])


def test_latency_is_counted_in_control_steps():
    assert [delay_steps(s, 50) for s in (0.0, 0.001, 0.02, 0.0201)] == [0, 1, 1, 2]
    times = latency(flow_policy(Pendulum(1)), np.zeros(3), 5)
    assert times.shape == (5,) and (times > 0).all() and times.max() < 5


def test_bad_use():
    with pytest.raises(UserError, match="no mode"):
        Delayed(Counting(), mode="hope")
    for wrong in ({"delay": 4}, {"delay": 2, "execute": 5}, {"delay": -1}, {"execute": 0}):
        with pytest.raises(UserError, match="chunks of 6"):
            Delayed(Counting(), mode="switch", **wrong)
    with pytest.raises(UserError, match="3 copies"):
        Delayed(Counting(), 3, mode="switch")(obs(1))
    policy = flow_policy(Pendulum(1))
    with pytest.raises(UserError, match="cannot resume"):
        policy.resume(np.zeros((1, 3)), np.zeros((1, 6, 1)), np.zeros(1), 1)
    with pytest.raises(UserError, match="flow policy"):
        Delayed(Policy(uniform_policy(6), policy.spec, ""))
    trained = Policy(RealTime(policy.network, Prefix(1)), policy.spec, "")
    with pytest.raises(UserError, match="delays up to 1"):
        Delayed(trained, delay=2)
    with pytest.raises(UserError, match="leading axis"):
        trained.resume(np.zeros(3), np.zeros((1, 6, 1)), np.zeros(1), 1)
    assert jnp.isfinite(trained.resume(np.zeros((1, 3)), np.zeros((1, 6, 1)), np.zeros(1), 1)).all()
