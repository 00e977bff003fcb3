"""Pictures of shapes in the plane, by their distance functions: in JAX, so that a task can be seen while it trains."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

Scalar = float | Float[Array, ""]
Point = tuple[Scalar, Scalar]
Plane = Float[Array, "s s"]

BLUE, ORANGE, GREY, BLACK = "#0072B2", "#E69F00", "#BBBBBB", "#222222"  # Okabe and Ito's colour-blind safe palette
LINE = 0.02  # half the width of a line, as a share of half the side of a picture


class Disc(NamedTuple):
    """A filled disc in a picture, in the units of the task."""

    centre: Point
    radius: float
    colour: str

    def distance(self, x: Plane, y: Plane, reach: float) -> Plane:
        """Returns |p - centre| - radius of the places p = (x, y), negative inside."""
        return jnp.sqrt((x - self.centre[0]) ** 2 + (y - self.centre[1]) ** 2) - self.radius


class Path(NamedTuple):
    """A line through points in a picture, in the units of the task."""

    points: Sequence[Point]
    colour: str

    def distance(self, x: Plane, y: Plane, reach: float) -> Plane:
        """Returns the distance of the places (x, y) from the nearest segment, less half the width of the line."""
        nearest = jnp.full_like(x, jnp.inf)
        for (ax, ay), (bx, by) in pairwise(self.points):
            dx, dy = bx - ax, by - ay
            inverse = 1.0 / jnp.maximum(dx**2 + dy**2, 1e-12)
            share = jnp.clip(((x - ax) * dx + (y - ay) * dy) * inverse, 0.0, 1.0)
            nearest = jnp.minimum(nearest, (x - ax - share * dx) ** 2 + (y - ay - share * dy) ** 2)
        return jnp.sqrt(nearest) - LINE * reach


Shape = Disc | Path


def image(shapes: Sequence[Shape], reach: float, side: int) -> UInt8[Array, "{side} {side} 3"]:
    """Returns the shapes on white, in a square with half side `reach`, later ones over earlier ones.

    A pixel of size h whose centre has the distance d from a shape is covered by clip(1/2 - d / h, 0, 1) of its colour,
    which is exact for a straight edge along the pixels. Points may be traced.
    """
    size = 2 * reach / side
    along = (jnp.arange(side) - (side - 1) / 2) * size
    x, y = jnp.meshgrid(along, -along)  # the second axis of the task points up
    planes = [jnp.full((side, side), 255.0)] * 3
    for shape in shapes:
        cover = jnp.clip(0.5 - shape.distance(x, y, reach) / size, 0.0, 1.0)
        colour = [int(shape.colour[i : i + 2], 16) for i in (1, 3, 5)]
        planes = [plane + cover * (c - plane) for plane, c in zip(planes, colour, strict=True)]
    return jnp.round(jnp.stack(planes, -1)).astype(jnp.uint8)
