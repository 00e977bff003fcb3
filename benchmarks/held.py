"""Tasks of EnvPool in which every action is held for four steps (E3 of docs/study.md): one decision is four steps."""

from dataclasses import replace
from typing import Any

import numpy as np

from contraflow.core.types import EnvSpec, PRNGKey, Step
from contraflow.envs.chunk import Chunked
from contraflow.envs.envpool import EnvPool

HOLD = 4


class _Held:
    """A chunk of four equal actions; the reward is their sum."""

    task = ""

    def __init__(self, num_envs: int, seed: int) -> None:
        self._env = Chunked(EnvPool(self.task, num_envs, seed), HOLD, HOLD)

    @property
    def spec(self) -> EnvSpec:
        spec = self._env.spec
        return replace(spec, action_dim=spec.action_dim // HOLD, horizon=1, execute=1)

    def reset(self, key: PRNGKey) -> tuple[Any, Any]:
        return self._env.reset(key)

    def step(self, state: Any, action: Any) -> tuple[Any, Step]:
        return self._env.step(state, np.tile(np.asarray(action), (1, HOLD)))

    def close(self) -> None:
        self._env.close()


class CartpoleSwingup(_Held):
    task = "CartpoleSwingup-v1"


class WalkerWalk(_Held):
    task = "WalkerWalk-v1"
