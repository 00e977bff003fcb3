"""The conditional flow: its network, its path, what the network predicts and how the flow is solved.

A flow maps x_0 ~ N(0, source_scale^2 I) at t = 0 to x_1 at t = 1, and the support turns x_1 into an action. Imitation,
fine-tuning, RL from scratch and sampling from densities all use this one class, so each can start from any other.
"""

from dataclasses import dataclass
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.core.observation import Observation
from contraflow.core.optim import check_positive
from contraflow.core.types import Obs, PRNGKey
from contraflow.flow.fewstep import sample_average_velocity
from contraflow.flow.kernel import Kernel, forward_std, posterior_std, rollout
from contraflow.flow.path import Linear, Path, Scalar, Times, Vector
from contraflow.flow.solver import Euler, EulerMaruyama, Solver
from contraflow.flow.support import Box, Support
from contraflow.nets.encoder import Encoder, Pixels, encode, encoder_for
from contraflow.nets.layers import time_embedding
from contraflow.nets.transformer import ChunkTransformer
from contraflow.nets.velocity import ResidualMLP

Condition = Float[Array, " c"]
Network = Any
"""A module with a `dim` that takes (x [d], t, cond [c]) to [d], and has `features` (its last hidden layer). Those of
`nets` take one time or one for each action of a chunk."""
Predict = Literal["velocity", "noise", "data"]
"""What a network returns: dx/dt, E[x0 | x_t] or E[x1 | x_t]."""
CLOCK = 5.0  # the embedding sees step lengths scaled to [0, 5]: with [0, 100] the derivative in MeanFlow blows up
EDGE = 1e-3  # some paths have no x1 at t = 0 or no velocity at t = 1


@dataclass(frozen=True)
class Ddim:
    """Solves the flow on [0, 1] by x_r = alpha_r x1 + beta_r x0, with both ends predicted at x_t (2010.02502).

    For a velocity on the linear path this is Euler's step. Raises ValueError unless `steps` is positive.
    """

    steps: int = 10

    def __post_init__(self):
        check_positive(self, "steps")

    @property
    def nfe(self) -> int:
        return self.steps


@dataclass(frozen=True)
class Ddpm:
    """x_r ~ q(x_r | x_t, x1) with the x1 predicted at x_t (2006.11239, eq. 7), over the whole of [0, 1]; needs a key.

    Clipping (`FlowSpec.clip`) bounds that x1. The last step adds no noise.
    """

    steps: int = 5
    wide: bool = False
    """The noise is that of a step from x_r to x_t (sigma_k^2 = beta_k), larger than that of q; the mean is the same."""

    def __post_init__(self):
        check_positive(self, "steps")

    @property
    def nfe(self) -> int:
        return self.steps


