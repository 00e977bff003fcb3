"""Reinforcement learning with policies that are flow-matching or diffusion models.

Names are imported when they are first asked for: `import contraflow` alone imports nothing heavy.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contraflow.agents.online.rfm import RFM as RFM
    from contraflow.agents.online.sac import SAC as SAC
    from contraflow.agents.online.sir import SIR as SIR
    from contraflow.core.observation import Part as Part
    from contraflow.core.types import Batch as Batch
    from contraflow.core.types import EnvSpec as EnvSpec
    from contraflow.core.types import Step as Step
    from contraflow.core.types import UserError as UserError
    from contraflow.nets.encoder import Pixels as Pixels
    from contraflow.rl.critics import Critics as Critics
    from contraflow.runtime.policy import Policy as Policy
    from contraflow.runtime.policy import load as load
    from contraflow.training.run import Result as Result
    from contraflow.training.run import Run as Run
    from contraflow.training.run import resume as resume
    from contraflow.training.run import resume_seeds as resume_seeds
    from contraflow.training.run import train as train
    from contraflow.training.run import train_seeds as train_seeds
    from contraflow.training.sources import Dataset as Dataset
    from contraflow.training.sources import OfflineToOnline as OfflineToOnline
    from contraflow.training.sources import Replay as Replay
    from contraflow.training.sources import Rollouts as Rollouts

_PLACES = {
    "RFM": "agents.online.rfm",
    "SAC": "agents.online.sac",
    "SIR": "agents.online.sir",
    "Critics": "rl.critics",
    "EnvSpec": "core.types",
    "Part": "core.observation",
    "Pixels": "nets.encoder",
    "Policy": "runtime.policy",
    "Result": "training.run",
    "Run": "training.run",
    "Step": "core.types",
    "UserError": "core.errors",
    "Batch": "core.types",
    "Dataset": "training.sources",
    "OfflineToOnline": "training.sources",
    "Replay": "training.sources",
    "Rollouts": "training.sources",
    "load": "runtime.policy",
    "resume": "training.run",
    "resume_seeds": "training.run",
    "train": "training.run",
    "train_seeds": "training.run",
}
__all__ = [*_PLACES, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from contraflow.core.settings import version

        return version()
    if name not in _PLACES:
        raise AttributeError(f"module 'contraflow' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"contraflow.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
