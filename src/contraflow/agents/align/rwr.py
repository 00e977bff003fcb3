"""Reward-weighted matching of a flow's own samples, with an anchor or without (ORW-CFM-W2, arXiv 2502.06061).

With x1 drawn by the flow, u = x1 - x0 and fresh (t, x0),

    loss = E [w(x1) |v - u|^2] + anchor E |v - v_ref|^2,    w = exp(r / temperature) / mean of its group.

Without an anchor, each iteration that reaches the minimum multiplies the density by w. N of them lead from p_0 to
p_0 exp(N r / temperature), up to a constant, and on to the best sample: the distribution has no other fixed point.

The anchor bounds the distance of Wasserstein from the reference: W2(p, p_ref)^2 <= exp(2 L) int E |v - v_ref|^2 dt,
with L a Lipschitz constant of v. The minimum is v = (E[w u | x_t] + anchor v_ref) / (E[w | x_t] + anchor).

With a small temperature, w picks the best sample of a group, and the method is fine-tuning on best-of-n samples.
"""

from dataclasses import dataclass, replace
from typing import Literal

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
    line,
    policy_of,
    repeated,
    with_pretrained,
)
from contraflow.agents.base import Preset, flow_of
from contraflow.core.optim import Optim, check_positive
from contraflow.core.types import EnvSpec, Metrics, PRNGKey
from contraflow.flow.model import FlowSpec
from contraflow.policy.base import Policy


@dataclass(frozen=True)
class RWR:
    """Matching weighted by exponentiated rewards. Raises ValueError for values out of range.

    Cost of a sample: the evaluations of the solver to draw it, and for each of `times` one evaluation with gradients
    and, with an anchor, one without.
    """

    flow: FlowSpec = FlowSpec()
    """The flow to align; a pretrained policy replaces it."""
    temperature: float = 1.0
    unit: Literal["deviation", "reward"] = "deviation"
    """Unit of the temperature: the deviation of the rewards from the means of their groups, or the reward itself, as in
    the paper."""
    normalise: bool = True
    """Weights have mean 1 in their group, and the anchor means the same for all rewards. Off as in the paper."""
    anchor: float = 0.0
    """Weight of |v - v_ref|^2."""
    times: int = 4
    """Pairs (t, x0) for each sample."""
    minibatches: int = 2
    """Gradient steps for the samples of one iteration."""
    optim: Optim = Optim(3e-4, max_grad_norm=1.0)

    needs = "conditions"

    def __post_init__(self):
        check_positive(self, "temperature", "times", "minibatches")
        if self.anchor < 0:
            raise ValueError(f"anchor must not be negative, got {self.anchor}")
        if self.unit == "deviation" and not self.normalise:
            raise ValueError("exp of rewards in deviations may overflow: use normalise, or unit='reward'")

    def init(self, key: PRNGKey, spec: EnvSpec) -> AlignState:
        """Returns fresh networks; `adopt` inserts the pretrained flow."""
        return first_state(self.flow, self.optim, key, spec, reference=self.anchor > 0)

    def policy(self, state: AlignState) -> Policy:
        """Returns the end of the flow from random noise."""
        return policy_of(state)

    def starting_from(self, policy: Policy) -> "RWR":
        """Returns the settings with the flow of a pretrained policy."""
        return replace(self, flow=checked_flow(flow_of(policy, self)[0].spec, "RWR"))

    def adopt(self, state: AlignState, policy: Policy) -> AlignState:
        """Returns the state with the networks of a pretrained policy."""
        return with_pretrained(state, self.flow, policy, self)

    def explore(self, state: AlignState, cond: Float[Array, "B c"], group: int, key: PRNGKey) -> Draws:
        """Returns samples of the flow."""
        return Draws(ends(state.flow, encoded(state, cond), group, key))

    def weights(self, scored: Scored) -> Float[Array, "B G"]:
        """Returns w of each sample."""
        reward = scored.total
        if self.unit == "deviation":
            reward = reward / (jnp.std(reward - jnp.mean(reward, 1, keepdims=True)) + 1e-4)
        reward = reward / self.temperature
        return reward.shape[1] * jax.nn.softmax(reward, 1) if self.normalise else jnp.exp(reward)

    def update(self, state: AlignState, scored: Scored, key: PRNGKey) -> tuple[AlignState, Metrics]:
        """Makes one gradient step on each share of the samples."""
        w = self.weights(scored)
        rows = repeated(encoded(state, scored.cond), w.shape[1]), flat(scored.draws.end), w.reshape(-1)

        def loss(flow, part, key):
            def one(cond, x1, w, key):
                x, t, u = line(flow, x1, key)
                v = field(flow, cond)(x, t)
                away = jnp.mean((v - field(state.reference, cond)(x, t)) ** 2) if self.anchor else jnp.zeros(())
                return w * jnp.mean((v - u) ** 2), away

            cond, x1, w = part
            keys = jr.split(key, (x1.shape[0], self.times))
            matching, away = jax.vmap(jax.vmap(one, (None, None, None, 0)))(cond, x1, w, keys)
            return jnp.mean(matching) + self.anchor * jnp.mean(away), {"anchor": jnp.mean(away)}

        state, metrics = descend(self.optim, state, loss, rows, key, self.minibatches)
        return state, metrics | {"used": jnp.sum(w) ** 2 / (jnp.sum(w**2) * w.size)}


PRESETS = (
    Preset("rwr", RWR(), "Reward-weighted matching", "2501.13918", "matching weighted by exp(reward)", "conditions"),
    Preset("orw-cfm-w2", RWR(anchor=1.0), "ORW-CFM-W2", "2502.06061", "rwr, held near the reference", "conditions"),
    Preset("best-of-group", RWR(temperature=1e-3), "Best of n", "", "rwr on the best of each group", "conditions"),
)
