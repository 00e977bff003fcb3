"""TD3 (arXiv 1802.09477): the deterministic reference; with penalties, ReBRAC (2305.09836).

    critic    y = r + discount (min_j Q'_j(s', a') - critic_penalty |a' - a'_data|^2), a' of the slow copy, smoothed;
    actor     a = tanh f(s): actor_penalty |a - a_data|^2 - Q(s, a), or Q(s, a) / mean |Q|.

Squares are sums over the coordinates of an action.
"""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Int, PyTree

from contraflow.agents.base import Needs, Preset
from contraflow.core.optim import Optim, check_positive, gradient_step
from contraflow.core.types import Batch, EnvSpec, Metrics, PRNGKey
from contraflow.nets.critic import QEnsemble
from contraflow.nets.mlp import MLP, MLPSpec
from contraflow.policy.base import Policy
from contraflow.policy.gaussian import Deterministic
from contraflow.policy.normalise import RunningMoments, normalised
from contraflow.rl.critics import Critics, polyak
from contraflow.rl.normalise import NormaliseObs, initial_moments, unit_scale, update_and_normalise


class TD3State(eqx.Module):
    """Everything that TD3 learns: actor, critics, slow copies, optimisers and statistics."""

    actor: MLP
    slow: MLP
    critic: QEnsemble
    target: QEnsemble
    actor_opt: PyTree
    critic_opt: PyTree
    step: Int[Array, ""]
    stats: RunningMoments | None = None  # of observations; None if they are not normalised


@dataclass(frozen=True)
class TD3:
    """Maximises Q at a = tanh f(s); targets use a slow copy with clipped noise (1802.09477, algorithm 1).

    An update takes, per row, one evaluation of the slow copy and each target, one of each critic with gradients, and
    one of the actor and each critic for the step of the actor, which is applied every `delay`-th time. Raises
    ValueError for a delay that is not positive, or negative noise or penalties.
    """

    actor_penalty: float = 0.0
    """Weight of |a - a_data|^2, for recorded data."""
    critic_penalty: float = 0.0
    """Weight of |a' - a'_data|^2 in targets, in the unit of rewards, for recorded data."""
    normalise_q: bool = False
    """Divides Q by the mean of |Q| in the batch, so that `actor_penalty` is free of the unit of rewards."""
    noise: float = 0.1
    """Standard deviation of the noise while exploring."""
    smoothing: float = 0.2
    """Standard deviation of the noise of a' in the critic's targets."""
    smoothing_clip: float = 0.5
    delay: int = 2
    """Critic updates per update of the actor and its slow copy."""
    normalise_obs: NormaliseObs = "off"
    critic: Critics = Critics(width=256, optim=Optim(1e-3))
    actor: MLPSpec = MLPSpec(256, 2)
    optim: Optim = Optim(3e-4)

    def __post_init__(self):
        check_positive(self, "delay")
        for name in ("actor_penalty", "critic_penalty", "noise", "smoothing", "smoothing_clip"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}; 0 is without it")

    @property
    def needs(self) -> Needs:
        """Penalties need recorded actions."""
        return "dataset" if self.actor_penalty or self.critic_penalty else "replay"

    @property
    def gamma(self) -> float:
        return self.critic.gamma

    def init(self, key: PRNGKey, spec: EnvSpec) -> TD3State:
        """Returns fresh networks for the sizes of `spec`; the slow copies are copies of them."""
        k_actor, k_critic = jr.split(key)
        actor = self.actor.init(k_actor, spec.observation, spec.action_dim)
        critic, target, critic_opt = self.critic.init(k_critic, spec)
        return TD3State(
            actor, jax.tree.map(jnp.copy, actor), critic, target, self.optim.init(actor), critic_opt,
            jnp.zeros((), jnp.int32), initial_moments(self.normalise_obs, spec),
        )  # fmt: skip

    def policy(self, state: TD3State) -> Policy:
        """Returns tanh f(s), with noise while exploring."""
        return normalised(state.stats, Deterministic(state.actor, self.noise))

    def update(self, state: TD3State, batch: Batch, key: PRNGKey) -> tuple[TD3State, Metrics]:
        """Makes one step of the critics on a batch [B], and every `delay`-th time one of the actor and its copy."""
        k_smooth, k_critic = jr.split(key)
        stats, batch = update_and_normalise(state.stats, batch, self.normalise_obs)

        # 1. Critic, with a smoothed a' from the slow copy, and its distance from the data if the next action is known.
        noise = self.smoothing * jr.normal(k_smooth, batch.action.shape)
        noise = jnp.clip(noise, -self.smoothing_clip, self.smoothing_clip)
        action = jnp.clip(jnp.tanh(jax.vmap(state.slow)(batch.next_obs)) + noise, -1.0, 1.0)
        penalty = jnp.zeros_like(batch.reward)
        if self.critic_penalty and batch.next_action is not None and batch.next_mask is not None:
            penalty = jnp.sum(batch.next_mask * (action - batch.next_action) ** 2, -1)
        critic, target, critic_opt, metrics = self.critic.learn(
            state.critic, state.target, state.critic_opt, batch, action, k_critic, -self.critic_penalty * penalty
        )

        # 2. Actor: maximise Q(s, tanh f(s)), near the data if there is a penalty.
        def actor_loss(actor):
            action = jnp.tanh(jax.vmap(actor)(batch.obs))
            q = jax.vmap(critic.value)(batch.obs, action)
            loss = -(unit_scale(q) if self.normalise_q else 1.0) * jnp.mean(q)
            if self.actor_penalty:
                loss += self.actor_penalty * jnp.sum(batch.mask * (action - batch.action) ** 2, -1).mean()
            return loss

        actor, actor_opt, loss, grad_norm = gradient_step(self.optim.tx, actor_loss, state.actor, state.actor_opt)
        moved = actor, polyak(actor, state.slow, self.critic.tau), actor_opt
        due = state.step % self.delay == self.delay - 1
        actor, slow, actor_opt = jax.tree.map(
            lambda new, old: jnp.where(due, new, old), moved, (state.actor, state.slow, state.actor_opt)
        )
        metrics |= {"actor_loss": loss, "actor_grad_norm": grad_norm}
        if self.critic_penalty:
            metrics |= {"penalty": penalty.mean()}
        return TD3State(actor, slow, critic, target, actor_opt, critic_opt, state.step + 1, stats), metrics


PRESETS = (Preset("td3", TD3(), "Twin delayed DDPG", "1802.09477", "the deterministic reference"),)
