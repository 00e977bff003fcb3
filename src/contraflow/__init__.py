"""Reinforcement learning with policies that are flow-matching or diffusion models."""

from contraflow.agents.online.rfm import RFM
from contraflow.agents.online.sac import SAC
from contraflow.agents.online.sir import SIR
from contraflow.core.settings import VERSION as __version__
from contraflow.core.types import Batch, EnvSpec, Step, UserError
from contraflow.rl.critics import Critics
from contraflow.runtime.policy import Policy, load
from contraflow.train.run import Result, Run, resume, train
from contraflow.train.seeds import resume_seeds, train_seeds

__all__ = [
    "RFM",
    "SAC",
    "SIR",
    "Batch",
    "Critics",
    "EnvSpec",
    "Policy",
    "Result",
    "Run",
    "Step",
    "UserError",
    "__version__",
    "load",
    "resume",
    "resume_seeds",
    "train",
    "train_seeds",
]
