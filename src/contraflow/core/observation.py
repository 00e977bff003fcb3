"""Descriptions of observations (a vector, an image, or a dict of both) for networks, replay and checks."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from contraflow.core.flatten import ordered_leaves


@dataclass(frozen=True)
class Part:
    """One array of an observation that is not a single vector: an image [H, W, C] of bytes or floats, or a vector [k].

    `name` is its key in the dict, or "" if the observation is this array alone. Raises ValueError for another rank or
    for a vector of bytes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Literal["float32", "uint8"] = "float32"

    def __post_init__(self):
        if len(self.shape) not in (1, 3) or (len(self.shape) == 1 and self.dtype == "uint8"):
            raise ValueError(f"{self}: a part must be a vector [k] of floats or an image [height, width, channels]")

    @property
    def image(self) -> bool:
        return len(self.shape) == 3

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)} {self.dtype}".lstrip()


Observation = int | tuple[Part, ...]
"""The size of a vector, or the parts of any other observation."""


def blank(observation: Observation, *lead: int) -> Any:
    """Returns the shapes and types of observations [*lead, ...]."""
    if isinstance(observation, int):
        return jax.ShapeDtypeStruct((*lead, observation), np.float32)
    leaves = {part.name: jax.ShapeDtypeStruct((*lead, *part.shape), part.dtype) for part in observation}
    return leaves.get("", leaves)


def shown(observation: Observation) -> str:
    """Returns text for messages: 5, or image [64, 64, 3] uint8 + state [5] float32."""
    return str(observation) if isinstance(observation, int) else " + ".join(map(str, observation))


def misfit(parts: tuple[Part, ...], obs: Any, *lead: int) -> str | None:
    """Says how observations [*lead, ...] differ from these parts, as the rest of a sentence; None if they match."""
    want = blank(parts, *lead)
    if isinstance(want, dict) and not (isinstance(obs, dict) and obs.keys() == want.keys()):
        have = f"the parts {', '.join(sorted(map(str, obs)))}" if isinstance(obs, dict) else "no parts"
        return f"has {have} where {', '.join(want)} are needed"
    for part, have, need in zip(parts, ordered_leaves(obs), ordered_leaves(want), strict=True):
        if have.shape != need.shape or have.dtype != need.dtype:
            name = f"{part.name} of " if part.name else ""
            return f"has {name}shape {have.shape} {have.dtype} where {need.shape} {need.dtype} is needed"
    return None


def rows(obs: Any) -> int:
    """Returns the number n of observations [n, ...]."""
    return ordered_leaves(obs)[0].shape[0]
