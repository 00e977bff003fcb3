"""A trained policy as a function from observations to actions."""

from pathlib import Path
from typing import Any

import jax.random as jr
import numpy as np

from contraflow.agents.base import acting_state
from contraflow.core.types import EnvSpec, UserError
from contraflow.train.artifact import load_policy, policy_folder
from contraflow.train.evaluate import act_batch


class Policy:
    """`policy(obs)` with obs [o] or [N, o] gives actions [a] or [N, a] in [-1, 1].

    Observations are numbered: the noise of an action depends on `seed` and that number only, so a fresh Policy repeats
    itself.
    """

    def __init__(self, agent: Any, spec: EnvSpec, env: str, state: Any, seed: int = 0):
        self.agent, self.spec, self.env = agent, spec, env
        self.state = acting_state(agent, state)
        self._key, self._seen = jr.key(seed), 0

    def __call__(self, obs: Any, explore: bool = False) -> np.ndarray:
        obs = np.asarray(obs, np.float32)
        if obs.shape[-1:] != (self.spec.obs_dim,) or obs.ndim > 2:
            raise UserError(f"this policy takes observations of size {self.spec.obs_dim}, got shape {obs.shape}")
        batch = obs if obs.ndim == 2 else obs[None]
        actions = np.asarray(act_batch(self.agent, self.state, batch, self._key, self._seen, explore))
        self._seen += len(batch)
        return actions if obs.ndim == 2 else actions[0]

    def raw(self, action: Any) -> np.ndarray:
        """Actions [..., a] of this policy in the range of the environment or the data that it was trained on.

        Our own environments take [-1, 1] and need this not; a robot does. [-1, 1] stays where no other range is known.
        """
        action, spec = np.asarray(action), self.spec
        if not spec.low:
            return action
        low, high = (np.tile(np.asarray(bound, action.dtype), spec.horizon) for bound in (spec.low, spec.high))
        return np.clip((low + high) / 2 + action * ((high - low) / 2), low, high)


def load(path: str | Path, seed: int = 0, trust: bool = False) -> Policy:
    """The policy in a run folder or a policy folder. Raises UserError if there is none or it is damaged.

    `trust` allows a policy whose agent is code outside the library to import that code.
    """
    return Policy(*load_policy(policy_folder(Path(path)), trust), seed=seed)
