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


class Policy:
    """`policy(obs)` with obs [o] or [N, o] gives actions [a] or [N, a] in [-1, 1], of chunks [h, a] or [N, h, a].

    Where the policy sees more than a vector, obs is an image [H, W, C] or a dict of parts, or N of them.

    Observations are numbered: the noise of an action depends on `seed` and that number only, so a fresh Policy repeats
    itself. `network` is what acts, a pytree (`contraflow.policy.base.Policy`).
    """

    def __init__(self, network: base.Policy, spec: EnvSpec, env: str, seed: int = 0):
        self.network, self.spec, self.env = network, spec, env
        self._key, self._seen = jr.key(seed), 0

    def __call__(self, obs: Any, explore: bool = False) -> np.ndarray:
        many, batch = self._batch(obs)
        actions = np.asarray(base.act_batch(self.network, batch, self._key, self._seen, not explore))
        self._seen += len(actions)
        if self.spec.horizon > 1:
            actions = actions.reshape(len(actions), self.spec.horizon, -1)
        return actions if many else actions[0]

    def _batch(self, obs: Any) -> tuple[bool, Any]:
        """Whether there are many observations, and all of them, of one the only. Raises UserError for other shapes."""
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
        """Actions [..., a] of this policy in the range of the environment or the data that it was trained on.

        Our own environments take [-1, 1] and need this not; a robot does. [-1, 1] stays where no other range is known.
        """
        action, spec = np.asarray(action), self.spec
        if not spec.low:
            return action
        low, high = (np.asarray(bound, action.dtype) for bound in (spec.low, spec.high))
        return np.clip((low + high) / 2 + action * ((high - low) / 2), low, high)


def _array(x: Any) -> np.ndarray:
    """Floats as float32. Bytes stay bytes: an image in [0, 1] where they are meant, or the reverse, is refused."""
    array = np.asarray(x)
    return array.astype(np.float32) if array.dtype.kind in "biuf" and array.dtype != np.uint8 else array


def load(path: str | Path, seed: int = 0, trust: Trust = "") -> Policy:
    """The policy in a run folder or a policy folder. Raises UserError if there is none or it is damaged.

    `trust` names modules outside the library that may be imported for parts of the policy, separated by commas.
    """
    return Policy(*load_policy(policy_folder(Path(path)), trust), seed=seed)
