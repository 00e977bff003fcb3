"""Flow-DPO (arXiv 2501.13918), online: in each group, the best samples are preferred to the worst.

For a winner w and a loser l with the same fresh (t, x0), u = x1 - x0 and x_t = t x1 + (1 - t) x0,

    D(x1) = |v(x_t) - u|^2 - |v_ref(x_t) - u|^2,    loss = -log sigmoid(-(beta / 2) (D(w) - D(l))).

Minus a matching loss stands for the log-density, as in FPO, but with a constant weight of t in place of t / (1 - t).
The gradient fades where the flow already prefers the winner by much more than the reference does. For beta -> 0 it is
beta / 4 times that of the matching loss of w minus that of l.
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
    line,
    policy_of,
    repeated,
    with_pretrained,
)
from contraflow.agents.base import Preset, flow_of
from contraflow.core.optim import Optim, check_positive
from contraflow.core.types import EnvSpec, Metrics, PRNGKey, UserError
from contraflow.flow.model import FlowSpec
from contraflow.policy.base import Policy


@dataclass(frozen=True)
class FlowDPO:
    """Preferences between the samples of a group.

    Raises ValueError for values out of range, and UserError at the first update for more pairs than half of a group.

    Cost of a sample that is in a pair: the evaluations of the solver to draw it, and for each of `times` one evaluation
    with gradients and one without. The others only cost the solver's.
    """

    flow: FlowSpec = FlowSpec()
    """The flow to align; a pretrained policy replaces it."""
    beta: float = 3.0
    """Norms are summed over coordinates. The released code has the mean and 100."""
    pairs: int = 1
    """Pairs of a group: the best against the worst, the second best against the second worst, and so on."""
    times: int = 8
    """Pairs (t, x0) for each pair of samples."""
    minibatches: int = 1
    """Gradient steps for the samples of one iteration."""
    optim: Optim = Optim(3e-4, max_grad_norm=1.0)

    needs = "conditions"

    def __post_init__(self):
        check_positive(self, "beta", "pairs", "times", "minibatches")

    def init(self, key: PRNGKey, spec: EnvSpec) -> AlignState:
        """Returns fresh networks; `adopt` inserts the pretrained flow."""
        return first_state(self.flow, self.optim, key, spec)

    def policy(self, state: AlignState) -> Policy:
        """Returns the end of the flow from random noise."""
        return policy_of(state)

    def starting_from(self, policy: Policy) -> "FlowDPO":
        """Returns the settings with the flow of a pretrained policy."""
        return replace(self, flow=checked_flow(flow_of(policy, self)[0].spec, "FlowDPO"))

    def adopt(self, state: AlignState, policy: Policy) -> AlignState:
        """Returns the state with the networks of a pretrained policy."""
        return with_pretrained(state, self.flow, policy, self)

    def explore(self, state: AlignState, cond: Float[Array, "B c"], group: int, key: PRNGKey) -> Draws:
        """Returns samples of the flow."""
        return Draws(ends(state.flow, encoded(state, cond), group, key))

    def update(self, state: AlignState, scored: Scored, key: PRNGKey) -> tuple[AlignState, Metrics]:
        """Makes one gradient step on each share of the pairs; a pair with equal rewards has no gradient."""
        n = self.pairs
        if 2 * n > scored.reward.shape[1]:
            raise UserError(f"{n} pairs need groups of at least {2 * n} samples: use --group {2 * n} or fewer pairs")
        order = jnp.argsort(scored.total, 1)
        taken = lambda x, at: jnp.take_along_axis(x, at if x.ndim == 2 else at[..., None], 1)
        best, worst = order[:, ::-1][:, :n], order[:, :n]
        differ = taken(scored.total, best) > taken(scored.total, worst)
        pairs = flat((taken(scored.draws.end, best), taken(scored.draws.end, worst), differ.astype(jnp.float32)))
        rows = repeated(encoded(state, scored.cond), n), *pairs

        def loss(flow, part, key):
            def gain(cond, x1, key):
                """D(x1)."""
                x, t, u = line(flow, x1, key)
                new, reference = (jnp.sum((field(f, cond)(x, t) - u) ** 2) for f in (flow, state.reference))
                return new - reference

            def one(cond, winner, loser, differ, key):
                margin = -0.5 * self.beta * (gain(cond, winner, key) - gain(cond, loser, jr.clone(key)))
                return differ * jax.nn.softplus(-margin), margin

            cond, winner, loser, differ = part
            keys = jr.split(key, (winner.shape[0], self.times))
            losses, margin = jax.vmap(jax.vmap(one, (None, None, None, None, 0)))(cond, winner, loser, differ, keys)
            return jnp.mean(losses), {"margin": jnp.mean(margin), "accuracy": jnp.mean(margin > 0)}

        return descend(self.optim, state, loss, rows, key, self.minibatches)


PRESETS = (Preset("flow-dpo", FlowDPO(), "Flow-DPO", "2501.13918", "best against worst of a group", "conditions"),)
