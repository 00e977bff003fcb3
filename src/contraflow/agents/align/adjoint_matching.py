"""Adjoint matching (arXiv 2409.08861): gradients of the reward, carried back along noisy paths of the flow.

The flow is to end in p_ref(x) exp(r(x) / lambda) / Z. A round draws memoryless paths x_0 ... x_K of the current flow,
takes a_K = -grad r(x_K) / lambda back by the lean adjoint, which depends on the reference alone, and regresses

    loss = mean_k |u_k + sigma_k a_{k+1}|^2,    u = 2 (v - v_ref) / sigma,    sigma^2 = 2 (1 - t) / t

(flow/adjoint.py). No gradient passes through the path, and memory is that of its states.

With a running cost f in units of reward, a gains h grad f(x_k, t_k) / lambda at each step: paths have the distribution
of the reference times exp((r(x_1) - int f dt) / lambda). FOCUS fine-tunes so (2510.02315).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int

from contraflow.agents.align.base import (
    AlignState,
    Draws,
    Scored,
    checked_flow,
    descend,
    encoded,
    field,
    first_state,
    flat,
    policy_of,
    repeated,
    with_pretrained,
)
from contraflow.agents.base import Preset, flow_of
from contraflow.core.optim import Optim, check_positive
from contraflow.core.types import EnvSpec, Metrics, PRNGKey, UserError
from contraflow.flow.adjoint import Targets, lean_adjoint, path_kl, rollout, sigma
from contraflow.flow.model import FlowSpec
from contraflow.flow.path import Scalar, Vector
from contraflow.policy.base import Policy

RunningCost = Callable[[Vector, Scalar, Vector], Scalar]
"""f(x_t [d], t, condition [c]) -> []."""


@dataclass(frozen=True)
class AdjointMatching:
    """A flow tilted by exp(r / lambda), from gradients of r.

    Cost of a sample: K evaluations to draw it, one gradient of the reward, K evaluations of the reference with
    gradients by x, and `times` with gradients by the weights. Raises ValueError for values out of range, and UserError
    for rewards that are not functions in JAX.
    """

    flow: FlowSpec = FlowSpec()
    """The flow to align; a pretrained policy replaces it."""
    temperature: float = 0.1
    """lambda, in units of reward."""
    steps: int = 20
    """K, the steps of a path."""
    times: int | None = None
    """Steps of each path that are matched, one from each of so many equal parts of it; None matches all."""
    keep: float = 1.0
    """Share of the losses that counts: those above this quantile of the batch are left out. Below 1 the optimum moves,
    because the largest errors are not symmetric."""
    running: RunningCost | None = None
    minibatches: int = 2
    """Gradient steps for the samples of one iteration."""
    optim: Optim = Optim(3e-4, max_grad_norm=1.0)

    needs = "conditions"

    def __post_init__(self):
        check_positive(self, "temperature", "minibatches")
        if self.steps < 2 or not 1 <= self.matched <= self.steps:
            raise ValueError(f"times must lie between 1 and steps >= 2, got {self.times} of {self.steps}")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must lie in (0, 1], got {self.keep}")

    @property
    def matched(self) -> int:
        """Steps of each path that are matched."""
        return self.steps if self.times is None else self.times

    def init(self, key: PRNGKey, spec: EnvSpec) -> AlignState:
        """Returns fresh networks; `adopt` inserts the pretrained flow."""
        return first_state(self.flow, self.optim, key, spec)

    def policy(self, state: AlignState) -> Policy:
        """Returns the end of the flow from random noise."""
        return policy_of(state)

    def starting_from(self, policy: Policy) -> "AdjointMatching":
        """Returns the settings with the flow of a pretrained policy."""
        return replace(self, flow=checked_flow(flow_of(policy, self)[0].spec, "adjoint matching"))

    def adopt(self, state: AlignState, policy: Policy) -> AlignState:
        """Returns the state with the networks of a pretrained policy."""
        return with_pretrained(state, self.flow, policy, self)

    def explore(self, state: AlignState, cond: Float[Array, "B c"], group: int, key: PRNGKey) -> Draws:
        """Returns memoryless paths of the flow. Their last step is one of the reference, without noise."""
        k_start, k_path = jr.split(key)
        conds = repeated(encoded(state, cond), group)

        def path(cond, x0, key):
            return rollout(field(state.flow, cond), field(state.reference, cond), x0, self.steps, key)

        n = conds.shape[0]
        xs = jax.vmap(path)(conds, state.flow.noise(k_start, n), jr.split(k_path, n))
        xs = xs.reshape(cond.shape[0], group, *xs.shape[1:])
        return Draws(xs[:, :, -1], xs)

    def update(self, state: AlignState, scored: Scored, key: PRNGKey) -> tuple[AlignState, Metrics]:
        """Makes one gradient step on each share of the paths."""
        seen = repeated(scored.cond, scored.reward.shape[1])
        conds = encoded(state, seen)
        targets = jax.vmap(lambda *row: self.targets(state, scored, *row))(seen, conds, flat(scored.draws.extras))

        def loss(flow, part, key):
            cond, targets = part
            k = jax.vmap(self.chosen)(jr.split(key, cond.shape[0]))
            at = jax.vmap(lambda x, k: x[k])
            x, t, base, a = (at(y, k) for y in (targets.x, targets.t, targets.base, targets.adjoint))
            v = jax.vmap(lambda c, x, t: jax.vmap(field(flow, c))(x, t))(cond, x, t)
            noise = sigma(t, 1.0 / self.steps)[..., None]
            control = 2.0 / noise * (v - base)
            losses = jnp.mean((control + noise * a) ** 2, -1)
            kept = losses <= jnp.quantile(jax.lax.stop_gradient(losses), self.keep)
            kl = jnp.mean(jax.vmap(path_kl)(control))
            return jnp.mean(losses * kept), {"path_kl": kl}

        return descend(self.optim, state, loss, (conds, targets), key, self.minibatches)

    def targets(
        self,
        state: AlignState,
        scored: Scored,
        seen: Float[Array, " s"],
        cond: Float[Array, " c"],
        xs: Float[Array, "n d"],
    ) -> Targets:
        """Returns the states of a path and the adjoints there; `seen` is the condition as the reward takes it."""
        if (score := scored.score) is None:
            raise UserError("adjoint-matching needs the gradient of the reward: use rewards in JAX, or rfm-align")
        support = state.flow.spec.support
        slope = jax.grad(lambda x: -score(support.action(x), seen) / self.temperature)(xs[-1])
        running = self.running
        cost = None if running is None else lambda x, t: running(x, t, seen) / self.temperature
        return lean_adjoint(field(state.reference, cond), xs, slope, cost)

    def chosen(self, key: PRNGKey) -> Int[Array, " m"]:
        """Returns the steps that are matched: a random one of each of `matched` equal parts."""
        if self.matched == self.steps:
            return jnp.arange(self.steps)
        place = jnp.arange(self.matched) + jr.uniform(key, (self.matched,))
        return jnp.minimum(jnp.floor(place * self.steps / self.matched).astype(int), self.steps - 1)


PRESETS = (
    Preset(
        "adjoint-matching", AdjointMatching(), "Adjoint matching", "2409.08861",
        "gradients of the reward along memoryless paths", "conditions",
    ),
)  # fmt: skip
