"""The server: one port for both protocols, health and metrics; inference runs in a thread beside it.

Without a key it answers everyone who reaches it. It listens on this machine alone unless it is given another host, and
refuses requests that a web page sends from a browser.
"""

import asyncio
import base64
import hmac
import http
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as listen
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from contraflow.core import interrupt
from contraflow.core.types import UserError
from contraflow.runtime.policy import Policy
from contraflow.runtime.serve import openpi, vla_eval
from contraflow.runtime.serve.desk import Desk

MOST_BYTES = 1 << 26  # of one frame: six cameras of 640 x 480 x 3 fit
MOST_CLIENTS = 256
FAREWELL = 2.0  # seconds for a client to agree that the connection is closed


@dataclass(frozen=True)
class Address:
    """Where a server listens, and the key that it asks for ("" for none). Port 0 is any free one."""

    host: str = "127.0.0.1"
    port: int = 8000
    key: str = ""

    def __post_init__(self):
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must lie in 0 to 65535, got {self.port}")


def admitted(headers: Headers, key: str) -> bool:
    """Returns whether the headers hold the key, compared in constant time; always true without one.

    `Authorization: Api-Key KEY` is what clients of openpi send; `Basic` with KEY as the password is what websocket
    clients make of ws://user:KEY@host.
    """
    if not key:
        return True
    given = headers.get_all("Authorization")
    kind, _, secret = (given[0] if len(given) == 1 else "").partition(" ")
    found = secret.strip().encode("utf-8", "replace")
    if kind.lower() == "basic":
        with suppress(ValueError):
            found = base64.b64decode(found).partition(b":")[2]
    return hmac.compare_digest(found, key.encode()) and kind.lower() in ("api-key", "basic")


async def serve(desk: Desk, address: Address, ready: Callable[[int], None], stop: asyncio.Event) -> None:
    """Serves until `stop` is set; calls `ready` with the port once clients can connect.

    Raises UserError if the address cannot be used.
    """
    metrics = desk.metrics
    quiet = logging.getLogger("contraflow.serve.websockets")
    quiet.setLevel(logging.CRITICAL)  # strangers who speak another protocol are no news

    def gate(connection: ServerConnection, request: Request) -> Response | None:
        path = request.path.partition("?")[0]
        alive = desk.worker.alive
        if path in ("/healthz", "/health"):
            status = http.HTTPStatus.OK if alive else http.HTTPStatus.SERVICE_UNAVAILABLE
            if path == "/healthz":
                return connection.respond(status, "OK\n" if alive else "the worker has stopped\n")
            answer = connection.respond(status, f'{{"status": "{"ok" if alive else "stopped"}"}}\n')
            del answer.headers["Content-Type"]
            answer.headers["Content-Type"] = "application/json"
            return answer
        if not admitted(request.headers, address.key):
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "this server asks for its key\n")
        if path == "/metrics":
            return connection.respond(http.HTTPStatus.OK, metrics.text(desk.worker.batches))
        if metrics.clients >= MOST_CLIENTS:
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "this server has too many clients\n")
        return None

    async def handle(connection: ServerConnection) -> None:
        assert connection.request is not None
        path = connection.request.path.partition("?")[0].rstrip("/")
        metrics.clients += 1
        try:
            await (vla_eval if path == vla_eval.PATH else openpi).talk(connection, desk)
        except ConnectionClosed:
            pass
        finally:
            metrics.clients -= 1

    # Only browsers send an origin. Pings are sent but not waited for: a simulator may be busy for minutes.
    settings = {"compression": None, "origins": [None], "ping_timeout": None, "server_header": None, "logger": quiet}
    limits = {"max_size": MOST_BYTES, "max_queue": 1, "close_timeout": FAREWELL}
    try:
        server = await listen(handle, address.host, address.port, process_request=gate, **settings, **limits)
    except OSError as error:
        reason = f"{address.host} port {address.port} cannot be used ({error.strerror or error})"
        raise UserError(f"{reason}: choose another --host or --port") from None
    async with server:
        ready(next(iter(server.sockets)).getsockname()[1])
        await stop.wait()


def run(desk: Desk, address: Address, ready: Callable[[int], None]) -> None:
    """Serves from the main thread until Ctrl-C or SIGTERM; a second one ends the process at once."""

    async def until_signal() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()

        def noted() -> None:
            if stop.is_set():
                interrupt.end()
            stop.set()

        for number in interrupt.SIGNALS:
            loop.add_signal_handler(number, noted)
        await serve(desk, address, ready, stop)

    try:
        asyncio.run(until_signal())
    finally:
        desk.close()


@contextmanager
def running(policy: Policy, address: Address = Address(port=0), batch: int = 8, debug: bool = False) -> Iterator[int]:
    """Serves in a thread, for notebooks and tests, and yields the port; ends with the context."""
    desk = Desk(policy, batch, debug=debug)
    started: Future[tuple[int, Callable[[], None]]] = Future()

    async def until_told() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()

        def end() -> None:
            loop.call_soon_threadsafe(stop.set)

        await serve(desk, address, lambda port: started.set_result((port, end)), stop)

    def target() -> None:
        try:
            asyncio.run(until_told())
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    thread = threading.Thread(target=target, name="contraflow-server", daemon=True)
    thread.start()
    try:
        port, end = started.result()
        try:
            yield port
        finally:
            end()
    finally:
        thread.join()
        desk.close()
