"""Estimators of the posterior mean E[x1 | x_t], from which all regression targets of flow and diffusion models follow.

`Reverse` needs only the unnormalised density pi of x1: self-normalised importance sampling with a Stein control variate
(Reverse Flow Matching, 2601.08136); `Pooled` joins several such estimates. `Local` looks at pi in x_t only. `FromData`
needs samples of pi (flow matching). Those that move the policy's own endpoints are in `flow/markov.py`.

With candidates u_k ~ q, weights w_k ~ pi(u_k) N(x_t; alpha u_k, beta^2 I) / q(u_k) and the posterior score

    s_k = (alpha / beta) x0_k + grad log pi(u_k),   x0_k = (x_t - alpha u_k) / beta,      E[s] = 0,

the estimate is sum_k w_k (u_k + c s_k). The control weight has two units: c (variance of u), and the dimensionless
eta = c alpha^2 / beta^2. eta = 0 averages noise (QNE, MaxEntDP, SDAC), eta = 1 averages gradients (iDEM, DQS).
"""

from dataclasses import dataclass
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.core.types import PRNGKey
from contraflow.flow.path import AbstractPath, Scalar, Vector
from contraflow.flow.posterior.proposal import Noise, Particles, Proposal, Support, TruncatedNoise
from contraflow.flow.targets import LogDensity, log_normal

Weights = Float[Array, " K"]
Candidates = Float[Array, "K d"]


class Posterior(eqx.Module):
    """`mean` estimates E[x1 | x_t]; `eta` is the control weight used; `ess` the effective sample size in [1, K]."""

    mean: Vector
    eta: Vector
    ess: Scalar


@dataclass(frozen=True)
class Fixed:
    """The same eta for every sample: 0 is noise-expectation, 1 gradient-expectation."""

    eta: float = 0.0

    @property
    def active(self) -> bool:
        return self.eta != 0.0

    def __call__(self, w: Weights, x: Candidates, s: Candidates, eta_per_c: Scalar) -> tuple[Vector, Vector]:
        c = self.eta / eta_per_c
        return w @ (x + c * s), jnp.full(x.shape[1:], self.eta, x.dtype)


@dataclass(frozen=True)
class MinVariance:
    """The control weight of least delta-method variance of the self-normalised estimate (2601.08136, prop. 2).

    With x~ = x - sum w x and s~ = s (or s - sum w s if `centred`), both weighted by w^2:
    diagonal c_j = -<x~_j s~_j> / (<s~_j^2> + ridge); isotropic the same with inner products over dimensions; full
    C = -<x~ s~'> (<s~ s~'> + ridge I)^-1. Entries are clipped to [-clip, clip] in `unit` c or eta.
    `ess_gate` = (low, high) scales the weight from 0 at that effective sample size to 1; None applies it always.
    The defaults are the official code's rule. Centred scores give zero variance on Gaussian targets but can do harm
    below an effective sample size of about 10; uncentred ones are safe there.
    """

    shape: Literal["diagonal", "isotropic", "full"] = "diagonal"
    centred: bool = True
    ridge: float = 1e-4
    clip: float = 2.0
    unit: Literal["c", "eta"] = "c"
    ess_gate: tuple[float, float] | None = None

    def __post_init__(self):
        if self.ridge < 0 or self.clip <= 0:
            raise ValueError(f"MinVariance needs ridge >= 0 and clip > 0, got {self.ridge} and {self.clip}")
        if self.ess_gate is not None and not 0 <= self.ess_gate[0] < self.ess_gate[1]:
            raise ValueError(f"MinVariance(ess_gate={self.ess_gate}) needs 0 <= low < high")

    @property
    def active(self) -> bool:
        return True

    def __call__(self, w: Weights, x: Candidates, s: Candidates, eta_per_c: Scalar) -> tuple[Vector, Vector]:
        x_mean, s_mean = w @ x, w @ s
        dx = x - x_mean[None]
        ds = s - s_mean[None] if self.centred else s
        w2 = (w**2)[:, None]
        dim = x.shape[1]
        if self.shape == "full":
            c = -jnp.linalg.solve((w2 * ds).T @ ds + self.ridge * jnp.eye(dim), (w2 * ds).T @ dx).T
        elif self.shape == "isotropic":
            c = jnp.full(dim, -jnp.sum(w2 * dx * ds) / (jnp.sum(w2 * ds**2) + self.ridge))
        else:
            c = -jnp.sum(w2 * dx * ds, 0) / (jnp.sum(w2 * ds**2, 0) + self.ridge)
        limit = self.clip if self.unit == "c" else self.clip / eta_per_c
        c = jnp.clip(c, -limit, limit)
        if self.ess_gate is not None:
            low, high = self.ess_gate
            c = c * jnp.clip((1.0 / jnp.sum(w**2) - low) / (high - low), 0.0, 1.0)
        if self.shape == "full":
            return x_mean + c @ s_mean, jnp.diagonal(c) * eta_per_c
        return x_mean + c * s_mean, c * eta_per_c


Control = Fixed | MinVariance


@dataclass(frozen=True)
class Reverse:
    """Posterior mean under an unnormalised density, from `samples` candidates of `proposal`.

    Raises ValueError for a proposal with a boundary together with a nonzero control: Stein's identity then has a
    boundary term and the estimate would be biased.
    """

    samples: int = 100
    proposal: Proposal = Noise()
    control: Control = MinVariance()

    def __post_init__(self):
        if self.samples < 1:
            raise ValueError(f"Reverse(samples={self.samples}): needs at least one candidate")
        if self.proposal.boundary and self.control.active:
            raise ValueError(
                "a truncated proposal leaves a boundary term in Stein's identity: use control=Fixed(0) "
                "or a proposal on the whole space"
            )

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
    Against a `Mixture` of the same proposals in one estimate: docs/online.md. `ess` is the sum. ValueError without
    parts.
    """

    parts: tuple[Reverse, ...] = (
        Reverse(32, TruncatedNoise(), Fixed(0.0)),
        Reverse(16, Particles(0.3, bound=1.0), Fixed(0.0)),
    )

    def __post_init__(self):
        if not self.parts:
            raise ValueError("Pooled needs at least one estimator in `parts`")

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


@dataclass(frozen=True)
class Local:
    """x0 = -beta grad log pi(x_t): the score of pi at x_t itself in place of that of the noised law (QSM, 2312.11752).

    One gradient, no candidates. Right in the limit t -> 1 only: for pi = N(m, s^2) the score is -(x_t - m) / s^2 where
    the noised law has -(x_t - alpha m) / (alpha^2 s^2 + beta^2).
    """

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


@dataclass(frozen=True)
class FromData:
    """Posterior mean when x1 is uniform on the points `support` [P, d]; one point is conditional flow matching.

    E[x1 | x_t] = sum_i w_i u_i with w_i ~ N(x_t; alpha u_i, beta^2 I). `log_pi` is ignored.
    """

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