@dataclass(frozen=True)
class FlowSpec:
    """Settings of a flow.

    Raises ValueError for a margin outside [0, .5), a clock or clip that is not positive, a stochastic solver on another
    path, and an averaged flow that does not predict the velocity of the linear path or has a solver other than Ddim
    and Euler.
    """

    path: Path = Linear()
    predict: Predict = "velocity"
    support: Support = Box()
    solver: Solver | Ddim | Ddpm = Ddim(10)
    averaged: bool = False
    """The network also takes the time at which a step ends and returns the average velocity over that step."""
    clip: float | None = None
    """Bound on |x1| as predicted within a step; usual when the network predicts noise."""
    margin: float = 0.0
    """Training times lie in [margin, 1 - margin], and solvers other than Ddim and Ddpm integrate over that interval."""
    clock: float = 5.0
    """The network sees clock * t."""
    unit_input: bool = False
    """The network sees x_t / sqrt(alpha_t^2 + beta_t^2)."""
    guidance: float = 1.0
    """w of classifier-free guidance (2207.12598): the output is u + w (c - u), with c under the condition and u under
    an encoded condition of zeros, for which the network must have been trained. 1 is the flow itself."""
    network: ResidualMLP | ChunkTransformer = ResidualMLP()
    pixels: Pixels = Pixels()
    """The encoder of image observations."""

    def __post_init__(self):
        if not 0 <= self.margin < 0.5:
            raise ValueError(f"margin must lie in [0, 0.5), got {self.margin}")
        check_positive(self, "clock", *(["clip"] if self.clip is not None else []))
        if isinstance(self.solver, EulerMaruyama) and self.solver.path != self.path:
            raise ValueError(f"the solver's path {self.solver.path} is not the flow's {self.path}: use one for both")
        if self.averaged:
            if self.predict != "velocity" or not isinstance(self.path, Linear):
                raise ValueError("an averaged velocity needs the linear path: use predict='velocity' and Linear()")
            if not isinstance(self.solver, Ddim | Euler):
                raise ValueError(f"an averaged velocity defines its own steps: use Ddim(n), not {self.solver}")

    def init(self, key: PRNGKey, dim: int, cond: Observation, horizon: int = 1, more: int = 0) -> "Flow":
        """Returns a flow with fresh weights for vectors [dim] that hold chunks of `horizon` actions.

        `cond` describes the condition, a vector [c] or another observation; `more` numbers are appended to its
        encoding.
        """
        encoder, size = encoder_for(cond, self.pixels, key)
        size += more + self.network.embedding * self.averaged
        return Flow(self.network.init(key, dim, size, horizon), self, encoder)


