"""Residual RL (arXiv 1812.03201) beside a frozen flow policy, with the targets of RLT: an actor that edits its actions.

    actor     a = clip(a_0 + scale tanh f(s, a_0)), a_0 ~ the frozen policy; f = 0 at the start;
    critic    y = r + discount min_j Q'_j(s', a'), a' an edit of a fresh a_0' at s';
    loss      -Q(s, a) + bc |a - a_t|^2 / n, n the size of a, a_t = a_0, or what a person did where one took over.

RLT keeps a near a_0 by a large `bc`, lets it go anywhere (`scale` 2 spans the box) and hides a_0 from f in half of the
rows, so that f learns from s too. The frozen policy is never changed and never differentiated.
"""

from dataclasses import dataclass, replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Int, PyTree

from contraflow.agents.base import Preset, adopted, flow_of
from contraflow.core.optim import Optim
from contraflow.core.types import Batch, EnvSpec, Metrics, PRNGKey
from contraflow.flow.model import Flow, FlowSpec
from contraflow.nets.critic import QEnsemble
from contraflow.nets.mlp import MLP, MLPSpec
from contraflow.policy.base import Policy
from contraflow.policy.edit import Residual as ResidualPolicy
from contraflow.policy.flow import FlowPolicy
from contraflow.policy.normalise import RunningMoments, normalised
from contraflow.rl.critics import Critics
from contraflow.rl.normalise import NormaliseObs, initial_moments, pretrained_mode, update_and_normalise


class ResidualState(eqx.Module):
    base: Flow  # frozen
    actor: MLP
    critic: QEnsemble
    target: QEnsemble
    actor_opt: PyTree
    critic_opt: PyTree
    step: Int[Array, ""]
    stats: RunningMoments | None = None  # of observations; None if they are not normalised


@dataclass(frozen=True)
class Residual:
    """An edit of a frozen flow's actions that climbs Q, held to these actions or to a person's by `bc`.

    An update takes, per row, two actions of the frozen flow, one evaluation of the actor and each target, and one of
    the actor and each critic with gradients. Raises ValueError for values out of range.
    """

    flow: FlowSpec = FlowSpec()
    """The frozen flow; it comes from the pretrained policy (`--pretrained`), without one it is random."""
    scale: float = 0.2
    """Largest change of a number of an action in [-1, 1]; 0 is the frozen policy, 2 any change."""
    bc: float = 0.0
    """Weight of the mean square distance from the frozen policy's action, or a person's, in the unit of Q."""
    drop: float = 0.0
    """Share of rows in which the actor does not see the frozen policy's action."""
    noise: float = 0.05
    """Standard deviation of the noise while exploring."""
    normalise_obs: NormaliseObs = "off"
    critic: Critics = Critics(width=256, block="normalised", optim=Optim(3e-4))
    actor: MLPSpec = MLPSpec(256, 2)
    optim: Optim = Optim(3e-4)

    def __post_init__(self):
        if not (0 <= self.scale <= 2 and 0 <= self.drop <= 1 and self.bc >= 0 and self.noise >= 0):
            raise ValueError(
                f"scale must lie in [0, 2], drop in [0, 1], bc and noise must not be negative, got {self.scale}, "
                f"{self.drop}, {self.bc}, {self.noise}"
            )

    @property
    def gamma(self) -> float:
        return self.critic.gamma

    def init(self, key: PRNGKey, spec: EnvSpec) -> ResidualState:
        """Returns fresh networks, with an actor that changes nothing; `adopt` inserts the frozen flow."""
        k_flow, k_actor, k_critic = jr.split(key, 3)
        base = self.flow.init(k_flow, spec.action_dim, spec.observation, spec.horizon)
        actor = self.actor.init(k_actor, spec.observation, spec.action_dim, more=spec.action_dim)
        last = lambda net: (net.last.weight, net.last.bias)
        actor = eqx.tree_at(last, actor, tuple(map(jnp.zeros_like, last(actor))))
        critic, target, critic_opt = self.critic.init(k_critic, spec)
        return ResidualState(
            base, actor, critic, target, self.optim.init(actor), critic_opt, jnp.zeros((), jnp.int32),
            initial_moments(self.normalise_obs, spec),
        )  # fmt: skip

    def policy(self, state: ResidualState) -> Policy:
        """Returns the edited frozen flow."""
        return normalised(state.stats, self._edited(state.base, state.actor))

    def _edited(self, base: Flow, actor: MLP) -> ResidualPolicy:
        return ResidualPolicy(FlowPolicy(base), actor, self.scale, self.noise)

    def update(self, state: ResidualState, batch: Batch, key: PRNGKey) -> tuple[ResidualState, Metrics]:
        """Makes one step of the critics and one of the actor on a batch [B]."""
        k_next, k_critic, k_base, k_drop = jr.split(key, 4)
        n = batch.reward.shape[0]
        stats, batch = update_and_normalise(state.stats, batch, self.normalise_obs)
        policy = self._edited(jax.lax.stop_gradient(state.base), state.actor)

        # 1. Critic, with the edit of a fresh action at s'.
        action = jax.vmap(policy)(batch.next_obs, jr.split(k_next, n))
        critic, target, critic_opt, metrics = self.critic.learn(
            state.critic, state.target, state.critic_opt, batch, action, k_critic
        )

        # 2. Actor: up Q, near the frozen policy's action or the person's.
        reference = jax.vmap(policy.policy)(batch.obs, jr.split(k_base, n))
        wanted = reference if batch.human is None else jnp.where(batch.human > 0, batch.action, reference)
        seen = jnp.where(jr.uniform(k_drop, (n, 1)) < self.drop, 0.0, reference)

        def loss_fn(actor):
            action = jax.vmap(replace(policy, net=actor).edited)(batch.obs, reference, seen)
            away = jnp.mean(batch.mask * (action - wanted) ** 2)
            return self.bc * away - jnp.mean(jax.vmap(critic.value)(batch.obs, action)), away

        (loss, away), grad = jax.value_and_grad(loss_fn, has_aux=True)(state.actor)
        updates, actor_opt = self.optim.tx.update(grad, state.actor_opt, state.actor)  # pyright: ignore[reportArgumentType]
        actor = eqx.apply_updates(state.actor, updates)
        metrics |= {"actor_loss": loss, "distance": away}
        return ResidualState(
            state.base, actor, critic, target, actor_opt, critic_opt, state.step + 1, stats
        ), metrics  # fmt: skip

    def starting_from(self, policy: Policy) -> "Residual":
        """Returns the settings with the flow and the normalisation of a pretrained policy."""
        flow, stats = flow_of(policy, self)
        return replace(self, flow=flow.spec, normalise_obs=pretrained_mode(self.normalise_obs, stats))

    def adopt(self, state: ResidualState, policy: Policy) -> ResidualState:
        """Returns the state with a pretrained policy as the frozen one."""
        base, stats = adopted(self.flow, policy, self)
        return replace(state, base=base, stats=state.stats if stats is None else stats)


RLT = Residual(scale=2.0, bc=50.0, drop=0.5, noise=0.002)
WARM = {"warm_up": "policy"}
PRESETS = (
    Preset("residual", Residual(), "Residual RL", "1812.03201", "small edits of a frozen policy's actions", run=WARM),
    Preset("rlt", RLT, "RLT", "", "an actor held to a frozen policy and to a person's corrections", run=WARM),
)
