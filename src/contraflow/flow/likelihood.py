"""log p(x1) of a flow by the instantaneous change of variables (Chen et al. 1806.07366; Grathwohl et al. 1810.01367).

d/dt log p_t(x_t) = -div v(x_t, t), integrated backwards from x1 with the sampler's own solver.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import jax.random as jr

from contraflow.flow.density import log_normal
from contraflow.flow.path import Scalar, Vector
from contraflow.flow.solve import Drift, ODESolver, Time
from contraflow.types import PRNGKey


@dataclass(frozen=True)
class Exact:
    """div v as the trace of the Jacobian: d forward derivatives per evaluation."""

    def __call__(self, drift: Drift, x: Vector, t: Scalar, key: PRNGKey | None) -> Scalar:
        return jnp.trace(jax.jacfwd(drift)(x, t))


@dataclass(frozen=True)
class Hutchinson:
    """Unbiased div v = E[e' (dv/dx) e] with Rademacher probes e, drawn once per trajectory."""

    probes: int = 1

    def __post_init__(self):
        if self.probes < 1:
            raise ValueError(f"Hutchinson(probes={self.probes}): needs at least one probe")

    def __call__(self, drift: Drift, x: Vector, t: Scalar, key: PRNGKey | None) -> Scalar:
        if key is None:
            raise ValueError("the Hutchinson divergence is stochastic: pass key")
        # The same key at every step, hence the same probes: the integrand stays smooth along the trajectory.
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
    """(log p(x1), x0) for x1 [d] at time t1, with x_{t0} ~ N(0, source_scale^2 I). Differentiable in x1 and `drift`."""

    def augmented(state: Vector, t: Scalar) -> Vector:
        x = state[:-1]
        return jnp.append(drift(x, t), divergence(drift, x, t, key))

    state = solver(augmented, jnp.append(x1, 0.0), t1, t0)
    x0, log_det = state[:-1], state[-1]  # log_det = int_{t1}^{t0} div dt, negative of the forward one
    return log_normal(x0, jnp.zeros_like(x0), jnp.asarray(source_scale)) + log_det, x0