class Flow(eqx.Module):
    """A conditional flow, called on one sample; `vmap` it over batches.

    A condition is a vector [c], or an observation that `encode` turns into one. Every method encodes its condition, so
    encode once beforehand when you call a method in a loop.
    """

    net: Network
    spec: FlowSpec = eqx.field(static=True)
    encoder: Encoder | None = None

    @property
    def dim(self) -> int:
        return self.net.dim

    def encode(self, cond: Obs) -> Condition:
        """Returns the condition as the network takes it; an encoded condition passes through unchanged."""
        return encode(self.encoder, cond)

    def output(self, x: Vector, t: Times, cond: Obs, r: Scalar | None = None) -> Vector:
        """Returns the network's output [d] at (x_t, t); for an averaged flow, over the step to r (default: r = t)."""
        cond = self.encode(cond)
        out, weight = self.net(*self._inputs(x, t, cond, r)), self.spec.guidance
        if weight == 1.0:
            return out
        without = self.net(*self._inputs(x, t, jnp.zeros_like(cond), r))
        return without + weight * (out - without)

    def features(self, x: Vector, t: Scalar, cond: Obs, r: Scalar | None = None) -> Float[Array, " w"]:
        """Returns the last hidden layer [w] of the network."""
        return self.net.features(*self._inputs(x, t, cond, r))

    def _inputs(self, x: Vector, t: Times, cond: Obs, r: Scalar | None) -> tuple[Vector, Times, Float[Array, " told"]]:
        spec, cond = self.spec, self.encode(cond)
        if spec.averaged:
            length = CLOCK * ((t if r is None else r) - t)
            cond = jnp.concatenate([cond, time_embedding(length, spec.network.embedding)])
        if spec.unit_input:
            x = x / jnp.sqrt(spec.path.alpha(t) ** 2 + spec.path.beta(t) ** 2)
        return x, spec.clock * t, cond

    def average(self, x: Vector, t: Scalar, r: Scalar, cond: Obs) -> Vector:
        """Returns u(x_t, t, r) = (x_r - x_t) / (r - t) [d] of an averaged flow."""
        return self.output(x, t, cond, r)

    def velocity(self, x: Vector, t: Scalar, cond: Obs) -> Vector:
        """Returns dx/dt [d] at (x_t, t), whatever the network predicts."""
        if self.spec.predict == "velocity" and self.spec.clip is None:
            return self.output(x, t, cond)
        return self.spec.path.velocity(self.ends(x, t, cond)[0], x, t)

    def ends(self, x: Vector, t: Scalar, cond: Obs, r: Scalar | None = None) -> tuple[Vector, Vector]:
        """Returns (x1, x0), each [d], predicted at x_t; for an averaged flow, the pair implied by its step to r."""
        spec, out = self.spec, self.output(x, t, cond, r)
        path, inner = spec.path, jnp.maximum(t, EDGE)
        if spec.predict == "velocity":
            t = (
                t if isinstance(path, Linear) else jnp.where(path.wronskian(t) > 0, t, inner)
            )  # the Wronskian of Polynomial is 0 at t = 0
            x1, x0 = path.x1_from_velocity(out, x, t), path.x0_from_velocity(out, x, t)
        elif spec.predict == "noise":
            x1, x0 = path.x1_from_x0(out, x, inner), out
        else:
            x1, x0 = out, path.x0_from_x1(out, x, t)
        if spec.clip is not None:
            x1 = jnp.clip(x1, -spec.clip, spec.clip)
            x0 = path.x0_from_x1(x1, x, t)
        return x1, x0

    def step(self, x: Vector, t: Scalar, r: Scalar, cond: Obs) -> Vector:
        """Returns x_r [d], one step from x_t by Ddim or by the average velocity."""
        spec = self.spec
        if spec.averaged or (spec.predict == "velocity" and spec.clip is None and isinstance(spec.path, Linear)):
            return x + (r - t) * self.output(x, t, cond, r)
        x1, x0 = self.ends(x, t, cond, r)
        return spec.path.alpha(r) * x1 + spec.path.beta(r) * x0

    def noise(self, key: PRNGKey, *shape: int) -> Float[Array, "*shape d"]:
        """Returns draws of x_0 ~ N(0, source_scale^2 I), [*shape, d]."""
        return self.spec.path.source_scale * jr.normal(key, (*shape, self.dim))

    def sample(self, x0: Vector, cond: Obs, key: PRNGKey | None = None, steps: int | None = None) -> Vector:
        """Returns x_1 [d] from x_0 [d]. Stochastic solvers need `key`; `steps` replaces the number of Ddim steps."""
        spec, solver, cond = self.spec, self.spec.solver, self.encode(cond)
        if spec.averaged:
            return sample_average_velocity(lambda x, t, r: self.average(x, t, r, cond), x0, steps or solver.nfe)
        if isinstance(solver, Ddim) or steps is not None:
            n = steps or solver.nfe

            def step(x, k):
                return self.step(x, k / n, (k + 1) / n, cond), None

            return jax.lax.scan(step, x0, jnp.arange(n, dtype=x0.dtype))[0]
        if isinstance(solver, Ddpm):
            if key is None:
                raise ValueError("Ddpm adds noise: pass key")
            return rollout(self.denoising(cond, solver), x0, solver.steps, key)[-1]
        return solver(lambda x, t: self.velocity(x, t, cond), x0, spec.margin, 1 - spec.margin, key)

    def denoising(self, cond: Obs, solver: Ddpm) -> Kernel:
        """The steps of `solver` as a Markov chain."""
        path, n, cond = self.spec.path, solver.steps, self.encode(cond)

        def kernel(x, k):
            t, r = k / n, (k + 1) / n
            x1, x0 = self.ends(x, t, cond, r)
            std = posterior_std(path, t, r)
            mean = path.alpha(r) * x1 + jnp.sqrt(jnp.maximum(path.beta(r) ** 2 - std**2, 0.0)) * x0
            if solver.wide:
                std = jnp.where(k + 1 < n, forward_std(path, t, r), 0.0)
            return mean, jnp.full_like(x, std)

        return kernel

    def particles(self, cond: Obs, key: PRNGKey, n: int) -> tuple[Float[Array, "n d"], Float[Array, "n d"]]:
        """Returns n noises x_0 [n, d] and the ends x_1 [n, d] that the flow maps them to."""
        x0, cond = self.noise(key, n), self.encode(cond)
        keys = jr.split(jr.fold_in(key, 1), n)  # used by stochastic solvers
        return x0, jax.vmap(lambda x, k: self.sample(x, cond, k))(x0, keys)

    def action(self, x1: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        """Returns the action that the support maps an end to."""
        return self.spec.support.action(x1)
