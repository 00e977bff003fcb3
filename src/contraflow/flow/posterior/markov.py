"""Posterior means by Markov chains from the policy's endpoints, without bias once the policy is right."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import jax.random as jr

from contraflow.core.checks import check_count
from contraflow.core.types import PRNGKey
from contraflow.flow.path import AbstractPath, Scalar, Vector
from contraflow.flow.posterior.base import Posterior, SupportName
from contraflow.flow.posterior.proposal import Mixture, Particles, Proposal, Support
from contraflow.flow.posterior.starts import pick_starts
from contraflow.flow.targets import LogDensity, log_normal


@dataclass(frozen=True)
class Markov:
    """Averages the second halves of Markov chains for the posterior that start at endpoints of the policy.

    `support[0]` must be the endpoint that was noised to x_t, and the other rows independent endpoints of the same
    policy. If the policy's distribution is pi, (support[0], x_t) is a joint draw and support[0] is a draw of the
    posterior. The same holds for an endpoint picked with probability ~ N(x_t; alpha u_i, beta^2) (iterated sampling
    importance resampling), and a kernel that leaves the posterior invariant preserves it. The estimate is then unbiased
    for any number of candidates, where importance sampling needs a number exponential in d. If the policy is not yet
    right, each update moves it one kernel towards pi. There are as many chains as endpoints, with starts picked by
    systematic resampling: all different at small t, where x_t carries little information, and all support[0] at large
    t. Averaging over chains reduces variance only.

    The kernel is local-global (Samsonov et al., 2111.02702). The global move picks one of `samples` candidates, the
    start and draws of `proposal`, by importance weight. The local moves are Metropolis-adjusted Langevin steps on
    log pi(u) + log N(x_t; alpha u, beta^2), one for each entry of `sizes`, which is the variance of the step in units
    of d^(-1/3) / (1 + alpha^2 / beta^2). Rejected moves are averaged by their probability (Rao-Blackwell). Without
    `sizes`, the estimate is the importance-weighted mean of the candidates.

    The mean of the chain's scores s, with expectation zero, is added with the weight
    1 / (1 / control^2 + alpha^2 / beta^2). This Stein control variate leaves no variance where pi is Gaussian with
    standard deviation `control`. It makes targets near t = 1 precise, where the likelihood alone is nearly Gaussian.

    `eta` of the result is that weight times alpha^2 / beta^2 (0 without `sizes`), and `ess` in [1, samples] that of the
    candidates of a chain. P endpoints cost samples - 1 + P critic values, and P (1 + len(sizes)) with gradients.
    The proposal must not depend on `support`, as `Particles` does, because its density would change with the move and
    the kernel would no longer leave the posterior invariant. It must also reach every start. Raises ValueError for a
    proposal that does not, samples < 1, a size <= 0, control < 0, or a call without `support`.
    """

    samples: int = 16
    proposal: Proposal = Mixture()
    sizes: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    control: float = 0.0
    invariant_start: ClassVar[bool] = True

    def __post_init__(self):
        check_count(self, 1, "samples")
        if any(size <= 0 for size in self.sizes):
            raise ValueError(f"Markov(sizes={self.sizes}): step sizes must be positive")
        if self.control < 0:
            raise ValueError(f"Markov(control={self.control}): the standard deviation must not be negative")
        if any(isinstance(part, Particles) for part in getattr(self.proposal, "components", (self.proposal,))):
            raise ValueError("Markov needs a proposal that does not depend on the policy's endpoints: not Particles")
        if self.proposal.boundary:
            raise ValueError("Markov needs a proposal on the whole space: an endpoint outside it would have no weight")

    def suits(self, support_name: SupportName) -> bool:
        """Returns whether the density lives on the whole space: gradient moves would leave a box."""
        return support_name != "box"

    def __call__(
        self,
        key: PRNGKey,
        path: AbstractPath,
        log_pi: LogDensity,
        x_t: Vector,
        t: Scalar,
        support: Support = None,
    ) -> Posterior:
        """Returns the estimate at x_t [d] and t [], with beta_t > 0 (and alpha_t > 0 for proposals that invert noise).

        The first row of `support` [P, d] is the endpoint that was noised to x_t.
        """
        k_candidates, k_starts, k_pick, k_moves, k_accept = jr.split(key, 5)
        support, starts = pick_starts(k_starts, path, x_t, t, support)
        a, b, d = path.alpha(t), path.beta(t), x_t.shape[0]

        def log_p(u):
            return log_pi(u) + log_normal(x_t, a * u, b)

        def log_weight(u):
            return log_p(u) - self.proposal.log_prob(u, path, x_t, t, support)

        # Global: each start competes with the same fresh candidates.
        fresh = self.proposal.sample(k_candidates, path, x_t, t, self.samples - 1, support)
        log_fresh, log_support = jax.vmap(log_weight)(fresh), jax.vmap(log_weight)(support)

        # Local: Metropolis-adjusted Langevin. The posterior is at most as wide as the likelihood makes it.
        scale = d ** (-1 / 3) / (1 + (a / b) ** 2)
        weight = self.control**2 / (1 + (self.control * a / b) ** 2)
        n = len(self.sizes)

        def move(state, inputs):
            """One step from the state (u, log p(u), gradient); also returns its Rao-Blackwell mean with the control."""
            u, p, grad = state
            noise, place, size = inputs
            h = size * scale
            new = u + 0.5 * h * grad + jnp.sqrt(h) * noise
            new_p, new_grad = jax.value_and_grad(log_p)(new)
            back = u - new - 0.5 * h * new_grad
            accept = jnp.exp(jnp.minimum(new_p - p + 0.5 * (jnp.sum(noise**2) - jnp.sum(back**2) / h), 0.0))
            moved = jax.tree.map(lambda x, y: jnp.where(place < accept, x, y), (new, new_p, new_grad), state)
            return moved, accept * (new + weight * new_grad) + (1 - accept) * (u + weight * grad)

        def chain(start, k_pick, k_moves, k_accept):
            """Returns the estimate of the chain from support[start] and the effective sample size of its candidates."""
            mine = jnp.concatenate([support[start][None], fresh])
            log_w = jnp.concatenate([log_support[start][None], log_fresh])
            w = jax.nn.softmax(log_w)
            ess = 1.0 / jnp.sum(w**2)
            if not self.sizes:
                return w @ mine, ess
            u = mine[jr.categorical(k_pick, log_w)]
            inputs = jr.normal(k_moves, (n, d)), jr.uniform(k_accept, (n,)), jnp.asarray(self.sizes)
            _, means = jax.lax.scan(move, (u, *jax.value_and_grad(log_p)(u)), inputs)
            return means[n // 2 :].mean(0), ess

        keys = (jr.split(k, starts.shape[0]) for k in (k_pick, k_moves, k_accept))
        means, ess = jax.vmap(chain)(starts, *keys)
        eta = weight * (a / b) ** 2 if self.sizes else 0.0
        return Posterior(means.mean(0), jnp.full_like(x_t, eta), ess.mean())
