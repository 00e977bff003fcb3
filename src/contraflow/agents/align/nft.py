"""DiffusionNFT (arXiv 2509.16117): good and bad samples pull and push the velocity; no likelihood, no noisy steps.

With R in [0, 1] the optimality of a sample x1 of the old flow, u = x1 - x0 and fresh (t, x0),

    v+ = (1 - beta) v_old + beta v,    v- = (1 + beta) v_old - beta v,
    loss = E [R |v+ - u|^2 + (1 - R) |v- - u|^2] / beta.

The optimum for a fixed old flow is v_old + E[(2 R - 1) (u - v_old) | x_t] / beta, so beta is an inverse strength. The
old flow follows slowly.
"""

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
    field,
    first_state,
    flat,
    policy_of,
    repeated,
    with_pretrained,
)
from contraflow.agents.base import Preset, flow_of
from contraflow.core.optim import Optim, check_positive
from contraflow.core.types import EnvSpec, Metrics, PRNGKey
from contraflow.flow.model import EDGE, FlowSpec
from contraflow.policy.base import Policy
from contraflow.rl.group import GroupAdvantage


@dataclass(frozen=True)
class NFT:
    """DiffusionNFT. Raises ValueError for values out of range.

    Cost of a sample: the evaluations of the solver to draw it, and for each of `times` one evaluation with gradients
    and two without.
    """

    flow: FlowSpec = FlowSpec()
    """The flow to align; a pretrained policy replaces it."""
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
    times: int = 4
    """Pairs (t, x0) for each sample."""
    minibatches: int = 2
    """Gradient steps for the samples of one iteration."""
    optim: Optim = Optim(3e-4, max_grad_norm=1.0)

    needs = "conditions"

    def __post_init__(self):
        check_positive(self, "beta", "times", "minibatches")
        if self.anchor < 0 or self.rate < 0 or not 0 <= self.cap < 1:
            raise ValueError("NFT needs anchor >= 0, rate >= 0 and cap in [0, 1)")

    def init(self, key: PRNGKey, spec: EnvSpec) -> AlignState:
        """Returns fresh networks; `adopt` inserts the pretrained flow."""
        return first_state(self.flow, self.optim, key, spec, old=True)

    def policy(self, state: AlignState) -> Policy:
        """Returns the end of the flow from random noise."""
        return policy_of(state)

    def starting_from(self, policy: Policy) -> "NFT":
        """Returns the settings with the flow of a pretrained policy."""
        return replace(self, flow=checked_flow(flow_of(policy, self)[0].spec, "NFT"))

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
            def one(cond, x1, good, key):
                k_x0, k_t = jr.split(key)
                x0, t = flow.noise(k_x0), jr.uniform(k_t, minval=EDGE, maxval=1 - EDGE)
                x = t * x1 + (1 - t) * x0
                v, old, reference = (field(f, cond)(x, t) for f in (flow, state.old, state.reference))
                plus, minus = (1 - self.beta) * old + self.beta * v, (1 + self.beta) * old - self.beta * v
                losses = good * self._error(plus, x1 - x0, t) + (1 - good) * self._error(minus, x1 - x0, t)
                return losses, jnp.mean((v - reference) ** 2)

            keys = jr.split(key, (part[1].shape[0], self.times))
            cond, x1, good = part
            losses, away = jax.vmap(jax.vmap(one, (None, None, None, 0)))(cond, x1, good, keys)
            value = most * jnp.mean(losses) / self.beta
            return value + self.anchor * jnp.mean(away), {"anchor": jnp.mean(away)}

        state, metrics = descend(self.optim, state, loss, rows, key, self.minibatches)
        kept = jnp.minimum(self.cap, self.rate * state.step)
        old = jax.tree.map(lambda old, new: kept * old + (1 - kept) * new, state.old, state.flow)
        return replace(state, old=old), metrics | {"kept": kept}

    def _error(self, v: Float[Array, " d"], u: Float[Array, " d"], t: Float[Array, ""]) -> Float[Array, ""]:
        if not self.normalise:
            return jnp.mean((v - u) ** 2)
        gap = (1 - t) * (v - u)  # of x1
        return jnp.mean(gap**2) / jnp.maximum(jax.lax.stop_gradient(jnp.mean(jnp.abs(gap))), 1e-5)


PRESETS = (Preset("nft", NFT(), "DiffusionNFT", "2509.16117", "good samples pull, bad ones push", "conditions"),)
