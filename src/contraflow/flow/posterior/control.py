"""Stein control variates: how much of the posterior's score is added to a weighted mean of candidates.

A control is called as control(w [K], x [K, d], s [K, d], eta_per_c []) -> (mean [d], eta [d]) with weights of sum 1 and
scores s of mean zero under the posterior. Its weight has two units: c (variance of x1) and the dimensionless
eta = c alpha^2 / beta^2. `active` is False where scores are not needed.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from contraflow.flow.path import Scalar, Vector
from contraflow.flow.posterior.base import Candidates

Weights = Float[Array, " K"]


@dataclass(frozen=True)
class Fixed:
    """The same eta for every sample: 0 is noise-expectation, 1 gradient-expectation."""

    eta: float = 0.0

    @property
    def active(self) -> bool:
        return self.eta != 0.0

    def __call__(self, w: Weights, x: Candidates, s: Candidates, eta_per_c: Scalar) -> tuple[Vector, Vector]:
        c = self.eta / eta_per_c
        return w @ (x + c * s), jnp.full(x.shape[1:], self.eta, x.dtype)


@dataclass(frozen=True)
class MinVariance:
    """The control weight of least delta-method variance of the self-normalised estimate (2601.08136, prop. 2).

    With x~ = x - sum w x and s~ = s (or s - sum w s if `centred`), both weighted by w^2:
    diagonal c_j = -<x~_j s~_j> / (<s~_j^2> + ridge); isotropic the same with inner products over dimensions. Clipped to
    [-clip, clip]. The defaults are the official code's rule. Centred scores give zero variance on Gaussian targets but
    can do harm below an effective sample size of about 10; uncentred ones are safe there.
    """

    shape: Literal["diagonal", "isotropic"] = "diagonal"
    centred: bool = True
    ridge: float = 1e-4
    clip: float = 2.0

    def __post_init__(self):
        if self.ridge < 0 or self.clip <= 0:
            raise ValueError(f"MinVariance needs ridge >= 0 and clip > 0, got {self.ridge} and {self.clip}")

    @property
    def active(self) -> bool:
        return True

    def __call__(self, w: Weights, x: Candidates, s: Candidates, eta_per_c: Scalar) -> tuple[Vector, Vector]:
        x_mean, s_mean = w @ x, w @ s
        dx = x - x_mean[None]
        ds = s - s_mean[None] if self.centred else s
        w2 = (w**2)[:, None]
        if self.shape == "isotropic":
            c = jnp.full(x.shape[1], -jnp.sum(w2 * dx * ds) / (jnp.sum(w2 * ds**2) + self.ridge))
        else:
            c = -jnp.sum(w2 * dx * ds, 0) / (jnp.sum(w2 * ds**2, 0) + self.ridge)
        c = jnp.clip(c, -self.clip, self.clip)
        return x_mean + c * s_mean, c * eta_per_c


Control = Fixed | MinVariance
