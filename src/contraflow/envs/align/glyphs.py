"""Images of numbers from 00 to 99, 28 x 28, under their digits; two OCR models reward and judge (extra `glyphs`).

A sample is not the image but 96 numbers, its principal components: a flow in the space of a decoder, as in latent
diffusion.

Both models were trained by others on other images: the recogniser of RapidOCR (PP-OCRv4) rewards, the one of ddddocr
judges. They run as ONNX files in processes of their own; the packages that hold the files are not imported.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from contraflow.core.beside import Beside
from contraflow.core.types import UserError
from contraflow.envs.align.generation import Reward
from contraflow.envs.align.reward import session_of

SIDE, COUNT, PARTS = 28, 10_000, 96
REWARD, JUDGE = "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx", "ddddocr/common_old.onnx"
FLOOR = 1e-4  # of the probability of a digit: the logarithm has an end

Read = Callable[[np.ndarray, np.ndarray], np.ndarray]


@cache
def images() -> tuple[np.ndarray, np.ndarray]:
    """(images [n, 784] in [-1, 1], numbers [n]): Pillow's own font, with random place, size and noise."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        raise _missing("pillow") from None
    rng, large = np.random.default_rng(0), 4 * SIDE
    numbers = rng.integers(100, size=COUNT)
    sizes, places = rng.uniform(16.0, 19.0, COUNT), rng.uniform(-1.5, 1.5, (COUNT, 2))
    fonts = {size: ImageFont.load_default(size) for size in range(60, 81)}  # in the large image
    x = np.empty((COUNT, SIDE * SIDE), np.float32)
    for i in range(COUNT):
        image = Image.new("L", (large, large))
        at = tuple(large / 2 + 4 * places[i])
        ImageDraw.Draw(image).text(at, f"{numbers[i]:02d}", fill=255, font=fonts[round(4 * sizes[i])], anchor="mm")
        x[i] = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32).ravel() / 127.5 - 1.0
    return np.clip(x + 0.05 * rng.normal(size=x.shape).astype(np.float32), -1.0, 1.0), numbers


@cache
def decoder() -> tuple[np.ndarray, np.ndarray]:
    """(mean [784], directions [96, 784]): an image is mean + z @ directions, with deviation 1/3 in each z."""
    x, _ = images()
    mean = x.mean(0)
    values, vectors = np.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    return mean, (3.0 * np.sqrt(values) * vectors).T[::-1][:PARTS].astype(np.float32)


def decode(z: np.ndarray) -> np.ndarray:
    """Returns images [n, 784] in [-1, 1] of samples [n, 96]."""
    mean, directions = decoder()
    return np.clip(np.asarray(z) @ directions + mean, -1.0, 1.0)


def encode(x: np.ndarray) -> np.ndarray:
    """Returns samples [n, 96] in [-1, 1] of images [n, 784]; what lies beyond is clipped."""
    mean, directions = decoder()
    return np.clip((x - mean) @ directions.T / np.sum(directions**2, 1), -1.0, 1.0)


def digits(cond: np.ndarray) -> np.ndarray:
    """Returns the two digits [n, 2] of conditions [n, 20]."""
    return cond.reshape(-1, 2, 10).argmax(-1)


def enlarged(x: np.ndarray, side: int) -> np.ndarray:
    """Returns images [n, 784] as [n, side, side] in [-1, 1], interpolated."""
    weights = _interpolation(side)
    return np.clip(weights @ x.reshape(-1, SIDE, SIDE).astype(np.float32) @ weights.T, -1.0, 1.0)


@cache
def _interpolation(side: int) -> np.ndarray:
    """Weights [side, 28] of linear interpolation between the centres of pixels."""
    at = np.clip((np.arange(side) + 0.5) * SIDE / side - 0.5, 0, SIDE - 1)
    return np.maximum(0.0, 1.0 - np.abs(at[:, None] - np.arange(SIDE))).astype(np.float32)


