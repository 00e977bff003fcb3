"""Stein control variates: how much of the posterior's score is added to a weighted mean of candidates.

A control has the call control(w [K], x [K, d], s [K, d], eta_per_c []) -> (mean [d], eta [d]), with weights w that sum
to 1 and scores s with mean zero under the posterior. Its weight has two units: c (variance of x1) and the dimensionless
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
    """Uses the same eta for every sample: 0 averages noise, 1 averages gradients."""

    eta: float = 0.0

    @property
    def active(self) -> bool:
        return self.eta != 0.0

    def __call__(self, w: Weights, x: Candidates, s: Candidates, eta_per_c: Scalar) -> tuple[Vector, Vector]:
        c = self.eta / eta_per_c
        return w @ (x + c * s), jnp.full(x.shape[1:], self.eta, x.dtype)


@dataclass(frozen=True)
class MinVariance:
    """Minimises the delta-method variance of the self-normalised estimate (2601.08136, prop. 2).

    With x~ = x - sum w x and s~ = s (or s - sum w s if `centred`), both weighted by w^2, the diagonal weight is
    c_j = -<x~_j s~_j> / (<s~_j^2> + ridge). The isotropic weight takes inner products over dimensions. c is clipped to
    [-clip, clip]. The defaults follow the official code. Centred scores give zero variance on Gaussian targets but can
    do harm below an effective sample size of about 10; uncentred scores are safe there. Raises ValueError for
    ridge < 0 or clip <= 0.
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
