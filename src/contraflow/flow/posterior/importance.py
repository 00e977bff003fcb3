"""Self-normalised importance sampling for the posterior mean, which needs only the unnormalised density pi of x1.

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

    Raises ValueError for samples < 1, and for a proposal with a boundary together with a nonzero control: Stein's
    identity then has a boundary term and the estimate would be biased.
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
        """In a box, whose faces are a boundary too, without control, and exactly so with candidates that lie inside;
        elsewhere with candidates everywhere."""
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
        """x_t: [d], t: [] with alpha_t > 0 and beta_t > 0; support: [P, d] for the proposal `Particles`."""
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
        """log N(x_t; alpha u, beta^2) - log q(u) up to a constant, which is constant for the noise proposals."""
        if not isinstance(self.proposal, Noise):
            a, b = path.alpha(t), path.beta(t)
            log_q = jax.vmap(lambda u: self.proposal.log_prob(u, path, x_t, t, support))(x)
            return jax.vmap(lambda u: log_normal(x_t, a * u, b))(x) - log_q
        return jnp.zeros(x.shape[0])


@dataclass(frozen=True)
class Pooled:
    """Several estimates, each weighted by its share of the effective sample sizes (MFPO, 2604.14698).

    MFPO pools two with eta = 0 in the box: candidates from noise, which are good near t = 1, and from the policy, which
    are good near t = 0 (`Particles` here, a kernel density of its endpoints, where MFPO has the policy's own density).
    One candidate that has all the weight still counts as one, however wrong: keep candidates where they can do no harm.
    Against a `Mixture` of the same proposals in one estimate: docs/methods/estimators.md. `ess` is the sum. ValueError
    without parts.
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
        """What all of its parts suit."""
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
        """As of its parts."""
        keys = jr.split(key, len(self.parts))
        posts = [part(k, path, log_pi, x_t, t, support) for part, k in zip(self.parts, keys, strict=True)]
        mean, eta, ess = (jnp.stack([getattr(p, name) for p in posts]) for name in ("mean", "eta", "ess"))
        share = ess / ess.sum()
        return Posterior(share @ mean, share @ eta, ess.sum())
