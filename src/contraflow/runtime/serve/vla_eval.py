"""The protocol of the vla-eval harness, version 1, on the path /vla-eval (vla-eval 0.8.0).

The client speaks first. A frame is a dict of `type`, `payload`, `seq` and `timestamp`. `hello` is answered by `hello`
and `observation` by `action`, with the same `seq`; `episode_start` and `episode_end` have no answer. After an error the
connection stays open.

A benchmark asks before every step and carries out one action. Of a chunk the first `execute` actions are therefore
handed out one by one, and the next one is planned when they are used up or an episode begins.
"""

import asyncio
import time
from collections import deque
from typing import Any

import numpy as np
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from contraflow.core.codec import pack, unpack
from contraflow.core.settings import version
from contraflow.core.types import EnvSpec, UserError
from contraflow.runtime.serve.desk import Desk

PATH = "/vla-eval"
VERSION = 1


async def talk(connection: ServerConnection, desk: Desk) -> None:
    """Serves one client until it leaves."""
    session, seq = desk.session(), 0
    plan: deque[np.ndarray] = deque()
    async for frame in connection:
        begin = time.perf_counter()
        try:
            kind, payload, seq = await asyncio.to_thread(_message, frame)  # reading images takes a while
            if kind == "hello":
                await _send(connection, "hello", _hello(desk), seq)
            elif kind in ("episode_start", "episode_end"):
                plan.clear()
                if kind == "episode_start":
                    session.reset()
            elif kind == "observation":
                desk.received()
                if not plan:
                    found = await desk.answer(fields(payload, desk.policy.spec), session)
                    plan.extend(found.actions[: desk.policy.spec.execute])
                await _send(connection, "action", {"actions": plan.popleft()}, seq)
                desk.metrics.served(time.perf_counter() - begin)
        except ConnectionClosed:
            raise
        except Exception as error:
            said = f"observation_failed: {type(error).__name__}: {desk.complaint(error)}"
            await _send(connection, "error", {"error": said}, seq)


async def _send(connection: ServerConnection, kind: str, payload: dict[str, Any], seq: int) -> None:
    message = {"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()}
    await connection.send(pack(message, text_keys=True))


def _message(frame: Any) -> tuple[str, dict[str, Any], int]:
    if isinstance(frame, str):
        raise UserError("messages are sent as binary frames of msgpack, this one is text")
    message = unpack(frame, images=True)
    if not isinstance(message, dict):
        raise UserError("a message must be a dict of type, payload and seq")
    kind, payload, seq = (message.get(name) for name in ("type", "payload", "seq"))
    if not (isinstance(kind, str) and isinstance(payload, dict) and type(seq) is int):
        raise UserError("a message must be a dict of type, payload and seq")
    return kind, payload, seq


def _hello(desk: Desk) -> dict[str, Any]:
    name = f"contraflow {desk.metadata['policy']}"
    return {"harness_version": version(), "protocol_version": VERSION, "model_server": name, "capabilities": {}}


def fields(payload: dict[str, Any], spec: EnvSpec) -> dict[str, Any]:
    """Returns the observation of a benchmark as named arrays: its cameras by their names, and `state`.

    The only camera of a benchmark serves the only image of a policy, whatever their names.
    """
    images = payload.get("images", {})
    if not isinstance(images, dict):
        raise UserError("images must be a dict of cameras")
    out = {key: value for key, value in payload.items() if key != "images"} | images
    if "states" in out:
        out.setdefault("state", out["states"])
    wanted = [part for part in spec.obs_parts if part.image]
    if len(wanted) == len(images) == 1:
        out[wanted[0].name or "image"] = next(iter(images.values()))
    return out
