"""AC-Flow (arXiv 2510.18072): reward-weighted matching with a critic of half-made samples.

The critic V(x_t, t, c) learns E[r | x_t] from the rewards of samples, on lines from fresh noise to them. With rewards r
divided by their deviation so far, u = x1 - x0 and fresh (t, x0),

    critic  E (V(x_t, t, c) - r)^2,
    loss  = E [w |v - u|^2] + anchor E |v - v_ref|^2,    w = exp(clip(r - V(x_t, t, c), +-clip) / temperature).

For a fixed x_t, V is a constant factor of w. Unless the clip is active, it leaves the minimum without an anchor where
reward-weighted matching has it, and makes the weights less extreme. The first iterations train the critic alone.

No code was found. The paper's abstract names the critic, the clipped advantages, the weighting by a critic and the
warm-up. Their formulas here are our own.
"""

from dataclasses import dataclass, replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PyTree

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
from contraflow.core.optim import Optim, check_positive, gradient_step
from contraflow.core.types import EnvSpec, Metrics, PRNGKey
from contraflow.flow.model import Condition, FlowSpec
from contraflow.flow.path import Scalar, Vector
from contraflow.nets.layers import time_embedding
from contraflow.nets.mlp import MLP, MLPSpec
from contraflow.policy.base import Policy
from contraflow.policy.normalise import RunningMoments


class Value(eqx.Module):
    """V(x_t, t, c), and the moments of the rewards seen."""

    net: MLP
    opt: PyTree
    moments: RunningMoments


@dataclass(frozen=True)
class ACFlow:
    """Reward-weighted matching with intermediate feedback. Raises ValueError for values out of range.

    Cost of a sample: the evaluations of the solver to draw it, for each of `times` one evaluation of the flow with
    gradients, one without if there is an anchor, and one of the critic; and `critic_steps` of the critic with
    gradients.
    """

    flow: FlowSpec = FlowSpec()
    """The flow to align; a pretrained policy replaces it."""
    critic_net: MLPSpec = MLPSpec()
    temperature: float = 1.0
    clip: float = 2.0
    """Bound on the advantage, in deviations of the reward; 0 is matching to the flow's own samples."""
    baseline: bool = True
    """The advantage is r - V. Off, it is r, and the method is reward-weighted matching."""
    anchor: float = 1.0
    """Weight of |v - v_ref|^2."""
    warmup: int = 20
    """Iterations in which only the critic learns."""
    critic_steps: int = 8
    """Gradient steps of the critic in an iteration, each on all samples."""
    times: int = 4
    """Pairs (t, x0) for each sample."""
    minibatches: int = 2
    """Gradient steps of the flow for the samples of one iteration."""
    optim: Optim = Optim(3e-4, max_grad_norm=1.0)
    critic_optim: Optim = Optim(1e-3)

    needs = "conditions"

    def __post_init__(self):
        check_positive(self, "temperature", "critic_steps", "times", "minibatches")
        if min(self.clip, self.anchor, self.warmup) < 0:
            raise ValueError("clip, anchor and warmup must not be negative")

    def init(self, key: PRNGKey, spec: EnvSpec) -> AlignState:
        """Returns fresh networks; `adopt` inserts the pretrained flow."""
        k_flow, k_critic = jr.split(key)
        more = spec.action_dim + self.flow.network.embedding
        net = self.critic_net.init(k_critic, spec.observation, 1, more)
        value = Value(net, self.critic_optim.init(net), RunningMoments.start(1))
        return first_state(self.flow, self.optim, k_flow, spec, reference=self.anchor > 0, extra=value)

    def policy(self, state: AlignState) -> Policy:
        """Returns the end of the flow from random noise."""
        return policy_of(state)

    def starting_from(self, policy: Policy) -> "ACFlow":
        """Returns the settings with the flow of a pretrained policy."""
        return replace(self, flow=checked_flow(flow_of(policy, self)[0].spec, "ACFlow"))

    def adopt(self, state: AlignState, policy: Policy) -> AlignState:
        """Returns the state with the networks of a pretrained policy."""
        return with_pretrained(state, self.flow, policy, self)

    def explore(self, state: AlignState, cond: Float[Array, "B c"], group: int, key: PRNGKey) -> Draws:
        """Returns samples of the flow."""
        return Draws(ends(state.flow, encoded(state, cond), group, key))

    def value(self, net: MLP, cond: Condition, x: Vector, t: Scalar) -> Scalar:
        """Returns V(x_t, t, c), in deviations of the reward."""
        return net(cond, x, time_embedding(self.flow.clock * t, self.flow.network.embedding))[0]

    def update(self, state: AlignState, scored: Scored, key: PRNGKey) -> tuple[AlignState, Metrics]:
        """Makes the critic's gradient steps and, after the warm-up, one of the flow on each share of the samples."""
        k_critic, k_flow = jr.split(key)
        reward = scored.total.reshape(-1, 1)
        moments = state.extra.moments.update(reward, jnp.ones(reward.shape[0], bool))
        cond = repeated(encoded(state, scored.cond), scored.reward.shape[1])
        rows = cond, flat(scored.draws.end), jax.vmap(moments)(reward)[:, 0]
        value, critic_loss = self._learn(state, replace(state.extra, moments=moments), rows, k_critic)

        def loss(flow, part, key):
            def one(cond, x1, reward, key):
                x, t, u = line(flow, x1, key)
                advantage = reward - self.value(value.net, cond, x, t) if self.baseline else reward
                w = jnp.exp(jnp.clip(advantage, -self.clip, self.clip) / self.temperature)
                v = field(flow, cond)(x, t)
                away = jnp.mean((v - field(state.reference, cond)(x, t)) ** 2) if self.anchor else jnp.zeros(())
                return w * jnp.mean((v - u) ** 2), away

            cond, x1, reward = part
            keys = jr.split(key, (x1.shape[0], self.times))
            matching, away = jax.vmap(jax.vmap(one, (None, None, None, 0)))(cond, x1, reward, keys)
            return jnp.mean(matching) + self.anchor * jnp.mean(away), {"anchor": jnp.mean(away)}

        new, metrics = descend(self.optim, state, loss, rows, k_flow, self.minibatches)
        pick = lambda new, old: jnp.where(state.step < self.warmup, old, new)
        flow, opt = jax.tree.map(pick, (new.flow, new.opt), (state.flow, state.opt))
        return replace(new, flow=flow, opt=opt, extra=value), metrics | {"critic_loss": critic_loss}

    def _learn(self, state: AlignState, value: Value, rows: tuple, key: PRNGKey) -> tuple[Value, Scalar]:
        """Makes the critic's steps; returns it with its mean loss."""

        def step(carry, key):
            def loss(net):
                def one(cond, x1, reward, key):
                    x, t, _ = line(state.flow, x1, key)
                    return (self.value(net, cond, x, t) - reward) ** 2

                cond, x1, reward = rows
                return jnp.mean(jax.vmap(one)(cond, x1, reward, jr.split(key, x1.shape[0])))

            net, opt, value, _ = gradient_step(self.critic_optim.tx, loss, *carry)
            return (net, opt), value

        (net, opt), losses = jax.lax.scan(step, (value.net, value.opt), jr.split(key, self.critic_steps))
        return replace(value, net=net, opt=opt), jnp.mean(losses)


PRESETS = (Preset("ac-flow", ACFlow(), "AC-Flow", "2510.18072", "rwr with a critic of noisy samples", "conditions"),)
