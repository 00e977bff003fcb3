"""The interface of estimators of the posterior mean E[x1 | x_t].

An estimator is a frozen dataclass with the call

    estimator(key, path, log_pi, x_t [d], t [], support [P, d] or None) -> Posterior

for an unnormalised log-density log_pi(x1) -> []. `suits(support_name)` says whether it is right for latents on the
support of that name (flow/support.py). `invariant_start` says whether it relies on `support[0]` being the endpoint that
was noised to x_t, drawn from the policy and not selected for its value.
"""

from typing import Literal

import equinox as eqx
from jaxtyping import Array, Float

from contraflow.flow.path import Scalar, Vector

Candidates = Float[Array, "K d"]
SupportName = Literal["tanh", "box", "real"]


class Posterior(eqx.Module):
    """`mean` [d] estimates E[x1 | x_t], `eta` [d] is the control weight used, `ess` [] in [1, K] the effective size."""

    mean: Vector
    eta: Vector
    ess: Scalar
