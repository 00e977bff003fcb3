"""A trained policy as a function from observations to actions, on NumPy arrays."""

from pathlib import Path
from typing import Any

import jax
import jax.random as jr
import numpy as np

from contraflow.core.flatten import ordered_leaves
from contraflow.core.observation import misfit, shown
from contraflow.core.trust import Trust
from contraflow.core.types import EnvSpec, UserError
from contraflow.policy import base
from contraflow.policy.artifact import load_policy, policy_folder
from contraflow.policy.served import Served, connection, is_address, served


class Policy:
    """`policy(obs)` maps observations [o] or [N, o] to actions [a] or [N, a] in [-1, 1], or chunks [h, a] or [N, h, a].

    If the policy takes more than a vector, obs is an image [H, W, C] or a dict of parts, or N of them.

    Observations are numbered. The noise of an action depends only on `seed` and that number, so a fresh Policy repeats
    itself. `network` is the acting pytree (`contraflow.policy.base.Policy`). Raises UserError for observations of
    another shape.
    """

    def __init__(self, network: base.Policy, spec: EnvSpec, env: str, seed: int = 0):
        self.network, self.spec, self.env = network, spec, env
        self.seed, self._key, self._seen = seed, jr.key(seed), 0

    @classmethod
    def from_pretrained(cls, path: str | Path, seed: int = 0, trust: Trust = "") -> "Policy":
        """Returns the policy in a run folder, a policy folder, or a folder that `contraflow pull` made; see `load`."""
        if not Path(path).is_dir():
            raise UserError(
                f"{path} is no folder: fetch a policy from the hub with `contraflow pull {path} --out FOLDER`"
            )
        return load(path, seed, trust)

    def __call__(self, obs: Any, explore: bool = False) -> np.ndarray:
        many, batch = self._batch(obs)
        actions = np.asarray(base.act_batch(self.network, batch, self._key, self._seen, not explore))
        self._seen += len(actions)
        if self.spec.horizon > 1:
            actions = actions.reshape(len(actions), self.spec.horizon, -1)
        return actions if many else actions[0]

    def resume(self, obs: Any, previous: Any, left: Any, delay: int, explore: bool = False) -> np.ndarray:
        """Returns chunks [N, h, a] for observations [N, ...] that begin with the first `delay` actions of `previous`.

        Of `previous` [N, h, a], which begins with the action that is executed next, the first `left` [N] are known.
        Raises UserError for a policy that cannot resume (`contraflow.policy.realtime`).
        """
        if not hasattr(self.network, "resume"):
            raise UserError("this policy cannot resume chunks: wrap it, contraflow.policy.realtime.realtime(policy)")
        many, batch = self._batch(obs)
        if not many:
            raise UserError("resume takes several observations: add a leading axis")
        plans = np.asarray(previous, np.float32), np.asarray(left, np.int32), np.int32(delay)
        chunks = np.asarray(base.resume_batch(self.network, batch, *plans, self._key, self._seen, not explore))
        self._seen += len(chunks)
        return chunks

    def _batch(self, obs: Any) -> tuple[bool, Any]:
        """Returns whether there are many observations, and the batch of them. Raises UserError for other shapes."""
        if not (parts := self.spec.obs_parts):
            obs = np.asarray(obs, np.float32)
            if obs.shape[-1:] != (self.spec.obs_dim,) or obs.ndim > 2:
                raise UserError(f"this policy takes observations of size {self.spec.obs_dim}, got shape {obs.shape}")
            return obs.ndim == 2, obs if obs.ndim == 2 else obs[None]
        obs = {key: _array(x) for key, x in obs.items()} if isinstance(obs, dict) else _array(obs)
        first = next(iter(ordered_leaves(obs)), np.zeros(()))
        many = first.ndim > len(parts[0].shape)
        if problem := misfit(parts, obs, *first.shape[: int(many)]):
            raise UserError(f"this policy takes {shown(parts)}, the observation {problem}")
        return many, obs if many else jax.tree.map(lambda x: x[None], obs)

    def __repr__(self) -> str:
        spec, chunk = self.spec, ""
        if spec.horizon > 1:
            chunk = f", chunks of {spec.horizon} of which {spec.execute} are executed"
        actions = spec.action_dim // spec.horizon
        kind = type(base.innermost(self.network)).__name__
        return f"Policy({kind} for {self.env}: {shown(spec.observation)} observations, {actions} actions{chunk})"

    def raw(self, action: Any) -> np.ndarray:
        """Maps actions [..., a] of this policy to the range of the environment or data that it was trained on.

        A robot needs this. The environments of this library take [-1, 1] themselves. Without a known range, actions
        are returned unchanged.
        """
        action, spec = np.asarray(action), self.spec
        if not spec.low:
            return action
        low, high = (np.asarray(bound, action.dtype) for bound in (spec.low, spec.high))
        return np.clip((low + high) / 2 + action * ((high - low) / 2), low, high)


def _array(x: Any) -> np.ndarray:
    """Converts numbers to float32 but keeps bytes, so that images of bytes and of floats in [0, 1] are not confused."""
    array = np.asarray(x)
    return array.astype(np.float32) if array.dtype.kind in "biuf" and array.dtype != np.uint8 else array


def load(path: str | Path, seed: int = 0, trust: Trust = "") -> Policy:
    """Returns the policy in a run folder or a policy folder, or the one served at ws://host:port.

    `trust` names modules outside the library that may be imported for parts of the policy, separated by commas. Raises
    UserError if there is no policy, it is damaged, or a part of it is served where nobody answers.
    """
    if isinstance(path, str) and is_address(path):
        return Policy(*served(path), seed=seed)
    network, spec, env = load_policy(policy_folder(Path(path)), trust)
    for part in jax.tree.leaves(network, is_leaf=lambda x: isinstance(x, Served)):
        if isinstance(part, Served):
            connection(part.address)
    return Policy(network, spec, env, seed=seed)
