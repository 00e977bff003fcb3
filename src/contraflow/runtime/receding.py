"""Receding-horizon execution: single actions from a policy that plans chunks of actions."""

from typing import Any

import numpy as np

from contraflow.core.flatten import ordered_leaves
from contraflow.core.types import UserError
from contraflow.runtime.policy import Policy


class Receding:
    """`act(obs)` returns the actions [N, a] of one step for observations [N, o] of N copies of an environment.

    - A chunk is planned, its first `execute` actions are carried out, and the next chunk is planned (2303.04137).
    - With `ensemble` = m a chunk is planned at every step. The action is the mean of all actions planned for that step
      and copy, weighted by exp(-m i), with i = 0 the oldest (ACT, 2304.13705). The mean blurs multimodal actions.
    - `reset(copies)` discards the plans of copies that begin an episode.

    Raises UserError for `execute` beyond the horizon, and for observations of another number of copies.
    """

    def __init__(self, policy: Policy, copies: int = 1, execute: int | None = None, ensemble: float | None = None):
        horizon = policy.spec.horizon
        self._execute = policy.spec.execute if execute is None else execute
        if not 1 <= self._execute <= horizon:
            raise UserError(f"this policy plans {horizon} actions: execute 1 to {horizon} of them, not {self._execute}")
        self._policy, self._decay = policy, ensemble
        shape = copies, horizon, policy.spec.action_dim // horizon
        self._total, self._weight = np.zeros(shape, np.float32), np.zeros((*shape[:2], 1), np.float32)
        self._planned = np.zeros((*shape[:2], 1), np.float32)  # number of plans so far for each coming step
        self._age = np.full(copies, self._execute)  # steps since the copy's last plan

    def __call__(self, obs: Any, explore: bool = False) -> np.ndarray:
        shape = np.shape(next(iter(ordered_leaves(obs)), ()))
        if shape[:1] != self._age.shape:
            raise UserError(f"observations of {len(self._age)} copies are needed, got shape {shape}")
        due = self._age >= (self._execute if self._decay is None else 1)
        if due.any():
            self._plan(np.asarray(self._policy(obs, explore)).reshape(self._total.shape), due)
        action = self._total[:, 0] / self._weight[:, 0]
        for plans in (self._total, self._weight, self._planned):
            plans[:, :-1] = plans[:, 1:]
            plans[:, -1] = 0
        self._age += 1
        return action

    def reset(self, copies: Any = slice(None)) -> None:
        """Discards the plans of these copies (a mask, indices or a slice)."""
        self._age[copies] = self._execute
        for plans in (self._total, self._weight, self._planned):
            plans[copies] = 0

    def _plan(self, chunk: np.ndarray, due: np.ndarray) -> None:
        if self._decay is None:
            self._total[due], self._weight[due] = chunk[due], 1
        else:
            weight = np.exp(-self._decay * self._planned)
            self._total += weight * chunk
            self._weight += weight
            self._planned += 1
        self._age[due] = 0
