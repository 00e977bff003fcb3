"""Advantage Weighted Matching, AWM (arXiv 2509.25050): the matching loss of pretraining, weighted by advantages.

With x1 drawn by the flow, A its advantage in [-1, 1], u = x1 - x0 and fresh (t, x0),

    loss = E [A m_t(|v - u|^2)] + anchor E |v - v_ref|^2 + trust E |v - v_slow|^2.

A policy gradient over the noisy steps of a sampler has the same expectation at v = v_old, up to a weight of t, and more
variance, because its target is the noise of one step. A sample with A < 0 pushes v away from u without limit. With
m = identity the loss has a minimum where trust + anchor + E[A | x_t] > 0, so trust = 1 is enough everywhere.
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
    followed,
    line,
    policy_of,
    repeated,
    with_pretrained,
)
from contraflow.agents.base import Preset, flow_of
from contraflow.core.optim import Optim, check_positive
from contraflow.core.types import EnvSpec, Metrics, PRNGKey
from contraflow.flow.model import FlowSpec
from contraflow.flow.path import Scalar
from contraflow.policy.base import Policy
from contraflow.rl.group import GroupAdvantage

TINY = 1e-10  # the slope of the fourth root is infinite at 0


@dataclass(frozen=True)
class AWM:
    """Matching weighted by advantages. Raises ValueError for values out of range.

    Cost of a sample: the evaluations of the solver to draw it, and for each of `times` one evaluation with gradients
    and two without.
    """

    flow: FlowSpec = FlowSpec()
    """The flow to align; a pretrained policy replaces it."""
    advantage: GroupAdvantage = GroupAdvantage()
    weight: Literal["huber", "velocity", "elbo"] = "huber"
    """m_t(e), e the mean square over coordinates: 4 (1 - t) e^(1/4), as in the released code; e; or t / (1 - t) e, a
    bound on the log-density. Only `velocity` has the minimum above."""
    anchor: float = 1e-3
    """Weight of |v - v_ref|^2."""
    trust: float = 1.0
    """Weight of |v - v_slow|^2; without it bad samples push v without limit."""
    rate: float = 0.001
    """The slow flow keeps the share min(cap, rate * iteration) of itself in each iteration."""
    cap: float = 0.3
    times: int = 4
    """Pairs (t, x0) for each sample."""
    minibatches: int = 2
    """Gradient steps for the samples of one iteration."""
    optim: Optim = Optim(3e-4, max_grad_norm=1.0)

    needs = "conditions"

    def __post_init__(self):
        check_positive(self, "times", "minibatches")
        if min(self.anchor, self.trust, self.rate) < 0 or not 0 <= self.cap < 1:
            raise ValueError("AWM needs anchor, trust and rate >= 0 and cap in [0, 1)")

    def init(self, key: PRNGKey, spec: EnvSpec) -> AlignState:
        """Returns fresh networks; `adopt` inserts the pretrained flow."""
        return first_state(self.flow, self.optim, key, spec, old=True)

    def policy(self, state: AlignState) -> Policy:
        """Returns the end of the flow from random noise."""
        return policy_of(state)

    def starting_from(self, policy: Policy) -> "AWM":
        """Returns the settings with the flow of a pretrained policy."""
        return replace(self, flow=checked_flow(flow_of(policy, self)[0].spec, "AWM"))

    def adopt(self, state: AlignState, policy: Policy) -> AlignState:
        """Returns the state with the networks of a pretrained policy."""
        return with_pretrained(state, self.flow, policy, self)

    def explore(self, state: AlignState, cond: Float[Array, "B c"], group: int, key: PRNGKey) -> Draws:
        """Returns samples of the flow."""
        return Draws(ends(state.flow, encoded(state, cond), group, key))

    def update(self, state: AlignState, scored: Scored, key: PRNGKey) -> tuple[AlignState, Metrics]:
        """Makes one gradient step on each share of the samples; the slow flow follows."""
        advantage = self.advantage(scored.reward, scored.weights).reshape(-1) / self.advantage.clip
        advantage = jnp.clip(advantage, -1.0, 1.0)  # std="none" has no clip of its own
        cond = repeated(encoded(state, scored.cond), scored.reward.shape[1])

        def loss(flow, part, key):
            def one(cond, x1, advantage, key):
                x, t, u = line(flow, x1, key)
                v, slow, reference = (field(f, cond)(x, t) for f in (flow, state.old, state.reference))
                error = jnp.mean((v - u) ** 2)
                return (
                    advantage * self._error(error, t),
                    error,
                    jnp.mean((v - reference) ** 2),
                    jnp.mean((v - slow) ** 2),
                )

            cond, x1, advantage = part
            keys = jr.split(key, (x1.shape[0], self.times))
            every = jax.vmap(jax.vmap(one, (None, None, None, 0)))(cond, x1, advantage, keys)
            gain, matching, away, moved = (jnp.mean(x) for x in every)
            value = gain + self.anchor * away + self.trust * moved
            return value, {"matching_loss": matching, "anchor": away, "moved": moved}

        rows = cond, flat(scored.draws.end), advantage
        state, metrics = descend(self.optim, state, loss, rows, key, self.minibatches)
        state, kept = followed(state, self.rate, self.cap)
        return state, metrics | kept

    def _error(self, error: Scalar, t: Scalar) -> Scalar:
        if self.weight == "huber":
            return 4 * (1 - t) * ((error + TINY) ** 0.25 - TINY**0.25)
        return error * t / (1 - t) if self.weight == "elbo" else error


PRESETS = (Preset("awm", AWM(), "AWM", "2509.25050", "matching weighted by advantages", "conditions"),)
