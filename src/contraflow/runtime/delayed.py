"""A simulated control loop: the environment steps at a fixed rate, and inference takes `delay` control steps.

An inference sees the observation at its start. Its chunk of actions belongs to the steps from then on, but arrives
`delay` steps later. Modes:

    wait       nothing is done (zero actions) until the chunk is there; then it is carried out from its first action
    switch     the previous chunk is carried out meanwhile; the new one replaces it at once, its first `delay` actions
               are left out
    ensemble   as `switch`, with the mean of all actions planned for a step (ACT, 2304.13705)
    resume     as `switch`, with chunks that continue the previous one (policy/realtime.py)

The first chunk of an episode is planned before it begins, in every mode.
"""

import math
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.random as jr
import numpy as np
from jaxtyping import Bool, Float, Int

from contraflow.core.flatten import ordered_leaves
from contraflow.core.types import UserError
from contraflow.envs.base import Env
from contraflow.policy.base import inner
from contraflow.policy.realtime import Prefix, realtime
from contraflow.runtime.policy import Policy

MODES = ("wait", "switch", "ensemble", "resume")
Chunks = Float[np.ndarray, "N h a"]


class Plans:
    """What is planned for the coming steps of N copies: the newest chunk, or with `decay` = m the mean of all that
    were planned for a step, weighted by exp(-m i), i = 0 the oldest."""

    def __init__(self, copies: int, horizon: int, size: int, decay: float | None = None):
        shape = copies, horizon
        self._decay, self._total = decay, np.zeros((*shape, size), np.float32)
        self._weight, self._count = np.zeros((2, *shape, 1), np.float32)

    @property
    def known(self) -> Bool[np.ndarray, "N h"]:
        """Which of the coming steps have an action."""
        return self._weight[..., 0] > 0

    @property
    def actions(self) -> Chunks:
        """The actions of the coming steps, zeros where there is none."""
        return np.where(self._weight > 0, self._total / np.maximum(self._weight, 1e-30), 0.0).astype(np.float32)

    def add(self, chunk: Chunks, left: Int[np.ndarray, " N"], here: Bool[np.ndarray, " N"]) -> None:
        """Takes in the chunks of the copies `here`, of which the first `left` actions count."""
        given = (np.arange(chunk.shape[1])[None] < left[:, None])[..., None]
        if self._decay is None:
            self._total[here], self._weight[here] = chunk[here], given[here]
            return
        weight = here[:, None, None] * given * np.exp(-self._decay * self._count)
        self._total += weight * chunk
        self._weight += weight
        self._count += here[:, None, None] * given

    def advance(self) -> None:
        """A step passes."""
        for plans in (self._total, self._weight, self._count):
            passed(plans)

    def clear(self, copies: Any = slice(None)) -> None:
        """Forgets the plans of these copies."""
        for plans in (self._total, self._weight, self._count):
            plans[copies] = 0


def passed(plans: np.ndarray) -> None:
    """Moves plans [N, h, ...] by one step, in place."""
    plans[:, :-1] = plans[:, 1:]
    plans[:, -1] = 0


