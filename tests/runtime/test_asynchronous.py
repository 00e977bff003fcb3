"""The control loop in real time, with inferences that end when the test says so: nothing hangs on how fast it runs."""

import re
import threading
from concurrent.futures import Executor, Future

import numpy as np
import pytest
from tests.runtime.test_delayed import Continuing, Counting, flow_policy, obs

from contraflow.cli import main
from contraflow.core.types import UserError
from contraflow.envs.control import Pendulum
from contraflow.policy.artifact import save_policy
from contraflow.policy.realtime import Prefix, RealTime
from contraflow.runtime.asynchronous import Asynchronous, control, play
from contraflow.runtime.delayed import Delayed
from contraflow.runtime.policy import Policy
from contraflow.runtime.receding import Receding


class Held(Executor):
    """Runs the first `free` jobs at once, and the others one by one when `release` is called."""

    def __init__(self, free: int):
        self.free, self.waiting = free, []

    def submit(self, fn, /, *args, **kwargs):
        job = Future()
        self.waiting.append((job, fn))
        self.free -= 1
        if self.free >= 0:
            self.release()
        return job

    def release(self):
        job, fn = self.waiting.pop(0)
        try:
            job.set_result(fn())
        except Exception as error:
            job.set_exception(error)


def played(act, steps=12, delay=None):
    """First actions at the times t of a robot that observes 100 t; an inference ends after `delay` steps."""
    got, held, age = [], act._executor, 0
    for t in range(steps):
        age = age + 1 if held.waiting else 0
        if delay is not None and age == delay:
            held.release()
            age = 0
        got.append(float(act(np.array([100 * t], np.float32))[0]))
    return got


@pytest.mark.parametrize(("mode", "execute"), [("switch", 3), ("ensemble", 1)])
def test_without_delay_it_is_the_synchronous_loop(mode, execute):
    act = Asynchronous(Counting(execute), mode, ensemble=0.3, executor=Held(100))
    sync = Receding(Counting(execute), ensemble=0.3 if mode == "ensemble" else None)
    right = [float(sync(obs(100 * t))[0, 0]) for t in range(12)]
    np.testing.assert_allclose(played(act), right, rtol=1e-6)
    assert set(act.timing.delays) == {0} and act.timing.stalls == act.timing.late == 0


def test_a_delay_of_two_steps_is_that_of_the_simulated_loop():
    """And is counted: late at first, as one step was expected, then expected."""
    act = Asynchronous(Counting(), "switch", executor=Held(1))
    simulated = Delayed(Counting(), delay=2, mode="switch")
    np.testing.assert_array_equal(played(act, 12, 2), [float(simulated(obs(100 * t))[0, 0]) for t in range(12)])
    assert act.timing.delays == [2, 2, 2] and act.timing.late == 1 and act.timing.stalls == 0


def test_what_is_resumed_is_what_will_be_carried_out():
    """The chunk before, shifted to now, with the longest recent delay as the number of actions that are fixed."""
    policy = Continuing()
    got = played(Asynchronous(policy, "resume", executor=Held(1)), 12, 2)
    assert [(list(left), delay) for _, left, delay in policy.given] == [([0], 1), ([3], 1), ([3], 2), ([3], 2)]
    np.testing.assert_array_equal(policy.given[1][0][0, :, 0], [4, 5, 6, 0, 0, 0])
    np.testing.assert_array_equal(got[:9], [1, 2, 3, 4, 5, 6, 304, 305, 306])


@pytest.mark.parametrize(("late", "held"), [("repeat", 6.0), ("stop", 0.0)])
def test_a_worker_that_hangs_stalls_the_robot_by_rule(late, held):
    """The inference of step 3 does not end: the chunk of step 0 lasts for 6 steps, and then the rule holds. When it
    ends in step 9, its last action was that of step 8: it is of no use, and the next inference begins."""
    executor = Held(1)
    act = Asynchronous(Counting(), "switch", late=late, executor=executor)
    assert played(act, 9) == [1, 2, 3, 4, 5, 6, held, held, held]
    assert act.timing.stalls == 3
    executor.release()
    assert float(act(np.array([900.0]))[0]) == held
    assert (act.timing.delays, act.timing.late, act.timing.stalls) == ([6], 1, 4)
    executor.release()
    assert float(act(np.array([1000.0]))[0]) == 902


