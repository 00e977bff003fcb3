"""The websocket protocol of openpi, as its client speaks it (openpi-client 0.1.2).

The server speaks first and sends its metadata. Each frame of the client holds a dict, the observation, and is answered
by a dict with `actions` (h, a). An error is answered by a frame of text, and the connection is closed with code 1011.

The client's action-chunk broker takes row after row of every array in an answer, so actions are the only array in it.
"""

import time
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from contraflow.core.codec import pack, unpack
from contraflow.core.types import UserError
from contraflow.runtime.serve.desk import Desk

CODE, REASON = 1011, "Internal server error. See the previous frame."


async def talk(connection: ServerConnection, desk: Desk) -> None:
    """Serves one client until it leaves."""
    await connection.send(pack(desk.metadata))
    session, before = desk.session(), None
    async for frame in connection:
        begin = desk.received()
        try:
            if isinstance(frame, str):
                raise UserError("observations are sent as binary frames of msgpack, this one is text")
            found = await desk.answer(unpack(frame), session)
            answered = time.perf_counter() - begin
            timing: dict[str, Any] = {"infer_ms": 1e3 * answered}
            if before is not None:
                timing["prev_total_ms"] = 1e3 * before
            reply = {
                "actions": found.actions,
                "policy_timing": {"infer_ms": 1e3 * found.seconds},
                "server_timing": timing,
            }
            await connection.send(pack(reply))
        except ConnectionClosed:
            raise
        except Exception as error:
            await connection.send(desk.complaint(error))
            await connection.close(CODE, REASON)
            return
        before = time.perf_counter() - begin
        desk.metrics.served(before)
