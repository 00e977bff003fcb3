"""Reinforcement learning with policies that are flow-matching or diffusion models."""

from importlib.metadata import PackageNotFoundError, version

from contraflow.agents import AGENTS, RFM, SAC, SIR
from contraflow.runtime.policy import Policy, load
from contraflow.train.run import Result, Run, resume, train
from contraflow.types import EnvSpec, Step, Transition, UserError

try:
    __version__ = version("contraflow")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "AGENTS",
    "RFM",
    "SAC",
    "SIR",
    "EnvSpec",
    "Policy",
    "Result",
    "Run",
    "Step",
    "Transition",
    "UserError",
    "__version__",
    "load",
    "resume",
    "train",
]
