"""DiffusionNFT (arXiv 2509.16117): good and bad samples pull and push the velocity; no likelihood, no noisy steps.

Also MeanFlowNFT (arXiv 2607.15273), the same for flows of average velocities.

With R in [0, 1] the optimality of a sample x1 of the old flow, u = x1 - x0 and fresh (t, x0),

    v+ = (1 - beta) v_old + beta v,    v- = (1 + beta) v_old - beta v,
    loss = E [R |v+ - u|^2 + (1 - R) |v- - u|^2] / beta.

The optimum for a fixed old flow is v_old + E[(2 R - 1) (u - v_old) | x_t] / beta, so beta is an inverse strength. The
old flow follows slowly.

An average velocity m(x_t, t, r) implies the velocity v = m - (r - t) dm/dt, with the total derivative along the flow.
MeanFlowNFT puts this v, for random steps from t to r, in the place of v and v_old. The derivative is that of the old
network along u, for both, and has no gradient. Its mean given x_t is the derivative along the flow, as in MeanFlow.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.agents.align.base import (
    AlignState,
    Draws,
    Scored,
    checked_flow,
    descend,
    encoded,
    ends,
    first_state,
    flat,
    followed,
    line,
    policy_of,
    repeated,
    with_pretrained,
)
from contraflow.agents.base import Preset, flow_of
from contraflow.core.optim import Optim, check_positive
from contraflow.core.types import EnvSpec, Metrics, PRNGKey
from contraflow.flow.model import Condition, Ddim, Flow, FlowSpec
from contraflow.flow.path import Scalar, Vector
from contraflow.policy.base import Policy
from contraflow.rl.group import GroupAdvantage


@dataclass(frozen=True)
class NFT:
    """DiffusionNFT. Raises ValueError for values out of range.

    Cost of a sample: the evaluations of the solver to draw it, and for each of `times` one evaluation with gradients
    and two without; for average velocities also a derivative of one, which costs about two.
    """

    flow: FlowSpec = FlowSpec()
    """The flow to align; a pretrained policy of the same kind, averaged or not, replaces it."""
    beta: float = 1.0
    advantage: GroupAdvantage = GroupAdvantage()
    normalise: bool = True
    """Errors are squares of x1 divided by their absolute size, as in the released code. This is scale-free, and moves
    the optimum. Off, they are squares of the velocity, with the optimum above."""
    anchor: float = 1e-4
    """Weight of |v - v_ref|^2."""
    rate: float = 0.001
    """The old flow keeps the share min(cap, rate * iteration) of itself in each iteration."""
    cap: float = 0.5
    instant: float = 0.5
    """Share of the pairs (t, x0) with r = t, for average velocities. Of the others, half have r = 1 and half a random
    r."""
    times: int = 4
    """Pairs (t, x0) for each sample."""
    minibatches: int = 2
    """Gradient steps for the samples of one iteration."""
    optim: Optim = Optim(3e-4, max_grad_norm=1.0)

    needs = "conditions"

    def __post_init__(self):
        check_positive(self, "beta", "times", "minibatches")
        if self.anchor < 0 or self.rate < 0 or not 0 <= self.cap < 1 or not 0 <= self.instant <= 1:
            raise ValueError("NFT needs anchor >= 0, rate >= 0, cap in [0, 1) and instant in [0, 1]")

    def init(self, key: PRNGKey, spec: EnvSpec) -> AlignState:
        """Returns fresh networks; `adopt` inserts the pretrained flow."""
        return first_state(self.flow, self.optim, key, spec, old=True)

    def policy(self, state: AlignState) -> Policy:
        """Returns the end of the flow from random noise."""
        return policy_of(state)

    def starting_from(self, policy: Policy) -> "NFT":
        """Returns the settings with the flow of a pretrained policy."""
        return replace(self, flow=checked_flow(flow_of(policy, self)[0].spec, "NFT", self.flow.averaged))

    def adopt(self, state: AlignState, policy: Policy) -> AlignState:
        """Returns the state with the networks of a pretrained policy."""
        return with_pretrained(state, self.flow, policy, self)

    def explore(self, state: AlignState, cond: Float[Array, "B c"], group: int, key: PRNGKey) -> Draws:
        """Returns samples of the old flow."""
        return Draws(ends(state.old, encoded(state, cond), group, key))

    def update(self, state: AlignState, scored: Scored, key: PRNGKey) -> tuple[AlignState, Metrics]:
        """Makes one gradient step on each share of the samples; the old flow follows."""
        group, most = scored.reward.shape[1], self.advantage.clip
        advantage = self.advantage(scored.reward, scored.weights).reshape(-1)
        good = jnp.clip(0.5 + advantage / (2 * most), 0.0, 1.0)
        rows = repeated(encoded(state, scored.cond), group), flat(scored.draws.end), good

        def loss(flow, part, key):
            def one(cond, x1, good, key, k_step):
                x, t, u = line(flow, x1, key)
                if self.flow.averaged:
                    velocity = self._induced(state.old, cond, x, t, u, k_step)
                else:
                    velocity = lambda flow: flow.velocity(x, t, cond)
                v, old, reference = (velocity(f) for f in (flow, state.old, state.reference))
                plus, minus = (1 - self.beta) * old + self.beta * v, (1 + self.beta) * old - self.beta * v
                losses = good * self._error(plus, u, t) + (1 - good) * self._error(minus, u, t)
                return losses, jnp.mean((v - reference) ** 2)

            shape = part[1].shape[0], self.times
            keys = jr.split(key, shape), jr.split(jr.fold_in(key, 1), shape)
            cond, x1, good = part
            losses, away = jax.vmap(jax.vmap(one, (None, None, None, 0, 0)))(cond, x1, good, *keys)
            value = most * jnp.mean(losses) / self.beta
            return value + self.anchor * jnp.mean(away), {"anchor": jnp.mean(away)}

        state, metrics = descend(self.optim, state, loss, rows, key, self.minibatches)
        state, kept = followed(state, self.rate, self.cap)
        return state, metrics | kept

    def _induced(
        self, old: Flow, cond: Condition, x: Vector, t: Scalar, u: Vector, key: PRNGKey
    ) -> Callable[[Flow], Vector]:
        """Draws the end of a step; returns the velocity that a flow's average over the step implies."""
        k_kind, k_end = jr.split(key)
        kind, end = jr.uniform(k_kind), t + (1 - t) * jr.uniform(k_end)
        r = jnp.where(kind < self.instant, t, jnp.where(kind < 0.5 * (1 + self.instant), 1.0, end))
        return lambda flow: implied(flow, old, cond, x, t, r, u)

    def _error(self, v: Float[Array, " d"], u: Float[Array, " d"], t: Float[Array, ""]) -> Float[Array, ""]:
        if not self.normalise:
            return jnp.mean((v - u) ** 2)
        gap = (1 - t) * (v - u)  # of x1
        return jnp.mean(gap**2) / jnp.maximum(jax.lax.stop_gradient(jnp.mean(jnp.abs(gap))), 1e-5)


def implied(flow: Flow, old: Flow, cond: Condition, x: Vector, t: Scalar, r: Scalar, along: Vector) -> Vector:
    """Returns m(x_t, t, r) - (r - t) d/dt m_old(x_t, t, r) [d], with dx/dt = `along` and no gradient of the second."""
    _, change = jax.jvp(lambda x, t: old.average(x, t, r, cond), (x, t), (along, jnp.ones_like(t)))
    return flow.average(x, t, r, cond) - jax.lax.stop_gradient((r - t) * change)


AVERAGED = NFT(flow=FlowSpec(solver=Ddim(4), averaged=True), beta=0.1)
PRESETS = (
    Preset("nft", NFT(), "DiffusionNFT", "2509.16117", "good samples pull, bad ones push", "conditions"),
    Preset("mean-flow-nft", AVERAGED, "MeanFlowNFT", "2607.15273", "nft for flows of few steps", "conditions"),
)