class Delayed:
    """`act(obs)` returns the actions [N, a] of one control step for N copies of an environment.

    Inferences begin every max(`execute`, `delay`) steps; with "wait" `execute` steps after the last chunk arrived.
    `ensemble` is the m of the weights exp(-m i), i = 0 the oldest plan. "resume" takes the policy's own rule, or
    guidance if it has none. `reset(copies)` discards the plans of copies that begin an episode.

    Raises UserError for an unknown mode, for a delay that the chunks or the training of the policy cannot bridge, and
    for observations of another number of copies.
    """

    def __init__(
        self,
        policy: Policy,
        copies: int = 1,
        delay: int = 0,
        mode: str = "resume",
        execute: int | None = None,
        ensemble: float = 0.01,
    ):
        horizon, execute = policy.spec.horizon, policy.spec.execute if execute is None else execute
        period = execute if mode == "wait" else max(execute, delay)
        if mode not in MODES:
            raise UserError(f"there is no mode {mode}: choose {', '.join(MODES)}")
        if delay < 0 or execute < 1 or period + (0 if mode == "wait" else delay) > horizon:
            raise UserError(
                f"chunks of {horizon} actions cannot bridge a delay of {delay} steps when {period} of them are carried "
                "out: use longer chunks, or a smaller execute"
            )
        if mode == "resume" and not hasattr(policy.network, "resume"):
            policy = Policy(realtime(policy.network), policy.spec, policy.env, policy.seed)
        rule = inner(policy.network, "rule")
        if mode == "resume" and isinstance(rule, Prefix) and delay > rule.delay_max:
            raise UserError(f"this policy was trained for delays up to {rule.delay_max}, not {delay}: use guidance")
        self._policy, self._mode, self._delay, self._period = policy, mode, delay, period
        shape = copies, horizon, policy.spec.action_dim // horizon
        self._known = Plans(*shape, ensemble if mode == "ensemble" else None)
        self._coming, self._left = np.zeros(shape, np.float32), np.zeros(copies, int)  # a chunk on its way
        self._wait = np.full(copies, -1)  # steps until it arrives; -1 for none
        self._age = np.full(copies, period)
        self._fresh = np.ones(copies, bool)

    def __call__(self, obs: Any, explore: bool = False) -> Float[np.ndarray, "N a"]:
        shape = np.shape(next(iter(ordered_leaves(obs)), ()))
        if shape[:1] != self._age.shape:
            raise UserError(f"observations of {len(self._age)} copies are needed, got shape {shape}")
        self._arrive()
        due = self._age >= self._period
        if due.any():
            self._begin(self._infer(obs, explore), due)
            self._arrive()
        action = self._known.actions[:, 0]
        self._advance()
        return action

    @property
    def stalled(self) -> Bool[np.ndarray, " N"]:
        """Whether a copy had no action in the last step."""
        return self._stalled

    def reset(self, copies: Any = slice(None)) -> None:
        """Discards the plans of these copies (a mask, indices or a slice)."""
        self._age[copies], self._wait[copies], self._fresh[copies] = self._period, -1, True
        self._known.clear(copies)

    def _infer(self, obs: Any, explore: bool) -> np.ndarray:
        if self._mode != "resume":
            return np.asarray(self._policy(obs, explore)).reshape(self._coming.shape)
        return self._policy.resume(obs, self._known.actions, self._known.known.sum(1), self._delay, explore)

    def _begin(self, chunk: np.ndarray, due: np.ndarray) -> None:
        self._coming[due], self._left[due] = chunk[due], chunk.shape[1]
        self._wait[due] = np.where(self._fresh, 0, self._delay)[due]
        self._age[due] = 0
        if self._mode == "wait":
            self._known.clear(due)
            self._age -= np.where(due, self._wait, 0)
        self._fresh &= ~due

    def _arrive(self) -> None:
        here = self._wait == 0
        self._known.add(self._coming, self._left, here)
        self._wait[here] = -1

    def _advance(self) -> None:
        self._stalled = ~self._known.known[:, 0]
        self._known.advance()
        if self._mode != "wait":
            passed(self._coming)
            self._left -= 1
        self._wait -= self._wait > 0
        self._age += 1


class Trial(NamedTuple):
    """One episode of each of N copies."""

    returns: Float[np.ndarray, " N"]
    steps: Int[np.ndarray, " N"]
    terminated: Bool[np.ndarray, " N"]
    stalled: Float[np.ndarray, " N"]
    """Share of the steps without an action."""
    jump: Float[np.ndarray, " N"]
    """Mean over steps of the distance between an action and the one before."""


def simulate(act: Delayed, env: Env, seed: int = 0, max_steps: int = 100_000) -> Trial:
    """Plays one episode in each copy of `env`, which takes single actions.

    Raises UserError if one does not end within `max_steps`.
    """
    step = partial(_step, env) if env.spec.jittable else env.step
    state, obs = env.reset(jr.key(seed))
    going, count = np.ones(env.spec.num_envs, bool), np.zeros(env.spec.num_envs, int)
    returns, stalled, jump = np.zeros((3, env.spec.num_envs))
    terminated, before = ~going, None
    for _ in range(max_steps):
        action = act(jax.tree.map(np.asarray, obs))
        state, out = step(state, action)
        count += going
        returns += np.where(going, np.asarray(out.reward), 0.0)
        stalled += going & act.stalled
        if before is not None:
            jump += np.where(going, np.linalg.norm(action - before, axis=-1), 0.0)
        terminated |= going & np.asarray(out.terminated)
        going &= ~np.asarray(out.terminated | out.truncated)
        if not going.any():
            return Trial(returns, count, terminated, stalled / count, jump / np.maximum(count - 1, 1))
        obs, before = out.obs, action
    raise UserError(f"an episode did not end within {max_steps} steps: give the environment a time limit")


@partial(jax.jit, static_argnums=0)
def _step(env: Env, state: Any, action: Any) -> Any:
    return env.step(state, action)


def latency(policy: Policy, obs: Any, calls: int = 50) -> Float[np.ndarray, " n"]:
    """Returns the seconds of `calls` inferences for one observation, after a first one that compiles."""
    policy(obs)
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        policy(obs)
        times.append(time.perf_counter() - began)
    return np.array(times)


def delay_steps(seconds: float, rate: float) -> int:
    """Returns the control steps, at `rate` steps per second, that begin during an inference of so many seconds."""
    return math.ceil(seconds * rate)