def test_the_loop_may_wait_for_a_worker_that_hangs():
    """In a real thread: whenever it goes on, the step gets the action that was planned for it."""
    gate = threading.Event()

    class Gated(Counting):
        def __call__(self, obs, explore=False):
            assert self.calls == 0 or gate.wait(60)
            return super().__call__(obs)

    act = Asynchronous(Gated(), "switch", late="wait")
    assert [float(act(np.array([100.0 * t], np.float32))[0]) for t in range(6)] == [1, 2, 3, 4, 5, 6]
    opens = threading.Timer(0.05, gate.set)
    opens.start()
    assert float(act(np.array([600.0]))[0]) == 304
    assert act.timing.delays == [3] and act.timing.stalls == 1
    opens.join()
    act.close()


def test_an_episode_begins_with_a_plan_of_its_own():
    executor = Held(1)
    act = Asynchronous(Counting(), "switch", executor=executor)
    assert played(act, 5) == [1, 2, 3, 4, 5]
    act.reset()
    executor.waiting.clear()
    executor.free = 1
    assert float(act(np.array([7.0]))[0]) == 8
    assert act.timing.delays == []


def test_an_error_of_the_policy_ends_the_loop():
    class Breaks(Counting):
        def __call__(self, obs, explore=False):
            raise UserError("the server is gone")

    with pytest.raises(UserError, match="the server is gone"):
        Asynchronous(Breaks(), "switch", executor=Held(1))(np.zeros(1))


def test_the_rate_is_held_and_lost_time_is_not_made_up_for():
    """At 10 Hz, each step takes .02 s but the third, which takes .25: it began at .2, so the fourth begins at .45."""
    now, began = [0.0], []

    def sleep(seconds):
        now[0] += seconds

    def apply(action):
        began.append(round(now[0], 6))
        now[0] += 0.25 if len(began) == 3 else 0.02
        return len(began) == 6

    act = Asynchronous(Counting(), "switch", executor=Held(100))
    timing = control(act, lambda: np.zeros(1), apply, 10, 100, lambda: now[0], sleep)
    assert began == [0.0, 0.1, 0.2, 0.45, 0.55, 0.65]
    assert (timing.steps, timing.overruns) == (6, 1)
    np.testing.assert_allclose(timing.wall, 0.65)
    assert str(timing).startswith("held 7.7 Hz, 1 of 6 steps overran")


def test_an_episode_of_a_flow_in_real_time():
    """Without delay and with time to spare it is the episode of the synchronous loop: 200 steps, the same return."""
    env = Pendulum(1)
    returns = []
    for _ in range(2):
        total, timing = play(Asynchronous(flow_policy(env), "resume", executor=Held(1000)), env, 1e6)
        returns.append(total)
        assert timing.steps == 200 and timing.stalls == 0 and set(timing.delays) == {0}
    assert returns[0] == returns[1]


@pytest.mark.slow
def test_eval_plays_in_real_time(tmp_path, capsys):
    policy = flow_policy(Pendulum(1))
    save_policy(tmp_path / "policy", policy.network, policy.spec, "jax:pendulum")
    assert main(["eval", str(tmp_path), "--episodes", "1", "--hz", "2000", "--mode", "resume", "--late", "wait"]) == 0
    assert re.search(
        r"in real time at 2000 Hz, resume: return -\d+\.\d; held \d+\.\d Hz,.* stalls\n", capsys.readouterr().out
    )
    assert main(["eval", str(tmp_path), "--hz", "0"]) == 2


def test_bad_use():
    with pytest.raises(UserError, match="leave none to act from"):
        Asynchronous(Counting(6))
    with pytest.raises(UserError, match="leave none to act from"):
        Asynchronous(Counting(), expected=6)
    trained = flow_policy(Pendulum(1))
    short = Asynchronous(Policy(RealTime(trained.network, Prefix(1)), trained.spec, ""), "resume", expected=3)
    assert short._most == 1, "more than it was trained for is never asked of it"
