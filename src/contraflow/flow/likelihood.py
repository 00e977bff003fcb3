"""Log-densities log p(x1) of a flow.

`log_likelihood` integrates the instantaneous change of variables d/dt log p_t(x_t) = -div v(x_t, t) backwards from x1
(Chen et al. 1806.07366; Grathwohl et al. 1810.01367). `denoising_log_density` integrates the denoising error.
`pushforward_log_density` differentiates a sampler of few steps at its initial noise.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import jax.random as jr

from contraflow.core.optim import check_positive
from contraflow.core.types import PRNGKey
from contraflow.flow.model import Condition, Flow
from contraflow.flow.path import AbstractPath, Scalar, Vector
from contraflow.flow.solver import Drift, Euler, ODESolver, Time
from contraflow.flow.targets import log_normal

Sampler = Callable[[Vector], Vector]


@dataclass(frozen=True)
class Exact:
    """Computes div v as the trace of the Jacobian, with d forward derivatives per evaluation."""

    def __call__(self, drift: Drift, x: Vector, t: Scalar, key: PRNGKey | None) -> Scalar:
        return jnp.trace(jax.jacfwd(drift)(x, t))


@dataclass(frozen=True)
class Hutchinson:
    """Estimates div v = E[e' (dv/dx) e] without bias from Rademacher probes e, drawn once per trajectory.

    Raises ValueError for fewer than one probe or a call without a key.
    """

    probes: int = 1

    def __post_init__(self):
        if self.probes < 1:
            raise ValueError(f"Hutchinson(probes={self.probes}): needs at least one probe")

    def __call__(self, drift: Drift, x: Vector, t: Scalar, key: PRNGKey | None) -> Scalar:
        if key is None:
            raise ValueError("the Hutchinson divergence is stochastic: pass key")
        # The same key at every step gives the same probes, so the integrand stays smooth along the trajectory.
        probes = jr.rademacher(jr.clone(key), (self.probes, *x.shape), x.dtype)
        return jnp.mean(jax.vmap(lambda e: e @ jax.jvp(lambda y: drift(y, t), (x,), (e,))[1])(probes))


Divergence = Exact | Hutchinson


def log_likelihood(
    drift: Drift,
    x1: Vector,
    t0: Time,
    t1: Time,
    solver: ODESolver,
    divergence: Divergence = Exact(),
    source_scale: float = 1.0,
    key: PRNGKey | None = None,
) -> tuple[Scalar, Vector]:
    """Returns (log p(x1) [], x0 [d]) for x1 [d] at time t1, with x_{t0} ~ N(0, source_scale^2 I).

    Differentiable in x1 and `drift`. Raises ValueError if the divergence is stochastic and `key` is None.
    """

    def augmented(state: Vector, t: Scalar) -> Vector:
        x = state[:-1]
        return jnp.append(drift(x, t), divergence(drift, x, t, key))

    state = solver(augmented, jnp.append(x1, 0.0), t1, t0)
    x0, log_det = state[:-1], state[-1]  # log_det = int_{t1}^{t0} div dt, the negative of the forward integral
    return log_normal(x0, jnp.zeros_like(x0), jnp.asarray(source_scale)) + log_det, x0


def denoising_log_density(
    x0_mean: Drift, path: AbstractPath, x1: Vector, t0: Time, t1: Time, levels: int, probes: int, key: PRNGKey
) -> Scalar:
    """Estimates log p(x1) [] from how well x_t reveals its noise (Kong et al. 2302.03792; MaxEntDP 2502.11612):

        -d/2 log(2 pi e) + 1/2 int [d sigmoid(l) - E|x0 - E[x0 | x_t(l)]|^2] dl,   l the log signal-to-noise ratio.

    The midpoint rule uses `levels` values of l between the times t0 and t1, with `probes` noises at each.
    `x0_mean(x_t, t)` is E[x0 | x_t]. The estimate is unbiased in the noises but omits what lies beyond t0 and t1.
    """
    ends = path.log_snr(jnp.asarray(t0, x1.dtype)), path.log_snr(jnp.asarray(t1, x1.dtype))
    width = (ends[1] - ends[0]) / levels

    def level(i, noise):
        snr = ends[0] + (i + 0.5) * width
        t = path.inverse_log_snr(snr)
        error = jax.vmap(lambda e: jnp.sum((e - x0_mean(path.perturb(e, x1, t), t)) ** 2))(noise)
        return x1.shape[0] * jax.nn.sigmoid(snr) - error.mean()

    noise = jr.normal(key, (levels, probes, *x1.shape), x1.dtype)
    total = jnp.sum(jax.vmap(level)(jnp.arange(levels), noise)) * width
    return 0.5 * total - 0.5 * x1.shape[0] * jnp.log(2 * jnp.pi * jnp.e)


def pushforward_log_density(sampler: Sampler, x0: Vector, source_scale: float = 1.0) -> Scalar:
    """Returns log p(f(x0)) [] = log N(x0; 0, source_scale^2 I) - log |det df/dx0| for a sampler f [d] -> [d].

    Exact for a one-to-one f with any number of steps, whereas integrating div v is accurate only for many steps
    (change of variables as in 1505.05770, eq. 5). Costs d forward derivatives of f; returns inf where f is flat.
    """
    _, log_det = jnp.linalg.slogdet(jax.jacfwd(sampler)(x0))
    return log_normal(x0, jnp.zeros_like(x0), jnp.asarray(source_scale)) - log_det


@dataclass(frozen=True)
class ChangeOfVariables:
    """`log_likelihood` of a flow, by integrating its velocity backwards from x1 over [margin, 1 - margin]."""

    solver: ODESolver = Euler(10)
    divergence: Divergence = Hutchinson()

    def __call__(self, flow: Flow, cond: Condition, x0: Vector, x1: Vector, key: PRNGKey) -> Scalar:
        """Returns log p(x1) [] for the end x1 [d]."""
        spec, drift = flow.spec, lambda x, t: flow.velocity(x, t, cond)
        times = spec.margin, 1 - spec.margin
        return log_likelihood(drift, x1, *times, self.solver, self.divergence, spec.path.source_scale, key)[0]


@dataclass(frozen=True)
class Denoising:
    """`denoising_log_density` of a flow, from its denoising errors between margin and 1 - margin."""

    levels: int = 20
    probes: int = 50

    def __post_init__(self):
        check_positive(self, "levels", "probes")

    def __call__(self, flow: Flow, cond: Condition, x0: Vector, x1: Vector, key: PRNGKey) -> Scalar:
        """Returns log p(x1) [] for the end x1 [d]."""
        spec = flow.spec
        x0_mean = lambda x, t: spec.path.x0_from_velocity(flow.velocity(x, t, cond), x, t)
        times = spec.margin, 1 - spec.margin
        return denoising_log_density(x0_mean, spec.path, x1, *times, self.levels, self.probes, key)


@dataclass(frozen=True)
class Pushforward:
    """`pushforward_log_density` of the flow's sampler, which must be deterministic."""

    def __call__(self, flow: Flow, cond: Condition, x0: Vector, x1: Vector, key: PRNGKey) -> Scalar:
        """Returns log p(x1) [] for the noise x0 [d] that the flow maps to x1."""
        return pushforward_log_density(lambda x: flow.sample(x, cond), x0, flow.spec.path.source_scale)


FlowDensity = ChangeOfVariables | Denoising | Pushforward


def action_log_prob(density: FlowDensity, flow: Flow, cond: Condition, x0: Vector, x1: Vector, key: PRNGKey) -> Scalar:
    """Returns log pi(a) [] of the action a that the support maps the end x1 [d] of x0 [d] to."""
    return density(flow, cond, x0, x1, key) - flow.spec.support.log_det(x1)
