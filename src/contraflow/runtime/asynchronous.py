"""A control loop in real time: actions are carried out at a fixed rate while a thread plans the next chunk.

An inference sees the observation at its start, and its chunk of actions belongs to the steps from then on. When it is
there, the actions for steps that have passed are left out. Modes are those of the simulated loop (`Delayed`) that do
not wait: switch, ensemble and resume. What is measured is counted in control steps.
"""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.random as jr
import numpy as np
from jaxtyping import Float

from contraflow.core.observation import blank
from contraflow.core.types import UserError
from contraflow.envs.base import Env
from contraflow.policy.base import inner
from contraflow.policy.realtime import Prefix, realtime
from contraflow.runtime.delayed import Plans
from contraflow.runtime.policy import Policy

Mode = Literal["switch", "ensemble", "resume"]
Late = Literal["repeat", "stop", "wait"]
RECENT = 10  # inferences whose longest delay is expected of the next


@dataclass
class Timing:
    """What a control loop measured."""

    delays: list[int] = field(default_factory=list)
    """Control steps that began during each inference, after the first of an episode."""
    seconds: list[float] = field(default_factory=list)
    """Seconds of each of these inferences."""
    late: int = 0
    """Inferences that took more steps than were expected of them."""
    stalls: int = 0
    """Steps without a planned action."""
    steps: int = 0
    overruns: int = 0
    """Steps that ended after the next was due."""
    wall: float = 0.0
    """Seconds from the first step to the last."""

    def __str__(self) -> str:
        held = f"held {(self.steps - 1) / self.wall:.1f} Hz" if self.wall > 0 else "one step"
        if not self.seconds:
            return f"{held}, no inference ended"
        times, steps = (np.percentile(x, [50, 99]) for x in (np.array(self.seconds) * 1e3, self.delays))
        return (
            f"{held}, {self.overruns} of {self.steps} steps overran; inference {times[0]:.1f} ms (p99 {times[1]:.1f}), "
            f"delay {steps[0]:.0f} steps (p99 {steps[1]:.0f}), {self.late} of {len(self.delays)} late; "
            f"{self.stalls} stalls"
        )


