"""OGBench's single tasks, `ogbench:cube-single-play-singletask-task1-v0`, with the package's names for task and data.

The episode ends with success, one step after the step that reached it. A step is judged by the state it starts from, as
in the rewards of the data (`contraflow.data.datasets.readers`).
"""

import warnings
from typing import Any

import numpy as np

from contraflow.core.ogbench import KINDS, PREFIX, single_task
from contraflow.core.types import PRNGKey, Step, UserError
from contraflow.envs import base
from contraflow.envs.gymnasium import Gymnasium

SCRIPTED = ("cube", "scene", "puzzle")  # worlds with play and noisy data; the others have walks


def check(name: str) -> str:
    """Returns the id in Gymnasium. Raises UserError if OGBench is missing or has no such task."""
    if (registry := _registry()) is None:
        raise UserError(
            f"environment {PREFIX}{name} needs the package ogbench (Python below 3.13): "
            'pip install "contraflow[ogbench]"'
        )
    id = single_task(name)
    if id not in registry:
        raise base.unknown_id(f"{PREFIX}{name}")
    return id


def available() -> list[str]:
    """Returns the tasks without image observations, under the names of their data; [] without OGBench."""
    ids = []
    for id in sorted(_registry() or ()):
        world, found, task = id.partition("-singletask")
        if found and not id.startswith("visual-"):
            kinds = KINDS[:2] if world.startswith(SCRIPTED) else KINDS[2:4]
            ids += [f"{world}-{kind}-singletask{task}" for kind in kinds]
    return ids


def _registry() -> dict[str, Any] | None:
    """Returns Gymnasium's registry with OGBench's environments; None if OGBench is not installed."""
    base.prefer_egl()
    try:
        with base.quiet():
            import gymnasium
            import ogbench  # noqa: F401 - registers its environments
    except ImportError:
        return None
    return gymnasium.registry


class OGBench(Gymnasium):
    """Silences Gymnasium's warnings about precision. These environments rebuild their spaces in every reset."""

    def reset(self, key: PRNGKey) -> tuple[np.ndarray, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return super().reset(key)

    def step(self, state: np.ndarray, action: Any, active: np.ndarray | None = None) -> tuple[np.ndarray, Step]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return super().step(state, action, active)


def make(name: str, num_envs: int, seed: int, render: bool) -> OGBench:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return OGBench(check(name), num_envs, seed, render=render)


# A copy takes 130 MiB. A reset rebuilds its model, which takes a second.
KIND = base.Kind(make, check, available, jittable=False, renders=True, most=10)
