"""Rewards by name: those of a problem, functions of the user's own, and models as ONNX files.

A function `module:function` is traced once with one sample x [d] and one condition c [c]. If JAX can trace it to one
number, it is a reward in JAX: training is one compiled loop, and its gradient is known. Otherwise, and if it has the
attribute `host = True`, it is called in a process of its own with NumPy arrays, x [n, d] and c [n, c], and returns [n].
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from contraflow.core.beside import Beside
from contraflow.core.settings import import_path, suggest
from contraflow.core.trust import Trust
from contraflow.core.types import UserError
from contraflow.envs.align.generation import Problem, Reward

ONNX = "onnx:"


def rewards(problem: Problem, names: tuple[str, ...], trust: Trust = "") -> tuple[Reward | Beside, ...]:
    """Returns rewards by name, the problem's default without any.

    Raises UserError for an unknown one, code that is not trusted and a missing file.
    """
    return tuple(_find(problem, name, trust) for name in names) or (next(iter(problem.rewards.values())),)


def _find(problem: Problem, name: str, trust: Trust) -> Reward | Beside:
    known = dict(problem.rewards)
    if name in known:
        return known[name]
    if name.startswith(ONNX):
        file = Path(name.removeprefix(ONNX))
        if not file.is_file():
            raise UserError(f"--reward {name}: there is no file {file}")
        shape, images = getattr(problem, "shape", ()), getattr(problem, "images", None)
        return Beside(f"--reward {name}", onnx, str(file.resolve()), shape, images, why=IN_ONNX)
    if ":" in name:
        return own(name, problem.sizes, trust)
    raise UserError(f"there is no reward {name!r} here; {suggest(name, known)}; your own is module:function")


@dataclass(frozen=True)
class Traced:
    """The user's function as a float."""

    function: Callable[..., Any]

    def __call__(self, x: Float[Array, " d"], cond: Float[Array, " c"]) -> Float[Array, ""]:
        return jnp.asarray(self.function(x, cond), jnp.float32)


def own(name: str, sizes: tuple[int, int], trust: Trust) -> Reward | Beside:
    """Returns the reward of `module:function`. Raises UserError for code that is not trusted or cannot be called."""
    function = import_path(name, trust)
    if not callable(function):
        raise UserError(f"--reward {name} is no function but a {type(function).__name__}")
    why = "it says host = True"
    if not getattr(function, "host", False):
        one = [jax.ShapeDtypeStruct((size,), jnp.float32) for size in sizes]
        try:
            shape = jax.eval_shape(Traced(function), *one).shape
        except Exception as error:  # the user's code may raise anything
            why = (
                f"JAX could not trace it for one sample ({type(error).__name__}: {str(error).split(chr(10))[0][:120]})"
            )
        else:
            if shape == ():
                return Traced(function)
            why = f"traced for one sample it returned shape {shape}, not one number"
    return Beside(f"--reward {name}", import_path, name, trust, why=f"it was called with arrays because {why}")


IN_ONNX = "it takes samples [n, d] or images, and perhaps conditions [n, c], and returns [n] or [n, c]"
Images = Callable[[np.ndarray], np.ndarray]


def onnx(
    file: str, shape: tuple[int, ...], images: Images | None = None
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Returns the reward of a model, called in a process of its own.

    Its first input are samples: [n, d], or images [n, h, w], [n, 1, h, w] or [n, h, w, 1] where it has such a rank. A
    problem whose samples are no images has `images`, which makes images [n, h, w] of them: the model then gets these,
    [n, h w] in place of [n, d]. A second input are conditions. Its output is [n] or [n, 1], or [n, c], numbers of which
    the condition picks one: log-probabilities of classes under a one-hot condition.
    """
    session = session_of(file)
    inputs = session.get_inputs()

    def call(x: np.ndarray, cond: np.ndarray) -> np.ndarray:
        rank, x = len(inputs[0].shape), x if images is None else images(x).reshape(len(x), -1)
        if rank > 2:
            last = rank == 4 and inputs[0].shape[3] == 1
            x = x.reshape(len(x), *((1,) if rank == 4 and not last else ()), *shape, *((1,) if last else ()))
        given = dict(zip([i.name for i in inputs], (x, cond), strict=False))
        out = np.asarray(session.run(None, given)[0])
        return (
            np.sum(out * cond, -1) if out.shape == cond.shape and cond.shape[1] > 1 else out.reshape(len(x), -1)[:, 0]
        )

    return call


def session_of(file: str) -> Any:
    """Returns the model of an ONNX file on the CPU. Raises UserError if onnxruntime is missing."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError('rewards as ONNX files need onnxruntime: pip install "contraflow[align]"') from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = max(1, (os.cpu_count() or 2) // 2)
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
