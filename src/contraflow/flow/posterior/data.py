"""The posterior mean under data, which states flow matching in the terms of the other estimators."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from contraflow.core.types import PRNGKey
from contraflow.flow.path import AbstractPath, Scalar, Vector
from contraflow.flow.posterior.base import Posterior, SupportName
from contraflow.flow.posterior.proposal import Support
from contraflow.flow.targets import LogDensity, log_normal


@dataclass(frozen=True)
class FromData:
    """Posterior mean when x1 is uniform on the points `support` [P, d]; one point is conditional flow matching.

    E[x1 | x_t] = sum_i w_i u_i with w_i ~ N(x_t; alpha u_i, beta^2 I). It ignores `log_pi`, so agents that follow a
    critic cannot use it. Raises ValueError for a call without `support`.
    """

    invariant_start: ClassVar[bool] = False

    def suits(self, support_name: SupportName) -> bool:
        """Returns False: it does not estimate the posterior under log pi."""
        return False

    def __call__(
        self,
        key: PRNGKey | None,
        path: AbstractPath,
        log_pi: LogDensity | None,
        x_t: Vector,
        t: Scalar,
        support: Support = None,
    ) -> Posterior:
        if support is None:
            raise ValueError("FromData needs data points: pass support=[P, d]")
        w = jax.nn.softmax(jax.vmap(lambda u: log_normal(x_t, path.alpha(t) * u, path.beta(t)))(support))
        return Posterior(w @ support, jnp.zeros_like(x_t), 1.0 / jnp.sum(w**2))
