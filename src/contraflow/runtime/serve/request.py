"""The fields of a request as an observation of the policy and the optional keys, checked.

noise       start noise (H, A) or (1, H, A) of the flow: the action is the end of the flow from it
seed        whole number: the action depends on the observation and this number alone
session     text: the noise of a session depends on its name and on its number of resets and requests
reset       true: an episode of the session begins
prev_chunk  (k, A): what is left of the last chunk, in the range of the robot, from the next action on
delay       number of its actions that will be carried out before the answer arrives
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from contraflow.core.bounds import action_range
from contraflow.core.observation import Part
from contraflow.core.types import EnvSpec, UserError

PREFIX = "observation/"
SHOWN = 8  # keys in a message
ALWAYS = ("seed", "reset", "session")
OPTIONS = ("noise", *ALWAYS, "prev_chunk", "delay")
MISSING = {
    "noise": "this policy cannot start from given noise: leave out noise",
    "rtc": "this policy cannot continue a chunk: leave out prev_chunk and delay",
}
"""What a client hears that asks for what the policy cannot do."""


@dataclass(frozen=True)
class Request:
    """One observation, and what the optional keys say. `noise` is [h a]; `prev` [h, a] in [-1, 1] is padded with zeros
    behind its first `left` actions."""

    obs: Any
    seed: int | None = None
    reset: bool = False
    session: str | None = None
    noise: np.ndarray | None = None
    prev: np.ndarray | None = None
    left: int = 0
    delay: int = 0

    @property
    def alone(self) -> bool:
        """Whether it is computed alone: sums of a larger batch may round differently."""
        return self.seed is not None or self.noise is not None or self.prev is not None


def parts(spec: EnvSpec) -> dict[str, Part]:
    """Returns the arrays of an observation by the key under which clients send them."""
    if not spec.obs_parts:
        return {f"{PREFIX}state": Part("state", (spec.obs_dim,))}
    named = {part: part.name or "image" for part in spec.obs_parts}
    return {name if name.startswith(PREFIX) else PREFIX + name: part for part, name in named.items()}


def read(fields: Any, spec: EnvSpec, takes: frozenset[str]) -> Request:
    """Returns the request in a dict of fields; `takes` may hold "noise" and "rtc". Fields of other names are ignored.

    A part is found with or without the prefix observation/. An observation of a single array may have any name if it
    is the only array of the request. Raises UserError for what is missing or does not fit.
    """
    if not isinstance(fields, dict):
        raise UserError(f"a request must be a dict of named arrays, not {type(fields).__name__}")
    wanted = parts(spec)
    rest = {key: value for key, value in fields.items() if key not in OPTIONS}
    found = {part.name: _fit(key, part, _find(rest, key, len(wanted) == 1)) for key, part in wanted.items()}
    obs = found if spec.obs_parts and "" not in found else next(iter(found.values()))
    return Request(obs, **_options({key: fields[key] for key in OPTIONS if key in fields}, spec, takes))


def _find(fields: dict[Any, Any], key: str, single: bool) -> Any:
    for name in (key, key.removeprefix(PREFIX)):
        if name in fields:
            return fields[name]
    arrays = [value for value in fields.values() if isinstance(value, np.ndarray)]
    if single and len(arrays) == 1:
        return arrays[0]
    names = ", ".join(str(name)[:40] for name in list(fields)[:SHOWN] if isinstance(name, str)) or "none"
    raise UserError(f"the observation lacks {key}; its keys: {names}")


def _fit(key: str, part: Part, value: Any) -> np.ndarray:
    array = _numbers(value, key)
    same = (array.dtype == np.uint8) == (part.dtype == "uint8")
    if array.shape != part.shape or (part.image and not same):
        want, have = (f"{list(x.shape)} of {x.dtype}" for x in (part, array))
        raise UserError(f"{key} must have shape {want}, got {have}")
    array = array.astype(part.dtype, copy=False)
    if not np.isfinite(array).all():
        raise UserError(f"{key} is not finite")
    return array


def _numbers(value: Any, name: str) -> np.ndarray:
    """An array of numbers. Lists are read for clients that are not written in Python."""
    try:
        array = np.asarray(value)
    except ValueError:
        raise UserError(f"{name} must be an array of numbers") from None
    if array.dtype.kind not in "biuf":
        raise UserError(f"{name} must be an array of numbers")
    with np.errstate(over="ignore"):  # becomes infinite, which is refused
        return array if array.dtype == np.uint8 else array.astype(np.float32, copy=False)


def _options(given: dict[str, Any], spec: EnvSpec, takes: frozenset[str]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if "seed" in given:
        out["seed"] = _whole(given["seed"], "seed", 2**32 - 1)
    if "reset" in given:
        if not isinstance(given["reset"], bool | np.bool_):
            raise UserError("reset must be true or false")
        out["reset"] = bool(given["reset"])
    if "session" in given:
        if not (isinstance(given["session"], str) and 0 < len(given["session"]) <= 100):
            raise UserError("session must be a text of 1 to 100 characters")
        out["session"] = given["session"]
    for key, ability in (("noise", "noise"), ("prev_chunk", "rtc"), ("delay", "rtc")):
        if key in given and ability not in takes:
            raise UserError(MISSING[ability])
    if "noise" in given and "prev_chunk" in given:
        raise UserError("give noise or prev_chunk, not both")
    if "noise" in given:
        out["noise"] = _chunk(given["noise"], "noise", spec, spec.horizon).reshape(-1)
    delay = _whole(given.get("delay", 0), "delay", spec.horizon - 1)
    if "prev_chunk" in given:
        if "delay" not in given:
            raise UserError("prev_chunk needs delay, the number of its actions carried out before the answer arrives")
        out |= _left(_chunk(given["prev_chunk"], "prev_chunk", spec, None), spec, delay)
    return out


def _whole(value: Any, name: str, most: int) -> int:
    value = value.item() if isinstance(value, np.generic | np.ndarray) and value.shape == () else value
    if type(value) is not int or not 0 <= value <= most:
        raise UserError(f"{name} must be a whole number from 0 to {most}")
    return value


def _chunk(value: Any, name: str, spec: EnvSpec, length: int | None) -> np.ndarray:
    """Actions [k, a] that were sent with or without a leading axis of length 1; k is `length` unless that is None."""
    array, size = _numbers(value, name).astype(np.float32), spec.action_dim // spec.horizon
    if array.ndim == 3 and len(array) == 1:
        array = array[0]
    if array.shape == (size,):
        array = array[None]
    if (
        array.ndim != 2
        or array.shape[1] != size
        or not 1 <= len(array) <= spec.horizon
        or length not in (None, len(array))
    ):
        rows = f"1 to {spec.horizon}" if length is None else length
        raise UserError(f"{name} must have shape ({rows}, {size}), got {np.shape(value)}")
    if not np.isfinite(array).all():
        raise UserError(f"{name} is not finite")
    return array


def _left(chunk: np.ndarray, spec: EnvSpec, delay: int) -> dict[str, Any]:
    if delay > len(chunk):
        raise UserError(f"prev_chunk has {len(chunk)} actions, fewer than the delay of {delay}")
    low, high = (bound.astype(np.float32) for bound in action_range(spec))
    unit = np.clip((2 * chunk - low - high) / (high - low), -1.0, 1.0)
    padded = np.concatenate([unit, np.zeros((spec.horizon - len(unit), unit.shape[1]), np.float32)])
    return {"prev": padded, "left": len(chunk), "delay": delay}
