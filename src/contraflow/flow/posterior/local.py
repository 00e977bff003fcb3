"""The score of the target at x_t itself, in place of a posterior mean."""

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
    """x0 = -beta grad log pi(x_t): the score of pi at x_t in place of the score of the noised distribution.

    This is QSM (2312.11752). It needs one gradient and no candidates but is right only in the limit t -> 1: for
    pi = N(m, s^2) the score is -(x_t - m) / s^2, and that of the noised distribution
    -(x_t - alpha m) / (alpha^2 s^2 + beta^2).
    """

    invariant_start: ClassVar[bool] = False

    def suits(self, support_name: SupportName) -> bool:
        """Returns True: log pi is evaluated at x_t itself on any support."""
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
