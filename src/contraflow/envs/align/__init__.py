"""Problems of reward alignment as environments: `align:digits`, or `align:digits/ink` with another reward."""

from typing import Any

from contraflow.core.beside import Beside
from contraflow.envs import base
from contraflow.envs.align.digits import Digits, images
from contraflow.envs.align.generation import Generation, Problem, Reward
from contraflow.envs.align.glyphs import Glyphs
from contraflow.envs.align.mixture import Mixture2d
from contraflow.envs.align.reward import ONNX as ONNX
from contraflow.envs.align.reward import rewards as rewards

PREFIX = "align:"
PROBLEMS: dict[str, Any] = {"mixture2d": Mixture2d(), "digits": Digits(), "glyphs": Glyphs()}


def find(name: str) -> tuple[Problem, Reward | Beside]:
    """Returns the problem and the reward of `digits` or `digits/ink`. Raises UserError for other names."""
    problem, slash, reward = name.partition("/")
    if problem not in PROBLEMS:
        raise base.unknown_id(f"align:{name}", tuple(PROBLEMS))
    found = PROBLEMS[problem]
    if problem == "digits":
        images()  # says which package is missing
    return found, rewards(found, (reward,) if slash else ())[0]


def _make(name: str, num_envs: int, seed: int, render: bool) -> Generation:
    problem, reward = find(name)
    return Generation(problem, (reward,), num_envs=num_envs)


KIND = base.Kind(_make, find, lambda: list(PROBLEMS), jittable=None)  # a judge may be outside of JAX
