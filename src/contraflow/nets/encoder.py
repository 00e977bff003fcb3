"""Encoders, which turn image and dict observations into vectors in front of a network."""

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Shaped

from contraflow.core.checks import check_count
from contraflow.core.flatten import ordered_leaves
from contraflow.core.observation import Observation, Part
from contraflow.core.types import Obs, PRNGKey, UserError
from contraflow.nets.layers import Linear, layer_norm

Vector = Float[Array, " c"]


@dataclass(frozen=True)
class Pixels:
    """Settings of the image encoder: unpadded convolutions with relu, then a linear map, layer norm and tanh.

    This is the encoder of SAC-AE (1910.01741), DrQ (2004.13649) and DrQ-v2 (2107.09645). Raises ValueError for sizes
    that are not positive, or unless every layer has a stride.
    """

    channels: tuple[int, ...] = (32, 32, 32, 32)
    strides: tuple[int, ...] = (2, 1, 1, 1)
    kernel: int = 3
    features: int = 50
    """Size of the vector that an image is encoded to."""

    def __post_init__(self):
        check_count(self, 1, "kernel", "features")
        if len(self.channels) != len(self.strides) or min((*self.channels, *self.strides), default=0) < 1:
            raise ValueError(f"{self}: needs a positive number of channels and a positive stride for each layer")

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns the height and width after the convolutions, n -> floor((n - kernel) / stride) + 1 in each layer.

        Raises UserError for an image smaller than a kernel.
        """
        sides = height, width
        for stride in self.strides:
            if min(sides) < self.kernel:
                raise UserError(
                    f"images of {height} x {width} are too small for {len(self.strides)} convolutions with strides "
                    f"{self.strides}: use fewer convolutions or smaller strides (pixels.channels, pixels.strides)"
                )
            sides = tuple((n - self.kernel) // stride + 1 for n in sides)
        return sides[0], sides[1]


class Convolutions(eqx.Module):
    """Encodes one image [H, W, C] as `features` numbers in (-1, 1); bytes are divided by 255.

    A convolution is the matrix product of its patches [h w, k k c] with a weight [k k c, out]. XLA's own convolution is
    nine times slower within a compiled loop on a CPU, where training happens, and as slow under `vmap` over members.
    """

    layers: tuple[Linear, ...]
    last: Linear
    part: Part = eqx.field(static=True)
    pixels: Pixels = eqx.field(static=True)

    def __init__(self, part: Part, pixels: Pixels, *, key: PRNGKey):
        height, width, channels = part.shape
        h, w = pixels.grid(height, width)
        k_last, *keys = jr.split(key, len(pixels.channels) + 1)
        into = [pixels.kernel**2 * c for c in (channels, *pixels.channels)]
        self.layers = tuple(Linear(n, c, key=k) for n, c, k in zip(into, pixels.channels, keys, strict=False))
        self.last = Linear(h * w * pixels.channels[-1], pixels.features, key=k_last)
        self.part, self.pixels = part, pixels

    def __call__(self, image: Shaped[Array, "H W C"]) -> Vector:
        x = image / 255.0 if self.part.dtype == "uint8" else image
        for layer, stride in zip(self.layers, self.pixels.strides, strict=True):
            x = jax.nn.relu(patches(x, self.pixels.kernel, stride) @ layer.weight + layer.bias[None, None])
        return jnp.tanh(layer_norm(self.last(x.reshape(-1))))


def patches(x: Float[Array, "H W C"], kernel: int, stride: int) -> Float[Array, "h w p"]:
    """Returns the patches under a kernel at each of its places, row by row, with p = kernel^2 C numbers each."""
    h, w = ((n - kernel) // stride + 1 for n in x.shape[:2])
    ends = stride * (h - 1) + 1, stride * (w - 1) + 1
    places = [(i, j) for i in range(kernel) for j in range(kernel)]
    return jnp.concatenate([x[i : i + ends[0] : stride, j : j + ends[1] : stride] for i, j in places], axis=-1)


class Encoder(eqx.Module):
    """Concatenates the parts of an observation to one vector [c], in the order of `core/flatten.py`.

    Vectors are taken as they are, and images are encoded by `Convolutions`.
    """

    images: tuple[Convolutions | None, ...]  # None for a vector
    parts: tuple[Part, ...] = eqx.field(static=True)

    def __init__(self, parts: tuple[Part, ...], pixels: Pixels, *, key: PRNGKey):
        keys = jr.split(key, len(parts))
        self.images = tuple(
            Convolutions(part, pixels, key=k) if part.image else None for part, k in zip(parts, keys, strict=True)
        )
        self.parts = parts

    def __call__(self, obs: Obs) -> Vector:
        leaves = zip(self.images, ordered_leaves(obs), strict=True)
        return jnp.concatenate([x if net is None else net(x) for net, x in leaves])


def encoder_for(observation: Observation, pixels: Pixels, key: PRNGKey) -> tuple[Encoder | None, int]:
    """Returns an encoder (None for a vector) and the size of its output; `key` may also serve other weights."""
    if isinstance(observation, int):
        return None, observation
    size = sum(pixels.features if part.image else part.size for part in observation)
    return Encoder(observation, pixels, key=jr.fold_in(key, len(observation))), size


def encode(encoder: Encoder | None, obs: Any) -> Any:
    """Returns the observation as a vector [c]; a vector is returned unchanged.

    An observation that needs an encoder is never a vector, so a network also accepts an encoding made outside a loop.
    """
    return obs if encoder is None or getattr(obs, "ndim", None) == 1 else encoder(obs)
