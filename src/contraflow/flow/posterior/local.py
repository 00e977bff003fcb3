"""The score of the target where x_t is, in place of a posterior mean."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from contraflow.core.types import PRNGKey
from contraflow.flow.path import AbstractPath, Scalar, Vector
from contraflow.flow.posterior.base import Posterior, SupportName
from contraflow.flow.posterior.proposal import Support
from contraflow.flow.targets import LogDensity


@dataclass(frozen=True)
class Local:
    """x0 = -beta grad log pi(x_t): the score of pi at x_t itself in place of that of the noised law (QSM, 2312.11752).

    One gradient, no candidates. Right in the limit t -> 1 only: for pi = N(m, s^2) the score is -(x_t - m) / s^2 where
    the noised law has -(x_t - alpha m) / (alpha^2 s^2 + beta^2).
    """

    invariant_start: ClassVar[bool] = False

    def suits(self, support_name: SupportName) -> bool:
        """Any: it asks log pi wherever x_t is."""
        return True

    def __call__(
        self,
        key: PRNGKey | None,
        path: AbstractPath,
        log_pi: LogDensity,
        x_t: Vector,
        t: Scalar,
        support: Support = None,
    ) -> Posterior:
        x0 = -path.beta(t) * jax.grad(log_pi)(x_t)
        return Posterior(path.x1_from_x0(x0, x_t, t), jnp.ones_like(x_t), jnp.ones(()))
