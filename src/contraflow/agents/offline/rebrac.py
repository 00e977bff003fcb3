"""ReBRAC (arXiv 2305.09836): TD3 held to the actions of the data, in the actor and in the critic.

    actor     a = tanh f(s): actor_penalty |a - a_data|^2 - Q(s, a) / mean |Q|;
    critic    y = r + discount (min_j Q'_j(s', a') - critic_penalty |a' - a'_data|^2), a' of the slow copy, smoothed.

Squares are sums over the coordinates of an action. Without both penalties this is TD3. If the data contain several ways
of acting, a deterministic actor goes to their mean. It is the reference for flows.
"""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Int, PyTree

from contraflow.agents.base import Preset
from contraflow.core.optim import Optim, check_positive, gradient_step
from contraflow.core.types import Batch, EnvSpec, Metrics, PRNGKey
from contraflow.nets.critic import QEnsemble
from contraflow.nets.mlp import MLP, MLPSpec
from contraflow.policy.base import Policy
from contraflow.policy.gaussian import Deterministic
from contraflow.policy.normalise import RunningMoments, normalised
from contraflow.rl.critics import Critics, polyak
from contraflow.rl.normalise import NormaliseObs, initial_moments, unit_scale, update_and_normalise

OPTIM = Optim(3e-4)


class ReBRACState(eqx.Module):
    actor: MLP
    slow: MLP
    critic: QEnsemble
    target: QEnsemble
    actor_opt: PyTree
    critic_opt: PyTree
    step: Int[Array, ""]
    stats: RunningMoments | None = None  # of observations; None if they are not normalised


@dataclass(frozen=True)
class ReBRAC:
    """TD3 with a penalty for the distance from the data in the actor and in the targets.

    An update takes, per row, one evaluation of the slow copy and each target, one of each critic with gradients, and
    one of the actor and each critic for the step of the actor, which is applied every `delay`-th time.
    """

    actor_penalty: float = 0.1
    """Weight of |a - a_data|^2 against Q of order one; .01 to 1 on OGBench, by task."""
    critic_penalty: float = 0.01
    """Weight of |a' - a'_data|^2 in targets, in the unit of rewards; 0 or .01 on OGBench."""
    normalise_q: bool = True
    """Divides Q by the mean of |Q| in the batch, as published. Off, `actor_penalty` is in the unit of returns."""
    noise: float = 0.2
    """Standard deviation of the noise while exploring."""
    smoothing: float = 0.2
    """Standard deviation of the noise of a' in targets."""
    smoothing_clip: float = 0.5
    delay: int = 2
    """Updates of the critics for one of the actor and its slow copy."""
    normalise_obs: NormaliseObs = "off"
    """"frozen" normalises by the moments of the data."""
    critic: Critics = Critics(width=512, depth=4, block="normalised", optim=OPTIM)
    actor: MLPSpec = MLPSpec(512, 4, "gelu")
    optim: Optim = OPTIM

    def __post_init__(self):
        check_positive(self, "delay")
        for name in ("actor_penalty", "critic_penalty", "noise", "smoothing", "smoothing_clip"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}; 0 is without it")

    @property
    def gamma(self) -> float:
        return self.critic.gamma

    def init(self, key: PRNGKey, spec: EnvSpec) -> ReBRACState:
        """Returns fresh networks for the sizes of `spec`; the slow copies are copies of them."""
        k_actor, k_critic = jr.split(key)
        actor = self.actor.init(k_actor, spec.observation, spec.action_dim)
        critic, target, critic_opt = self.critic.init(k_critic, spec)
        return ReBRACState(
            actor, jax.tree.map(jnp.copy, actor), critic, target, self.optim.init(actor), critic_opt,
            jnp.zeros((), jnp.int32), initial_moments(self.normalise_obs, spec),
        )  # fmt: skip

    def policy(self, state: ReBRACState) -> Policy:
        """Returns tanh f(s), with noise while exploring."""
        return normalised(state.stats, Deterministic(state.actor, self.noise))

    def update(self, state: ReBRACState, batch: Batch, key: PRNGKey) -> tuple[ReBRACState, Metrics]:
        """Makes one step of the critics on a batch [B], and every `delay`-th time one of the actor and its copy."""
        k_smooth, k_critic = jr.split(key)
        stats, batch = update_and_normalise(state.stats, batch, self.normalise_obs)

        # 1. Critic, with a smoothed a' from the slow copy, and its distance from the data if the next action is known.
        noise = self.smoothing * jr.normal(k_smooth, batch.action.shape)
        noise = jnp.clip(noise, -self.smoothing_clip, self.smoothing_clip)
        action = jnp.clip(jnp.tanh(jax.vmap(state.slow)(batch.next_obs)) + noise, -1.0, 1.0)
        penalty = jnp.zeros_like(batch.reward)
        if batch.next_action is not None and batch.next_mask is not None:
            penalty = jnp.sum(batch.next_mask * (action - batch.next_action) ** 2, -1)
        critic, target, critic_opt, metrics = self.critic.learn(
            state.critic, state.target, state.critic_opt, batch, action, k_critic, -self.critic_penalty * penalty
        )

        # 2. Actor: maximise Q(s, tanh f(s)) near the data.
        def actor_loss(actor):
            action = jnp.tanh(jax.vmap(actor)(batch.obs))
            q = jax.vmap(critic.value)(batch.obs, action)
            scale = unit_scale(q) if self.normalise_q else 1.0
            distance = jnp.sum(batch.mask * (action - batch.action) ** 2, -1)
            return self.actor_penalty * distance.mean() - scale * q.mean()

        actor, actor_opt, loss, grad_norm = gradient_step(self.optim.tx, actor_loss, state.actor, state.actor_opt)
        moved = actor, polyak(actor, state.slow, self.critic.tau), actor_opt
        due = state.step % self.delay == self.delay - 1
        actor, slow, actor_opt = jax.tree.map(
            lambda new, old: jnp.where(due, new, old), moved, (state.actor, state.slow, state.actor_opt)
        )
        metrics |= {"actor_loss": loss, "actor_grad_norm": grad_norm, "penalty": penalty.mean()}
        return ReBRACState(actor, slow, critic, target, actor_opt, critic_opt, state.step + 1, stats), metrics


PRESETS = (
    Preset("rebrac", ReBRAC(), "ReBRAC", "2305.09836", "TD3 held to the data: the deterministic reference", "dataset"),
)
