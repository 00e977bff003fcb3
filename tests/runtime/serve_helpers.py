"""Small policies to serve, and clients of the server."""

import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from contraflow.agents.offline.bc import BC
from contraflow.core.types import EnvSpec
from contraflow.flow.model import Ddim, FlowSpec
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.flow import FlowPolicy
from contraflow.runtime.policy import Policy

SPEC = EnvSpec(3, 8, 1, None, False, horizon=4, execute=2, low=(-2.0, 0.1), high=(2.0, 0.7))
ONE = EnvSpec(3, 2, 1, None, False)
OBS = np.array([0.5, -1.0, 2.0], np.float32)


def flow_policy(spec: EnvSpec = SPEC) -> Policy:
    """A flow with small weights, so that few of its actions are clipped, as `bc` saves it."""
    agent = BC(flow=FlowSpec(solver=Ddim(3), network=ResidualMLP(8, 1, 4)))
    policy = agent.policy(agent.init(jr.key(0), spec))
    flow = jax.tree.map(lambda x: 0.3 * x, policy.policy.flow)
    return Policy(replace(policy, policy=FlowPolicy(flow)), spec, "probe:action")


class Echo(eqx.Module):
    """Acts as the first two numbers it observes; cannot start from noise."""

    scale: jax.Array

    def __call__(self, obs, key, greedy=True):
        return self.scale * obs[:2]


class Asks(eqx.Module):
    """Acts as `ask` says, a Python function of observations that runs on the host."""

    scale: jax.Array
    ask: Any = eqx.field(static=True)

    def __call__(self, obs, key, greedy=True):
        out = jax.ShapeDtypeStruct((2,), np.float32)
        return jax.pure_callback(self.ask, out, obs, vmap_method="sequential")


class Continues(Echo):
    """Continues a chunk of 8 numbers: says what it was handed."""

    def __call__(self, obs, key, greedy=True):
        return jnp.zeros(8)

    def resume(self, obs, prev, left, delay, key):
        return prev.at[-1, 0].set(left / 8).at[-1, 1].set(delay / 8)


def echo(spec: EnvSpec = ONE) -> Policy:
    return Policy(Echo(jnp.ones(())), spec, "probe:action")


class Gate:
    """A policy that waits, as `Echo` otherwise: inference takes until `open` is set."""

    def __init__(self):
        self.open, self.waiting = threading.Event(), threading.Semaphore(0)
        self.open.set()

    def policy(self) -> Policy:
        return Policy(Asks(jnp.ones(()), self._ask), ONE, "probe:action")

    def shut(self) -> None:
        """From here on requests wait."""
        self.open.clear()
        while self.waiting.acquire(blocking=False):  # those of the first compilation
            pass

    def _ask(self, obs: np.ndarray) -> np.ndarray:
        self.waiting.release()
        assert self.open.wait(60)
        return np.asarray(obs)[:2] / 10


@contextmanager
def client(port: int, key: str | None = None, host: str = "127.0.0.1") -> Iterator[Any]:
    """The client of openpi, unchanged; it has no way to say goodbye itself."""
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    found = WebsocketClientPolicy(host, port, key)
    with closing(found._ws):
        yield found


def get(port: int, path: str, **headers: str) -> tuple[int, str]:
    """Status and text of an HTTP request."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def metric(port: int, name: str) -> float:
    line = next(line for line in get(port, "/metrics")[1].splitlines() if line.startswith(f"contraflow_{name} "))
    return float(line.split()[1])


def mutations(frames: list[bytes], count: int, seed: int) -> Iterator[bytes]:
    """Frames that were valid: bits flipped, bytes replaced, cut out or put in, also from another frame."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        frame = bytearray(frames[rng.integers(len(frames))])
        for _ in range(rng.integers(1, 4)):
            at, kind = int(rng.integers(len(frame) + 1)), rng.integers(8)
            if kind == 0:
                del frame[at : at + int(rng.integers(1, 9))]
            elif kind == 1:
                frame[at:at] = rng.bytes(int(rng.integers(1, 9)))
            elif kind == 2:
                frame[at : at + 1] = bytes([rng.choice([0x90, 0xDD, 0xDF, 0xC6, 0xC9, 0xFF, 0xCF, 0xDE, 0xC1])])
            elif kind == 3:
                frame = frame[:at]
            elif kind == 4:
                other = frames[rng.integers(len(frames))]
                frame[at:at] = other[int(rng.integers(len(other))) :]
            elif kind == 5:
                frame[at : at + 4] = rng.bytes(4)
            elif at < len(frame):
                frame[at] ^= 1 << int(rng.integers(8))
        yield bytes(frame)
