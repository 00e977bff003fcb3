"""Where the protocols hand in requests: sessions, keys for the noise, metrics, and what an error says to a client."""

import asyncio
import itertools
import logging
import time
import traceback
import zlib
from collections import OrderedDict
from typing import Any

from contraflow.core.settings import version
from contraflow.core.types import UserError
from contraflow.policy.base import innermost
from contraflow.runtime.policy import Policy
from contraflow.runtime.serve.metrics import Metrics
from contraflow.runtime.serve.request import ALWAYS, Request, parts, read
from contraflow.runtime.serve.worker import Answer, Worker

MOST_SESSIONS = 4096  # those asked longest ago are forgotten
log = logging.getLogger("contraflow.serve")


class Session:
    """What numbers the noise of an episode: how often it was reset, and its requests since."""

    def __init__(self, name: str):
        self._id, self._resets, self._count = zlib.crc32(name.encode()), 0, 0

    def reset(self) -> None:
        """Begins an episode."""
        self._resets, self._count = self._resets + 1, 0

    def words(self, seed: int) -> tuple[int, int, int, int]:
        """Returns four numbers for a key that no other request of this session has."""
        self._count += 1
        return seed, self._id, self._resets % 2**32, self._count % 2**32


class Desk:
    """Answers requests with the actions of a policy. `revision` says which weights it has; `debug` tells clients all
    about errors."""

    def __init__(self, policy: Policy, batch: int, seed: int = 0, revision: str = "", debug: bool = False):
        self.policy, self.metrics = policy, Metrics()
        self.worker = Worker(policy, batch)
        self._seed, self._revision, self._debug = seed, revision, debug
        self._numbers = itertools.count(1)
        self._sessions: OrderedDict[str, Session] = OrderedDict()

    def session(self) -> Session:
        """Returns the session of a new connection, for requests that name none."""
        return Session(f"connection {next(self._numbers)}")

    async def answer(self, fields: Any, session: Session) -> Answer:
        """Returns the actions for the fields of a request. Raises UserError for what is wrong with them."""
        request = read(fields, self.policy.spec, self.worker.takes)
        return await asyncio.wrap_future(self.worker.submit(request, self._words(request, session)))

    def _words(self, request: Request, session: Session) -> tuple[int, int, int, int]:
        if request.session is not None:
            session = self._sessions.setdefault(request.session, Session(request.session))
            self._sessions.move_to_end(request.session)
            if len(self._sessions) > MOST_SESSIONS:
                self._sessions.popitem(last=False)
        if request.reset:
            session.reset()
        words = session.words(self._seed)
        return words if request.seed is None else (request.seed, 0, 0, 0)

    @property
    def metadata(self) -> dict[str, Any]:
        """What a client learns about the policy before its first request."""
        spec = self.policy.spec
        size = spec.action_dim // spec.horizon
        return {
            "policy": type(innermost(self.policy.network)).__name__,
            "env": self.policy.env,
            "revision": self._revision,
            "contraflow": version(),
            "observation": {key: {"shape": list(part.shape), "dtype": part.dtype} for key, part in parts(spec).items()},
            "action_horizon": spec.horizon,
            "action_dim": size,
            "execute": spec.execute,
            "action_low": list(spec.low or (-1.0,) * size),
            "action_high": list(spec.high or (1.0,) * size),
            "noise_shape": [spec.horizon, size] if "noise" in self.worker.takes else None,
            "supports": sorted({*ALWAYS, *self.worker.takes}),
        }

    def complaint(self, error: Exception) -> str:
        """Counts an error and returns what its client hears: one line, or the whole traceback in debug mode.

        What the client can correct is named. Of anything else it hears the kind and a number, under which the log has
        the traceback.
        """
        self.metrics.errors += 1
        number = self.metrics.errors
        if not isinstance(error, UserError):
            log.error("error %d in the policy", number, exc_info=error)
        if self._debug:
            return "".join(traceback.format_exception(error))
        if isinstance(error, UserError):
            return f"{' '.join(str(error).split())} (error {number})"
        return f"{type(error).__name__} in the policy; the log of the server says more (error {number})"

    def received(self) -> float:
        """Counts a request and returns the time."""
        self.metrics.requests += 1
        return time.perf_counter()

    def close(self) -> None:
        """Ends the worker; nothing may be asked afterwards."""
        self.worker.close()
