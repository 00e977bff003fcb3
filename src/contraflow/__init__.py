"""Reinforcement learning with policies that are flow-matching or diffusion models."""

from contraflow.agents import AGENTS, RFM, SAC, SIR
from contraflow.core.settings import VERSION as __version__
from contraflow.core.types import EnvSpec, Step, Transition, UserError
from contraflow.rl.critics import Critics
from contraflow.runtime.policy import Policy, load
from contraflow.train.run import Result, Run, resume, train
from contraflow.train.seeds import resume_seeds, train_seeds

__all__ = [
    "AGENTS",
    "RFM",
    "SAC",
    "SIR",
    "Critics",
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
    "resume_seeds",
    "train",
    "train_seeds",
]
