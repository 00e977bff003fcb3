"""Posterior means by Gibbs sampling from the policy's endpoints, one coordinate at a time: the default of RFM."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import jax.random as jr

from contraflow.core.checks import check_count
from contraflow.core.types import PRNGKey
from contraflow.flow.path import AbstractPath, Scalar, Vector
from contraflow.flow.posterior.base import Posterior, SupportName
from contraflow.flow.posterior.proposal import Support
from contraflow.flow.posterior.starts import pick_starts
from contraflow.flow.posterior.strata import BoxStrata, Strata
from contraflow.flow.targets import LogDensity


@dataclass(frozen=True)
class Gibbs:
    """Runs chains as in `Markov` (flow/posterior/markov.py), but renews one coordinate at a time, in random order.

    Coordinate j of the start competes with `samples` - 1 candidates while all other coordinates keep their current
    values. One of them is picked with weight pi(u) N(x_t,j; alpha u_j, beta^2) / q_j(u_j), and the weighted mean of all
    estimates E[x1_j | x_t]. The proposal q is `Strata`, close to the posterior without the critic. Of n candidates, one
    lies in each n-th of the probability of q, the start in its own. This leaves the posterior invariant: for any draw
    of it, the other n - 1 have the same distribution. The estimate is therefore unbiased where the policy is right, and
    its variance is that of a sum over a one-dimensional grid, not of importance sampling in d dimensions. The method is
    ours: iterated sampling importance resampling within Gibbs sampling, with strata in place of independent draws.

    With `bound`, x1 is the action itself, in a box and without a Jacobian. Then q is `BoxStrata`, the likelihood on the
    box, and the weights are exactly those of pi. Endpoints outside the box, from a policy still in training, are
    clipped to it.

    A sweep forgets its start as far as coordinates are independent given x_t. Where the critic couples them, the
    gradients of `Markov` may move further. The second half of the sweeps is averaged. `eta` is 0 and `ess` the mean
    over coordinates, in [1, samples]. Each endpoint costs 1 + sweeps d (samples - 1) critic evaluations, of which
    sweeps d are sequential. Raises ValueError for samples < 2, sweeps < 1, bound <= 0 or a call without `support`.
    """

    samples: int = 4
    sweeps: int = 1
    bound: float | None = None
    """Half the side of the box that holds x1; None means the whole space."""
    invariant_start: ClassVar[bool] = True

    def __post_init__(self):
        check_count(self, 2, "samples")
        check_count(self, 1, "sweeps")
        if self.bound is not None and not self.bound > 0:
            raise ValueError(f"Gibbs: bound must be positive or None, got {self.bound}")

    def suits(self, support_name: SupportName) -> bool:
        """Returns whether the support is a box if `bound` is set, or the whole space if not."""
        return (support_name == "box") == (self.bound is not None)

    def __call__(
        self,
        key: PRNGKey,
        path: AbstractPath,
        log_pi: LogDensity,
        x_t: Vector,
        t: Scalar,
        support: Support = None,
    ) -> Posterior:
        """Returns the estimate at x_t [d] and t [], with beta_t > 0 (and alpha_t > 0 in a box).

        The first row of `support` [P, d] is the endpoint that was noised to x_t.
        """
        k_starts, k_chains = jr.split(key)
        if self.bound is not None and support is not None:
            support = jnp.clip(support, -self.bound, self.bound)
        support, starts = pick_starts(k_starts, path, x_t, t, support)
        d, n = x_t.shape[0], self.samples
        fit = Strata.fit if self.bound is None else partial(BoxStrata.fit, bound=self.bound)
        strata = jax.vmap(lambda x: fit(path, x, t))(x_t)

        def sweep(state, inputs):
            """Renews every coordinate once; the state is (u, log pi(u))."""
            place, order, gumbel = inputs
            rank, own_ratio = jax.vmap(lambda q, u: q.rank(u))(strata, state[0])
            own, shift = jnp.minimum(jnp.floor(n * rank), n - 1), jnp.arange(1.0, n)
            ranks = ((own[:, None] + shift[None]) % n + place) / n
            fresh, ratio = jax.vmap(lambda q, r: jax.vmap(q.quantile)(r))(strata, ranks)
            values = jnp.concatenate([state[0][:, None], fresh], axis=1)
            log_ratio = jnp.concatenate([own_ratio[:, None], ratio], axis=1)

            def renew(state, inputs):
                """Renews one coordinate."""
                u, p = state
                j, gumbel = inputs
                trials = jnp.repeat(u[None], n - 1, axis=0).at[:, j].set(fresh[j])
                log_p = jnp.concatenate([p[None], jax.vmap(log_pi)(trials)])
                log_w = log_p + log_ratio[j]
                w, picked = jax.nn.softmax(log_w), jnp.argmax(log_w + gumbel)
                state = u.at[j].set(values[j, picked]), log_p[picked]
                return state, (w @ values[j], 1.0 / jnp.sum(w**2))

            state, (means, ess) = jax.lax.scan(renew, state, (order, gumbel))
            return state, (jnp.zeros_like(means).at[order].set(means), ess.mean())

        def chain(start, key):
            """Returns the estimate of the chain from support[start] and the effective sample size of its candidates."""
            k_fresh, k_order, k_pick = jr.split(key, 3)
            place = jr.uniform(k_fresh, (self.sweeps, d, n - 1))
            order = jnp.argsort(jr.uniform(k_order, (self.sweeps, d)), axis=1)
            gumbel = jr.gumbel(k_pick, (self.sweeps, d, n))
            u = support[start]
            _, (means, ess) = jax.lax.scan(sweep, (u, log_pi(u)), (place, order, gumbel))
            return means[self.sweeps // 2 :].mean(0), ess.mean()

        means, ess = jax.vmap(chain)(starts, jr.split(k_chains, starts.shape[0]))
        return Posterior(means.mean(0), jnp.zeros_like(x_t), ess.mean())
