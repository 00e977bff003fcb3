"""A policy that `contraflow serve` computes elsewhere: each action is one request of openpi's protocol.

It is a policy as any other, without arrays: it can be evaluated, recorded, saved within another policy and steered by
its noise. A compiled program asks through a callback to the host, row after row.
"""

import threading
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from contraflow.core.bounds import action_range
from contraflow.core.errors import IN_CALLBACK
from contraflow.core.flatten import ordered_leaves
from contraflow.core.observation import Part
from contraflow.core.types import EnvSpec, PRNGKey, UserError
from contraflow.policy.base import Cost

SCHEMES = ("ws://", "wss://")
PREFIX = "observation/"
TIMEOUT = 30.0  # seconds to connect


def is_address(where: str) -> bool:
    """Returns whether `where` is the address of a served policy and no folder."""
    return where.startswith(SCHEMES)


class Connection:
    """A client of openpi's protocol: `ask(fields)` returns the actions [h, a] of an answer, in the range of the robot.

    Raises UserError where no server answers, and with its words where it refuses.
    """

    def __init__(self, address: str):
        try:
            from websockets.exceptions import WebSocketException
            from websockets.sync.client import connect

            from contraflow.core.codec import pack, unpack
        except ModuleNotFoundError as error:
            raise UserError(f'a served policy needs {error.name}: pip install "contraflow[serve]"') from None
        if "@" in address:
            raise UserError(
                f"{address.rpartition('@')[2]}: an address with a key would be written down with the run: leave out "
                "the key, and reach a server that asks for one through a tunnel"
            )
        self.address, self._pack, self._unpack = address, pack, unpack
        self._failures = (OSError, WebSocketException)
        self._lock = threading.Lock()
        try:
            self._open = ExitStack()  # a connection must be a context
            self._socket = self._open.enter_context(
                connect(address, compression=None, max_size=None, open_timeout=TIMEOUT)
            )
            self.metadata: dict[str, Any] = unpack(self._frame())
        except (*self._failures, ValueError) as error:
            raise UserError(f"no policy is served at {address} ({error}): start `contraflow serve`") from None

    def ask(self, fields: dict[str, Any]) -> np.ndarray:
        """Returns the actions for the fields of a request."""
        with self._lock:
            try:
                self._socket.send(self._pack(fields))
                answer = self._frame()
            except self._failures as error:
                raise UserError(f"{self.address} answers no longer ({error}): start `contraflow serve` again") from None
        return self._unpack(answer)["actions"]

    def _frame(self) -> bytes:
        frame = self._socket.recv()
        if isinstance(frame, str):
            raise UserError(f"{self.address} refuses: {frame}")
        return frame

    def close(self) -> None:
        """Says goodbye."""
        with suppress(Exception):
            self._open.close()


_connections: dict[str, Connection] = {}


def connection(address: str) -> Connection:
    """Returns the connection of this process to an address, a new one if there is none."""
    if address not in _connections:
        _connections[address] = Connection(address)
    return _connections[address]


class Served(eqx.Module):
    """The policy at an address. `keys` name the arrays of an observation, in the order of their parts; `spec` and
    `revision` are what the server said when the policy was chosen. Raises UserError if another one answers."""

    address: str = eqx.field(static=True)
    keys: tuple[str, ...] = eqx.field(static=True)
    spec: EnvSpec = eqx.field(static=True)
    revision: str = eqx.field(static=True)

    def from_noise(self, obs: Any, x0: Float[Array, " d"], key: PRNGKey | None = None) -> Float[Array, " d"]:
        """Returns the action that the served flow maps x_0 to."""
        return self._call(obs, {"noise": x0})

    def resume(
        self, obs: Any, previous: Float[Array, "h a"], left: Any, delay: Any, key: PRNGKey, greedy: bool = True
    ) -> Float[Array, "h a"]:
        """Returns a chunk that begins with the first `delay` actions of `previous`, of which `left` are known."""
        options = {"previous": previous, "left": left, "delay": delay, "seed": jr.bits(key)}
        return self._call(obs, options).reshape(previous.shape)

    def __call__(self, obs: Any, key: PRNGKey, greedy: bool = True) -> Float[Array, " d"]:
        return self._call(obs, {"seed": jr.bits(key)})

    def _call(self, obs: Any, options: dict[str, Any]) -> Float[Array, " d"]:
        out = jax.ShapeDtypeStruct((self.spec.action_dim,), jnp.float32)
        return jax.pure_callback(partial(self.ask), out, obs, options, vmap_method="sequential")

    def ask(self, obs: Any, options: dict[str, Any]) -> np.ndarray:
        """Returns the action [d] in [-1, 1] for one observation, asked from the host."""
        server, spec = connection(self.address), self.spec
        low, high = (bound.astype(np.float32) for bound in action_range(spec))
        fields: dict[str, Any] = dict(zip(self.keys, map(np.asarray, ordered_leaves(obs)), strict=True))
        if "noise" in options:
            fields["noise"] = np.asarray(options["noise"], np.float32).reshape(spec.horizon, -1)
        else:
            fields["seed"] = int(options["seed"])
        if int(options.get("left", 0)):
            previous = np.asarray(options["previous"], np.float32)[: int(options["left"])]
            fields["prev_chunk"] = (low + high) / 2 + previous * ((high - low) / 2) if spec.low else previous
            fields["delay"] = int(options["delay"])
        try:
            if (now := str(server.metadata.get("revision", ""))) != self.revision:
                raise UserError(
                    f"{self.address} serves revision {now} of a policy, not {self.revision} as before: serve that one"
                )
            actions = np.asarray(server.ask(fields), np.float32)
        except UserError as error:
            IN_CALLBACK.append(error)
            _connections.pop(self.address, server).close()  # the next request finds a server that came back
            raise
        return (np.clip((2 * actions - low - high) / (high - low), -1, 1) if spec.low else actions).reshape(-1)

    @property
    def cost(self) -> Cost:
        """One request; what it costs the server is not known."""
        return Cost(1, 1, 0)


def served(address: str) -> tuple[Served, EnvSpec, str]:
    """Returns the policy at an address, its sizes and its environment, as the server describes them.

    Raises UserError where no policy answers, or a server that does not describe its policy as `contraflow serve` does.
    """
    about = connection(address).metadata
    try:
        shapes = {key: tuple(part["shape"]) for key, part in about["observation"].items()}
        names = {key: key.removeprefix(PREFIX) for key in shapes}
        horizon, size = int(about["action_horizon"]), int(about["action_dim"])
        low, high = (tuple(map(float, about[name])) for name in ("action_low", "action_high"))
        keys = tuple(sorted(shapes, key=lambda key: names[key]))
        vector = list(names.values()) == ["state"] and len(shapes[keys[0]]) == 1
        alone = list(names.values()) == ["image"]
        parts = () if vector else tuple(
            Part("" if alone else names[key], shapes[key], about["observation"][key]["dtype"]) for key in keys
        )  # fmt: skip
        unit = set(low) == {-1.0} and set(high) == {1.0}
        spec = EnvSpec(
            sum(int(np.prod(shape)) for shape in shapes.values()), horizon * size, 1, None, False, horizon,
            int(about["execute"]), () if unit else low, () if unit else high, obs_parts=parts,
        )  # fmt: skip
        return Served(address, keys, spec, str(about["revision"])), spec, str(about["env"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{address} does not describe its policy ({type(error).__name__}: {error}): use `contraflow serve`"
        ) from None
