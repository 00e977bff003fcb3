"""Presets with what they do often done less often, for two cores."""

import dataclasses
from dataclasses import replace
from typing import Any

from contraflow.agents.online.pmd import Candidates
from contraflow.flow.likelihood import Denoising
from contraflow.flow.model import Ddim
from contraflow.flow.posterior.importance import Reverse
from contraflow.flow.solver import Euler
from contraflow.policy.best_of import Argmax, First, Softmax


def shrunk(part: Any) -> Any:
    """Settings with at most 32 candidates for an estimate (16 in PMD; what `Pooled` joins keeps its own), 8 actions to
    choose from, 10 solver steps, and 64 evaluations for a log-density by denoising."""
    if isinstance(part, Reverse):
        return replace(part, samples=min(part.samples, 32))
    if isinstance(part, Softmax | Argmax | First):
        return replace(part, particles=min(part.particles, 8))
    if isinstance(part, Euler | Ddim):
        return replace(part, steps=min(part.steps, 10))
    if isinstance(part, Denoising):
        return Denoising(levels=8, probes=8)
    if isinstance(part, Candidates):
        return replace(part, own=min(part.own, 16))
    mine = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
    return replace(part, **{k: shrunk(v) for k, v in mine.items() if dataclasses.is_dataclass(v)})