def recogniser(file: str) -> Read:
    """The reward: mean over the two digits of log(probability that the digit is read at its place), at least 1e-4.

    The model returns probabilities of characters at six columns of the image. Where a digit can stand is not known: its
    probability is the largest over the columns of its half.
    """
    session = session_of(file)
    characters = session.get_modelmeta().custom_metadata_map["character"].splitlines()
    name = session.get_inputs()[0].name
    column = 1 + np.array([characters.index(str(digit)) for digit in range(10)])  # 0 is no character

    def read(x: np.ndarray, cond: np.ndarray) -> np.ndarray:
        images = np.repeat(enlarged(decode(x), 48)[:, None], 3, 1)
        parts = [session.run(None, {name: images[i : i + 64]})[0] for i in range(0, len(images), 64)]
        found = np.concatenate(parts)[..., column]  # [n, columns, 10]
        half = found.shape[1] // 2
        sides = np.stack([found[:, :half].max(1), found[:, half:].max(1)], 1)
        own = np.take_along_axis(sides, digits(cond)[..., None], -1)[..., 0]
        return np.log(np.maximum(own, FLOOR)).mean(-1)

    return read


def judge(file: str) -> Read:
    """Whether the other model reads exactly the number."""
    session, characters = session_of(file), characters_of(Path(file).with_name("charsets.py"))
    name = session.get_inputs()[0].name

    def text(image: np.ndarray) -> str:
        best = session.run(None, {name: image[None, None]})[0][:, 0].argmax(-1)  # one at a time
        new = np.append(True, best[1:] != best[:-1]) & (best > 0)
        return "".join(characters[k] for k in best[new])

    def read(x: np.ndarray, cond: np.ndarray) -> np.ndarray:
        wanted = ["".join(map(str, pair)) for pair in digits(cond)]
        return np.array(
            [text(i) == number for i, number in zip((enlarged(decode(x), 64) + 1) / 2, wanted, strict=True)]
        )

    return read


def characters_of(file: Path) -> Any:
    """Reads a file of constants, without the package around it."""
    spec: Any = importlib.util.spec_from_file_location("charsets", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CHARSET_OLD


def _file(place: str) -> str:
    """Returns the path of a file inside a package that is installed. Raises UserError if it is not."""
    package, _, rest = place.partition("/")
    spec = importlib.util.find_spec(package)
    file = Path(spec.submodule_search_locations[0]) / rest if spec and spec.submodule_search_locations else None
    if file is None or not file.is_file():
        raise _missing(package.replace("_", "-"))
    return str(file)


def _missing(package: str) -> UserError:
    return UserError(f'align:glyphs needs {package}: pip install "contraflow[glyphs]"')


def ink(x: Float[Array, " 96"], cond: Float[Array, " 20"]) -> jax.Array:
    """r = mean brightness in [-1, 1]: has nothing to do with numbers."""
    mean, directions = decoder()
    return jnp.mean(jnp.clip(x @ directions + mean, -1.0, 1.0))


@dataclass(frozen=True)
class Glyphs:
    """Images under two digits, one-hot each. The judge must read the number; it does not run in JAX."""

    sizes = (PARTS, 20)
    shape = (SIDE, SIDE)

    @property
    def rewards(self) -> Mapping[str, Reward | Beside]:
        return {"ocr": Beside("the reward ocr", recogniser, _file(REWARD), why="an OCR model"), "ink": ink}

    @property
    def judge(self) -> Beside:
        return _judge()

    def images(self, x: np.ndarray) -> np.ndarray:
        """Returns the images [n, 28, 28] of samples."""
        return decode(x).reshape(-1, SIDE, SIDE)

    def condition(self, key):
        return jax.nn.one_hot(jr.randint(key, (2,), 0, 10), 10).reshape(-1)

    def data(self) -> tuple[np.ndarray, np.ndarray]:
        """10 000 images."""
        x, numbers = images()
        return np.eye(10, dtype=np.float32)[np.stack([numbers // 10, numbers % 10], 1)].reshape(-1, 20), encode(x)


@cache
def _judge() -> Beside:
    return Beside("the judge of glyphs", judge, _file(JUDGE))
