"""What every estimator of the posterior mean E[x1 | x_t] has in common.

An estimator is a frozen dataclass that is called as

    estimator(key, path, log_pi, x_t [d], t [], support [P, d] or None) -> Posterior

with the unnormalised log-density log_pi(x1) -> []. It tells of itself by `suits(support_name)`, whether it is right for
latents on a support of that name (flow/support.py), and by `invariant_start`, whether it counts on `support[0]` being
the endpoint that was noised to x_t, drawn from the policy and not picked for its value.
"""

from typing import Literal

import equinox as eqx
from jaxtyping import Array, Float

from contraflow.flow.path import Scalar, Vector

Candidates = Float[Array, "K d"]
SupportName = Literal["tanh", "box", "real"]


class Posterior(eqx.Module):
    """`mean` estimates E[x1 | x_t]; `eta` is the control weight used; `ess` the effective sample size in [1, K]."""

    mean: Vector
    eta: Vector
    ess: Scalar
