"""Temperature schedules: lambda as a function of the update count."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class Constant:
    """lambda = value > 0."""

    value: float = 0.02

    def __post_init__(self):
        if self.value <= 0:
            raise ValueError(f"a temperature must be positive, got {self.value}")

    def __call__(self, step: Int[Array, ""]) -> Float[Array, ""]:
        return jnp.asarray(self.value)


@dataclass(frozen=True)
class Anneal:
    """Log-linear from `start` to `end` over `steps` updates, constant afterwards."""

    start: float = 0.1
    end: float = 0.02
    steps: int = 50_000

    def __post_init__(self):
        if min(self.start, self.end) <= 0 or self.steps < 1:
            raise ValueError(f"{self}: temperatures must be positive and steps at least 1")

    def __call__(self, step: Int[Array, ""]) -> Float[Array, ""]:
        progress = jnp.clip(step / self.steps, 0.0, 1.0)
        return jnp.exp((1 - progress) * jnp.log(self.start) + progress * jnp.log(self.end))


Schedule = Constant | Anneal
