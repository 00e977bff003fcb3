"""Fixed-step solvers, so that the number of network evaluations is known and `jit`, `vmap` and gradients work.

Call `solver(drift, x, t0, t1, key=None) -> x1` with drift(x [d], t []) -> [d]. `order` is the order of convergence and
`nfe` the number of evaluations of the drift.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from contraflow.core.checks import check_count
from contraflow.core.optim import check_positive
from contraflow.core.types import PRNGKey
from contraflow.flow.path import AbstractPath, Linear, Path, Scalar, Vector
from contraflow.flow.targets import log_normal

Drift = Callable[[Vector, Scalar], Vector]
Time = float | Scalar


@dataclass(frozen=True)
class RungeKutta:
    """`steps` steps x + dt sum_i b_i k_i with k_i = v(x + dt sum_j a_ij k_j, t + dt sum_j a_ij).

    A subclass defines its tableau: the rows (a_i1, ..., a_i,i-1) of its stages, starting with (), then the row b.
    Step i of n begins at t0 + (t1 - t0) (1 - (1 - i / n)^power). Power 1 gives equal steps. A larger power gives
    shorter steps near the data, where the field of a narrow distribution is steep. Raises ValueError for steps < 1 or
    power <= 0.
    """

    steps: int
    power: float = 1.0
    tableau: ClassVar[tuple[tuple[float, ...], ...]]
    order: ClassVar[int]

    def __post_init__(self):
        check_count(self, 1, "steps")
        check_positive(self, "power")

    @property
    def nfe(self) -> int:
        return self.steps * (len(self.tableau) - 1)

    def __call__(self, drift: Drift, x: Vector, t0: Time, t1: Time, key: PRNGKey | None = None) -> Vector:
        *stages, last = self.tableau
        places = 1.0 - (1.0 - np.arange(self.steps + 1) / self.steps) ** self.power
        times = t0 + (jnp.asarray(t1, x.dtype) - t0) * jnp.asarray(places, x.dtype)

        def moved(x, row, slopes, dt):
            # Skip terms of weight 0, and the sum itself if all are 0.
            return x + sum(dt * a * k for a, k in zip(row, slopes, strict=True) if a) if any(row) else x

        def step(x, ends):
            t, dt, slopes = ends[0], ends[1] - ends[0], []
            for row in stages:
                slopes.append(drift(moved(x, row, slopes, dt), t + dt * sum(row) if any(row) else t))
            return moved(x, last, slopes, dt), None

        return jax.lax.scan(step, x, (times[:-1], times[1:]))[0]


@dataclass(frozen=True)
class Euler(RungeKutta):
    """x + dt v(x, t)."""

    steps: int = 10
    tableau = ((), (1.0,))
    order = 1


@dataclass(frozen=True)
class Midpoint(RungeKutta):
    """x + dt v(x + dt/2 v(x, t), t + dt/2)."""

    steps: int = 5
    tableau = ((), (0.5,), (0.0, 1.0))
    order = 2


@dataclass(frozen=True)
class Heun(RungeKutta):
    """x + dt/2 (v(x, t) + v(x + dt v(x, t), t + dt))."""

    steps: int = 5
    tableau = ((), (1.0,), (0.5, 0.5))
    order = 2


@dataclass(frozen=True)
class RK4(RungeKutta):
    """The classical fourth-order Runge-Kutta method."""

    steps: int = 4
    tableau = ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6))
    order = 4


@dataclass(frozen=True)
class ConstantNoise:
    """sigma_t = scale."""

    scale: float = 1.0

    def __call__(self, t: Scalar) -> Scalar:
        return jnp.full_like(t, self.scale)


@dataclass(frozen=True)
class DecayingNoise:
    """sigma_t = scale sqrt((1 - t) / t): Flow-GRPO at .7, the memoryless schedule of Adjoint Matching at sqrt 2."""

    scale: float = 0.7

    def __call__(self, t: Scalar) -> Scalar:
        return self.scale * jnp.sqrt((1.0 - t) / t)


class Chain(eqx.Module):
    """Every state xs [S+1, d] of a stochastic solver and the log-density [S] of every transition."""

    xs: Float[Array, "steps_plus_1 d"]
    log_prob: Float[Array, " steps"]


@dataclass(frozen=True)
class EulerMaruyama:
    """dx = [v + sigma^2/2 score] dt + sigma dW, with the ODE's marginals for any noise schedule sigma_t >= 0.

    The score is computed from the velocity along `path`, which needs beta_t > 0 at every step. Raises ValueError for
    steps < 1 or a call without a key.
    """

    steps: int = 20
    sigma: ConstantNoise | DecayingNoise | Callable[[Scalar], Scalar] = ConstantNoise()
    path: Path | AbstractPath = Linear()
    order: ClassVar[int] = 1

    def __post_init__(self):
        check_count(self, 1, "steps")

    @property
    def nfe(self) -> int:
        return self.steps

    def __call__(self, drift: Drift, x: Vector, t0: Time, t1: Time, key: PRNGKey | None = None) -> Vector:
        return self.chain(drift, x, t0, t1, key).xs[-1]

    def chain(self, drift: Drift, x: Vector, t0: Time, t1: Time, key: PRNGKey | None) -> Chain:
        """Returns the states xs [S+1, d] and the Gaussian log-density of each of the S transitions.

        The density is undefined where sigma = 0. Raises ValueError without a key.
        """
        if key is None:
            raise ValueError("EulerMaruyama is stochastic: pass key")
        dt = (jnp.asarray(t1, x.dtype) - t0) / self.steps

        def body(x, inputs):
            i, noise = inputs
            t = t0 + dt * i
            v = drift(x, t)
            sigma = self.sigma(t)
            mean = x + dt * (v + 0.5 * sigma**2 * self.path.score_from_velocity(v, x, t))
            std = sigma * jnp.sqrt(dt)
            x = mean + std * noise
            return x, (x, log_normal(x, mean, std))

        noises = jr.normal(key, (self.steps, *x.shape), x.dtype)
        _, (xs, log_prob) = jax.lax.scan(body, x, (jnp.arange(self.steps, dtype=x.dtype), noises))
        return Chain(jnp.concatenate([x[None], xs]), log_prob)


ODESolver = Euler | Midpoint | Heun | RK4
Solver = ODESolver | EulerMaruyama
