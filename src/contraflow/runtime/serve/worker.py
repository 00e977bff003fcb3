"""Inference in a thread: requests that wait are computed together, while the server goes on listening."""

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, UInt32

from contraflow.core.observation import blank
from contraflow.core.types import PRNGKey, UserError
from contraflow.policy.abilities import abilities, ability
from contraflow.runtime.policy import Policy
from contraflow.runtime.serve.request import Request

Words = UInt32[Array, "B 4"]
"""Four numbers for each request, of which its key is made."""


@dataclass(frozen=True)
class Answer:
    """Actions [h, a] in the range of the robot, and the seconds that computing their batch took."""

    actions: np.ndarray
    seconds: float


@dataclass(frozen=True)
class Job:
    """A request, the numbers that its key is made of, and the promise of its answer."""

    request: Request
    words: tuple[int, int, int, int]
    answer: Future = field(default_factory=Future)


def _key(words: UInt32[Array, "4"]) -> PRNGKey:
    key = jr.key(words[0])
    for word in (words[1], words[2], words[3]):
        key = jr.fold_in(key, word)
    return key


@jax.jit
def _act(policy: Any, obs: Any, words: Words) -> Float[Array, "B d"]:
    return jax.vmap(lambda o, w: policy(o, _key(w), True))(obs, words)


@jax.jit
def _steer(policy: Any, obs: Any, words: Words, noise: Float[Array, "B d"]) -> Float[Array, "B d"]:
    def one(o: Any, w: UInt32[Array, "4"], x0: Float[Array, " d"]) -> Float[Array, " d"]:
        method, o = ability(policy, o, "from_noise")
        return method(o, x0, _key(w))

    return jax.vmap(one)(obs, words, noise)


@jax.jit
def _resume(
    policy: Any, obs: Any, words: Words, prev: Float[Array, "B h a"], left: Any, delay: Any
) -> Float[Array, "B h a"]:
    def one(o: Any, w: UInt32[Array, "4"], *rest: Any) -> Float[Array, "h a"]:
        method, o = ability(policy, o, "resume")
        return method(o, *rest, _key(w))

    return jax.vmap(one)(obs, words, prev, left, delay)


class Worker:
    """Computes the actions of requests in a thread, those that wait in one batch of at most `most`.

    Batches are padded to powers of two, all of which are compiled at the start. A request with noise, a seed or a
    previous chunk is computed alone, so its answer does not depend on who else asks.
    """

    def __init__(self, policy: Policy, most: int):
        self.policy, self.takes = policy, abilities(policy.network)
        self.batches = 0
        self._sizes = [2**i for i in range(most.bit_length()) if 2**i < most] + [most]
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._warm()
        self._thread = threading.Thread(target=self._work, name="contraflow-worker", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, request: Request, words: tuple[int, int, int, int]) -> "Future[Answer]":
        """Returns the promise of an answer."""
        job = Job(request, words)
        self._queue.put(job)
        return job.answer

    def close(self) -> None:
        """Ends the thread after what it is computing."""
        self._queue.put(None)
        self._thread.join()

    def _warm(self) -> None:
        spec = self.policy.spec
        obs = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), blank(spec.observation))
        none = np.zeros(spec.action_dim, np.float32)
        for size in self._sizes:
            self._compute([Job(Request(obs), (0, 0, 0, 0))] * size)
        if "noise" in self.takes:
            self._compute([Job(Request(obs, noise=none), (0, 0, 0, 0))])
        if "rtc" in self.takes:
            self._compute([Job(Request(obs, prev=none.reshape(spec.horizon, -1), left=1), (0, 0, 0, 0))])

    def _work(self) -> None:
        waiting: deque[Job] = deque()
        while True:
            for job in self._arrived(block=not waiting):
                if job is None:
                    return
                waiting.append(job)
            group = [waiting.popleft()]
            while waiting and len(group) < self._sizes[-1] and not (group[0].request.alone or waiting[0].request.alone):
                group.append(waiting.popleft())
            if group := [job for job in group if job.answer.set_running_or_notify_cancel()]:
                self._answer(group)

    def _arrived(self, block: bool) -> Iterator[Job | None]:
        try:
            while True:
                yield self._queue.get(block)
                block = False
        except queue.Empty:
            return

    def _answer(self, group: list[Job]) -> None:
        begin = time.perf_counter()
        try:
            actions = self._compute(group)
        except Exception as error:
            for job in group:
                job.answer.set_exception(error)
            return
        self.batches += 1
        seconds = time.perf_counter() - begin
        for job, action in zip(group, actions, strict=True):
            if np.isfinite(action).all():
                job.answer.set_result(Answer(action, seconds))
            else:
                job.answer.set_exception(UserError("the policy returned actions that are not finite; none are sent"))

    def _compute(self, group: list[Job]) -> np.ndarray:
        """Returns the actions [n, h, a] of n requests of one kind."""
        n, first, spec = len(group), group[0].request, self.policy.spec
        size = next(size for size in self._sizes if size >= n)
        rows = group + [group[-1]] * (size - n)
        obs = jax.tree.map(lambda *x: np.stack(x), *(job.request.obs for job in rows))
        network, words = self.policy.network, np.asarray([job.words for job in rows], np.uint32)
        if first.noise is not None:
            actions = _steer(network, obs, words, first.noise[None])
        elif first.prev is not None:
            left, delay = (np.asarray([number], np.int32) for number in (first.left, first.delay))
            actions = _resume(network, obs, words, first.prev[None], left, delay)
        else:
            actions = _act(network, obs, words)
        return self.policy.raw(np.asarray(actions)[:n].reshape(n, spec.horizon, -1))
