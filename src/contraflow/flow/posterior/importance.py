"""Self-normalised importance sampling of the posterior mean, which needs only the unnormalised density pi of x1.

With candidates u_k ~ q, weights w_k ~ pi(u_k) N(x_t; alpha u_k, beta^2 I) / q(u_k) and the posterior score

    s_k = (alpha / beta) x0_k + grad log pi(u_k),   x0_k = (x_t - alpha u_k) / beta,      E[s] = 0,

the estimate is sum_k w_k (u_k + c s_k). In terms of eta = c alpha^2 / beta^2 (flow/posterior/control.py), eta = 0
averages noise (QNE, MaxEntDP, SDAC) and eta = 1 averages gradients (iDEM, DQS).
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import jax.random as jr

from contraflow.core.checks import check_count
from contraflow.core.types import PRNGKey
from contraflow.flow.path import AbstractPath, Scalar, Vector
from contraflow.flow.posterior.base import Posterior, SupportName
from contraflow.flow.posterior.control import Control, Fixed, MinVariance, Weights
from contraflow.flow.posterior.proposal import Noise, Particles, Proposal, Support, TruncatedNoise
from contraflow.flow.targets import LogDensity, log_normal


@dataclass(frozen=True)
class Reverse:
    """Reverse Flow Matching (2601.08136): `samples` candidates of `proposal`, with a Stein control variate.

    Raises ValueError for samples < 1, and for a bounded proposal with a nonzero control: Stein's identity would have a
    boundary term and the estimate a bias.
    """

    samples: int = 100
    proposal: Proposal = Noise()
    control: Control = MinVariance()
    invariant_start: ClassVar[bool] = False

    def __post_init__(self):
        check_count(self, 1, "samples")
        if self.proposal.boundary and self.control.active:
            raise ValueError(
                "a truncated proposal leaves a boundary term in Stein's identity: use control=Fixed(0) "
                "or a proposal on the whole space"
            )

    def suits(self, support_name: SupportName) -> bool:
        """Returns whether the estimator is right for a support of this name.

        The faces of a box are a boundary, so a box allows no control, and candidates inside it give its exact
        posterior. Other supports need candidates on the whole space.
        """
        return not self.control.active if support_name == "box" else not self.proposal.boundary

    def __call__(
        self,
        key: PRNGKey,
        path: AbstractPath,
        log_pi: LogDensity,
        x_t: Vector,
        t: Scalar,
        support: Support = None,
    ) -> Posterior:
        """Returns the estimate at x_t [d] and t [] with alpha_t > 0 and beta_t > 0.

        The proposal `Particles` needs `support` [P, d].
        """
        a, b = path.alpha(t), path.beta(t)
        x = self.proposal.sample(key, path, x_t, t, self.samples, support)
        if self.control.active:
            log_p, grad = jax.vmap(jax.value_and_grad(log_pi))(x)
        else:
            log_p, grad = jax.vmap(log_pi)(x), jnp.zeros_like(x)
        w = jax.nn.softmax(log_p + self._log_likelihood_ratio(path, x, x_t, t, support))
        x0 = (x_t[None] - a * x) / b
        mean, eta = self.control(w, x, a / b * x0 + grad, (a / b) ** 2)
        return Posterior(mean, eta, 1.0 / jnp.sum(w**2))

    def _log_likelihood_ratio(self, path, x, x_t, t, support) -> Weights:
        """log N(x_t; alpha u, beta^2) - log q(u) [K] up to a constant; all zeros for the proposal `Noise`."""
        if not isinstance(self.proposal, Noise):
            a, b = path.alpha(t), path.beta(t)
            log_q = jax.vmap(lambda u: self.proposal.log_prob(u, path, x_t, t, support))(x)
            return jax.vmap(lambda u: log_normal(x_t, a * u, b))(x) - log_q
        return jnp.zeros(x.shape[0])


@dataclass(frozen=True)
class Pooled:
    """Combines several estimates, each weighted by its share of the effective sample sizes (MFPO, 2604.14698).

    MFPO pools two estimates with eta = 0 in the box. Candidates from noise are good near t = 1 and candidates from the
    policy near t = 0. `Particles`, a kernel density of the policy's endpoints, replaces the policy density of MFPO.
    A single candidate with all the weight still counts as one, however wrong it is, so use parts only where they do no
    harm. A `Mixture` of the same proposals is the alternative within one estimate (docs/methods/estimators.md compares
    the two). `ess` is the sum over parts. Raises ValueError without parts.
    """

    parts: tuple[Reverse, ...] = (
        Reverse(32, TruncatedNoise(), Fixed(0.0)),
        Reverse(16, Particles(0.3, bound=1.0), Fixed(0.0)),
    )

    invariant_start: ClassVar[bool] = False

    def __post_init__(self):
        if not self.parts:
            raise ValueError("Pooled needs at least one estimator in `parts`")

    def suits(self, support_name: SupportName) -> bool:
        """Returns whether all parts suit the support."""
        return all(part.suits(support_name) for part in self.parts)

    def __call__(
        self,
        key: PRNGKey,
        path: AbstractPath,
        log_pi: LogDensity,
        x_t: Vector,
        t: Scalar,
        support: Support = None,
    ) -> Posterior:
        """Returns the pooled estimate; the arguments are those of the parts."""
        keys = jr.split(key, len(self.parts))
        posts = [part(k, path, log_pi, x_t, t, support) for part, k in zip(self.parts, keys, strict=True)]
        mean, eta, ess = (jnp.stack([getattr(p, name) for p in posts]) for name in ("mean", "eta", "ess"))
        share = ess / ess.sum()
        return Posterior(share @ mean, share @ eta, ess.sum())
