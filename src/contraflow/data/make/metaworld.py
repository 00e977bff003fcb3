"""Makes datasets of MetaWorld (1910.10897) with the scripted policies of the package `metaworld`, in the tasks of
EnvPool.

- `expert`: the scripted policy as it is. `noisy`: with Gaussian noise whose standard deviation is drawn for each
  episode between 0 and `NOISE`, and a share `RANDOM` of uniform actions.

An episode is as long as the task; success does not end it. The layout is that of plain arrays, with a column `success`.
"""

import warnings
from typing import Any

import numpy as np

from contraflow.core.errors import UserError
from contraflow.core.settings import suggest
from contraflow.data.make.episodes import Arrays, Recipe

PREFIX = "metaworld:"
KINDS = ("expert", "noisy")
NOISE, RANDOM = 0.5, 0.1
STEPS = 500


INSTALL = 'pip install "contraflow[envpool,mujoco]", then pip install --no-deps metaworld (which names an older mujoco)'


def find(name: str, seed: int = 0) -> Recipe:
    """Returns the recipe of a set such as `metaworld:drawer-open-noisy`. Raises UserError for other names, or if the
    package is missing."""
    task, _, kind = name.removeprefix(PREFIX).rpartition("-")
    if kind not in KINDS:
        raise UserError(f"{name} is no set of MetaWorld: write {PREFIX}TASK-expert or {PREFIX}TASK-noisy")
    try:
        known = [known.removesuffix("-v3") for known in _scripts()]
    except ImportError as error:
        raise UserError(f"{name} needs the package metaworld ({error}): {INSTALL}") from None
    if task not in known:
        raise UserError(f"MetaWorld has no task {task}; {suggest(task, known)}")
    constants = {"env": f"envpool:{_id(task)}", "low": np.float32(-1), "high": np.float32(1)}
    return Recipe(name, seed, STEPS, Script, ("metaworld", "envpool"), INSTALL, constants)


def _id(task: str) -> str:
    return "MetaWorld/" + "".join(word.capitalize() for word in task.split("-")) + "-v3"


def _scripts() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of syntax in its docstrings
        from metaworld.policies import ENV_POLICY_MAP
    return ENV_POLICY_MAP


class Script:
    """A scripted policy in its task."""

    def __init__(self, name: str):
        import envpool

        task, _, kind = name.removeprefix(PREFIX).rpartition("-")
        self.policy, self.noisy = _scripts()[f"{task}-v3"], kind == "noisy"
        options = {"num_envs": 1, "num_threads": 1, "max_episode_steps": STEPS, "partially_observable": False}
        self.pool = lambda seed: envpool.make_gymnasium(_id(task), seed=seed, **options)

    def run(self, rng: np.random.Generator) -> Arrays:
        """Returns one episode."""
        policy, noise, rows = self.policy(), rng.uniform(0, NOISE) if self.noisy else 0.0, []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of gains that the policies choose, and of EnvPool's own bounds
            pool = self.pool(int(rng.integers(2**31)))
            obs = pool.reset()[0][0]
            for i in range(STEPS):
                action = np.asarray(policy.get_action(obs), np.float64)
                if self.noisy:
                    action = action + noise * rng.standard_normal(4)
                    action = rng.uniform(-1, 1, 4) if rng.random() < RANDOM else action
                action = np.clip(action, -1, 1).astype(np.float32)
                (following,), (reward,), (terminated,), _, info = pool.step(action[None])
                rows.append((obs, action, reward, following, terminated, i == STEPS - 1, info["success"][0] > 0))
                obs = following
            pool.close()
        columns = (np.array(column) for column in zip(*rows, strict=True))
        names = "obs", "action", "reward", "next_obs", "terminated", "truncated", "success"
        return {n: x if x.dtype == bool else x.astype(np.float32) for n, x in zip(names, columns, strict=True)}
