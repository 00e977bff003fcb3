"""Regression errors of a flow for one sample, against pairs of ends, posterior means or smaller steps."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from contraflow.core.types import Obs, PRNGKey
from contraflow.flow.fewstep import Matching, Objective
from contraflow.flow.model import Flow, FlowSpec
from contraflow.flow.path import Scalar, Times, Vector


def matching_error(flow: Flow, cond: Obs, x0: Vector, x1: Vector, t: Times) -> Vector:
    """Returns f(x_t, t) - f* [d] at x_t = alpha_t x1 + beta_t x0 (2210.02747; 2006.11239).

    f* is alpha' x1 + beta' x0, x0 or x1, depending on whether the network predicts velocity, noise or data. Each action
    of a chunk may have a time of its own, t [h].
    """
    path, predict = flow.spec.path, flow.spec.predict

    def pair(x0, x1, t):
        targets = {
            "noise": lambda: x0,
            "data": lambda: x1,
            "velocity": lambda: path.d_alpha(t) * x1 + path.d_beta(t) * x0,
        }
        return path.perturb(x0, x1, t), targets[predict]()

    if t.ndim == 0:
        x_t, target = pair(x0, x1, t)
    else:
        rows = x0.reshape(t.shape[0], -1), x1.reshape(t.shape[0], -1), t
        x_t, target = (x.reshape(-1) for x in jax.vmap(pair)(*rows))
    return flow.output(x_t, t, cond) - target


def posterior_error(flow: Flow, cond: Obs, mean: Vector, x_t: Vector, t: Scalar) -> Vector:
    """Returns f(x_t, t) - f* [d], with f* implied by the estimate `mean` [d] of E[x1 | x_t] (2601.08136, section 3).

    No gradient flows through `mean`.
    """
    path = flow.spec.path
    convert = {"velocity": path.velocity, "noise": path.x0_from_x1, "data": lambda x1, x_t, t: x1}
    target = jax.lax.stop_gradient(convert[flow.spec.predict](mean, x_t, t))
    return flow.output(x_t, t, cond) - target


def consistency_error(
    objective: Objective,
    flow: Flow,
    slow: Flow,
    cond: Obs,
    x0: Vector,
    x1: Vector,
    k_interval: PRNGKey,
    k_target: PRNGKey,
    velocity: Vector | None = None,
    slow_cond: Obs | None = None,
) -> Vector:
    """Returns u(x_t, t, r) - u* [d] for a step of random size between x0 and x1; smaller steps make up u*
    (flow/fewstep.py).

    `velocity` [d] is dx/dt in MeanFlow's target, x1 - x0 for a pair; None uses the flow's own velocity, which has no
    noise. `slow_cond` is the condition of the slow copy, needed where `cond` is already encoded by `flow`.
    """
    assert not isinstance(objective, Matching)
    t, r = objective.interval(k_interval)
    x_t = flow.spec.path.perturb(x0, x1, t)
    conds = flow.encode(cond), slow.encode(cond if slow_cond is None else slow_cond)
    u, teacher = (lambda x, t, r, f=f, c=c: f.average(x, t, r, c) for f, c in zip((flow, slow), conds, strict=True))
    v = jax.lax.stop_gradient(u(x_t, t, t)) if velocity is None else velocity
    return u(x_t, t, r) - objective.target(u, teacher, v, x_t, t, r, k_target)


def square(error: Vector) -> Scalar:
    """Returns mean_j e_j^2 []."""
    return jnp.mean(error**2)


def with_objective(spec: FlowSpec, objective: Objective) -> FlowSpec:
    """Returns the settings of the flow that this objective trains: averaged if the objective learns average velocities.

    Raises ValueError for an averaged flow with plain matching, which would spoil its longer steps.
    """
    if spec.averaged and not objective.averaged:
        raise ValueError("an averaged flow needs an objective that makes steps consistent: use MeanFlow(), for example")
    return spec if spec.averaged == objective.averaged else replace(spec, averaged=True)