class Asynchronous:
    """`act(obs)` returns the action [a] of the control step that begins, for one observation, and does not wait.

    An inference begins `execute` steps after the last one began, or as soon as that has ended. The first chunk after
    `reset()` is waited for. When no action is planned for a step, `late` decides: "repeat" the last action (a robot
    under position control stands still), "stop" with zeros (one under velocity or torque control), or "wait" for the
    chunk, which holds the loop up. "resume" expects of an inference the longest delay of the last ten, `expected` at
    the start. `executor` runs the inferences, one thread unless given.

    Raises UserError for chunks too short to act from while the next is planned, and with the error of an inference.
    """

    def __init__(
        self,
        policy: Policy,
        mode: Mode = "switch",
        execute: int | None = None,
        late: Late = "repeat",
        expected: int = 1,
        ensemble: float = 0.01,
        executor: Executor | None = None,
    ):
        horizon, execute = policy.spec.horizon, policy.spec.execute if execute is None else execute
        if not (1 <= execute < horizon and 0 <= expected < horizon):
            raise UserError(
                f"chunks of {horizon} actions, of which {execute} are carried out before the next is planned, leave "
                "none to act from meanwhile: use longer chunks, or a smaller execute"
            )
        if mode == "resume" and not hasattr(policy.network, "resume"):
            policy = Policy(realtime(policy.network), policy.spec, policy.env, policy.seed)
        rule = inner(policy.network, "rule")
        self._most = rule.delay_max if mode == "resume" and isinstance(rule, Prefix) else horizon - execute
        self._policy, self._mode, self._late, self._execute = policy, mode, late, execute
        self._shape = 1, horizon, policy.spec.action_dim // horizon
        self._plans = Plans(*self._shape, ensemble if mode == "ensemble" else None)
        self._recent = deque([expected], maxlen=RECENT)
        self._executor = ThreadPoolExecutor(1, "contraflow-planner") if executor is None else executor
        self._job: Future[tuple[np.ndarray, float]] | None = None
        self._begun = self._assumed = 0
        self._step, self._fresh, self._last = 0, True, np.zeros(self._shape[2], np.float32)
        self.timing = Timing()

    def __call__(self, obs: Any) -> Float[np.ndarray, " a"]:
        self._collect()
        if self._job is None and (self._fresh or self._step - self._begun >= self._execute):
            self._begin(obs)
            self._collect(wait=self._fresh)
        if not self._plans.known[0, 0]:
            self.timing.stalls += 1
            if self._late == "wait":
                self._catch_up(obs)
        if self._plans.known[0, 0]:
            self._last = self._plans.actions[0, 0]
        elif self._late == "stop":
            self._last = np.zeros_like(self._last)
        self._plans.advance()
        self._step += 1
        return self._last

    def reset(self) -> None:
        """Begins an episode; an inference that is running is of no use any more."""
        if self._job is not None:
            self._job.cancel()
        self._job, self._fresh, self._last = None, True, np.zeros_like(self._last)
        self._plans.clear()

    def warm(self) -> None:
        """Compiles what an inference calls, without counting as one."""
        network, spec = self._policy.network, self._policy.spec
        obs = jax.tree.map(lambda x: np.zeros((1, *x.shape), x.dtype), blank(spec.observation))
        spare = Policy(network, spec, self._policy.env, self._policy.seed)
        spare(obs)
        if self._mode == "resume":
            spare.resume(obs, np.zeros(self._shape, np.float32), np.ones(1, int), 0)

    def close(self) -> None:
        """Ends the thread after the inference that is running."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _begin(self, obs: Any) -> None:
        batch = jax.tree.map(lambda x: np.array(x)[None], obs)
        known = int(self._plans.known[0].sum())
        self._begun, self._assumed = self._step, min(max(self._recent), self._most)
        plans, assumed = self._plans.actions, self._assumed

        def infer() -> tuple[np.ndarray, float]:
            began = time.perf_counter()
            if self._mode == "resume":
                chunk = self._policy.resume(batch, plans, np.array([known]), assumed)
            else:
                chunk = self._policy(batch)
            return np.asarray(chunk).reshape(self._shape), time.perf_counter() - began

        self._job = self._executor.submit(infer)

    def _collect(self, wait: bool = False) -> None:
        """Takes in a chunk that is ready."""
        if self._job is None or not (wait or self._job.done()):
            return
        (chunk, seconds), self._job = self._job.result(), None
        passed = self._step - self._begun
        if not self._fresh:
            self._recent.append(passed)
            self.timing.delays.append(passed)
            self.timing.seconds.append(seconds)
            self.timing.late += passed > self._assumed
        self._fresh = False
        left = max(self._shape[1] - passed, 0)
        coming = np.zeros_like(chunk)
        coming[:, :left] = chunk[:, passed:]
        if left:
            self._plans.add(coming, np.array([left]), np.ones(1, bool))

    def _catch_up(self, obs: Any) -> None:
        """Waits until an action is planned; a chunk that is too old to hold one is followed by another."""
        while not self._plans.known[0, 0]:
            if self._job is None:
                self._begin(obs)
            self._collect(wait=True)


def control(
    act: Asynchronous,
    observe: Callable[[], Any],
    apply: Callable[[np.ndarray], bool],
    rate: float,
    steps: int,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Timing:
    """Calls `apply(act(observe()))` `rate` times a second, until it returns True or `steps` times.

    After a step that took too long the schedule moves on from there: lost steps are not made up for in a hurry.
    """
    due = began = clock()
    for _ in range(steps):
        if (pause := due - clock()) > 0:
            sleep(pause)
        act.timing.wall = clock() - began
        act.timing.steps += 1
        if apply(act(observe())):
            break
        due += 1.0 / rate
        if (now := clock()) > due:
            act.timing.overruns, due = act.timing.overruns + 1, now
    return act.timing


def play(act: Asynchronous, env: Env, rate: float, seed: int = 0, max_steps: int = 100_000) -> tuple[float, Timing]:
    """Plays one episode in a single copy of an environment without chunks, in real time; returns (return, timing)."""
    state, obs = env.reset(jr.key(seed))
    step, total = env.step, 0.0
    if env.spec.jittable:  # compiled before the clock runs
        step: Any = jax.jit(step).lower(state, np.zeros((1, env.spec.action_dim), np.float32)).compile()
    act.warm()
    act.reset()

    def apply(action: np.ndarray) -> bool:
        nonlocal state, obs, total
        state, out = step(state, action[None])
        obs, total = out.obs, total + float(out.reward[0])
        return bool((out.terminated | out.truncated)[0])

    timing = control(act, lambda: jax.tree.map(lambda x: np.asarray(x[0]), obs), apply, rate, max_steps)
    return total, timing
