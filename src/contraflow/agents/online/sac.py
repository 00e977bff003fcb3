"""Soft Actor-Critic (arXiv 1801.01290, 1812.05905): the Gaussian reference."""

from dataclasses import dataclass
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PyTree

from contraflow.core.optim import check_positive, clipped_adam, gradient_step, start
from contraflow.core.types import EnvSpec, Metrics, PRNGKey, Transition
from contraflow.flow.targets import log_normal, log_sech2
from contraflow.nets.critic import QEnsemble
from contraflow.nets.mlp import MLP
from contraflow.rl.critics import Critics
from contraflow.rl.normalise import RunningMoments, first_stats, look, seen


class SACState(eqx.Module):
    actor: MLP
    critic: QEnsemble
    target: QEnsemble
    log_alpha: Float[Array, ""]
    actor_opt: PyTree
    critic_opt: PyTree
    alpha_opt: PyTree
    step: Int[Array, ""]
    stats: RunningMoments | None = None  # of observations, where they are normalised


@dataclass(frozen=True)
class SAC:
    """Tanh-Gaussian policy, twin critic, entropy coefficient alpha tuned to a target entropy (1812.05905, eq. 18)."""

    acting: ClassVar[tuple[str, ...]] = ("actor", "stats")

    target_entropy: float | None = None
    """None is -action_dim."""
    init_alpha: float = 1.0
    log_std_min: float = -20.0
    log_std_max: float = 2.0
    alpha_lr: float = 3e-4
    normalise_obs: bool = False
    """Observations less their mean, divided by their deviation, of all replayed so far."""
    critic: Critics = Critics(width=256, max_grad_norm=None)
    width: int = 256
    depth: int = 2
    actor_lr: float = 3e-4
    decay_steps: int | None = None
    """Updates over which the learning rate falls to a tenth; None keeps it constant."""
    max_grad_norm: float | None = None

    def __post_init__(self):
        check_positive(self, "width", "depth", "actor_lr", "alpha_lr", "init_alpha")

    def init(self, key: PRNGKey, spec: EnvSpec) -> SACState:
        """Fresh networks for `spec`'s sizes; the target critic is a copy of the critic."""
        k_actor, k_critic = jr.split(key)
        actor = MLP(spec.obs_dim, 2 * spec.action_dim, self.width, self.depth, key=k_actor)
        critic, target, critic_opt = self.critic.init(k_critic, spec)
        log_alpha = jnp.log(jnp.asarray(self.init_alpha, jnp.float32))
        return SACState(
            actor, critic, target, log_alpha, start(self._tx, actor), critic_opt, start(self._alpha_tx, log_alpha),
            jnp.zeros((), jnp.int32), first_stats(self.normalise_obs, spec),
        )  # fmt: skip

    def act(self, state: SACState, obs: Float[Array, " o"], key: PRNGKey, explore: bool) -> Float[Array, " a"]:
        """A draw of the squashed Gaussian, or tanh of its mean in evaluation."""
        obs = seen(state.stats, obs)
        mean, _ = self._gaussian(state.actor, obs)
        return self._sample(state.actor, obs, key)[0] if explore else jnp.tanh(mean)

    def update(self, state: SACState, batch: Transition, key: PRNGKey) -> tuple[SACState, Metrics]:
        """One step of the critics, the actor, the temperature and the targets on a batch [B] (1812.05905)."""
        k_next, k_now, k_critic = jr.split(key, 3)
        stats, batch = look(state.stats, batch)
        n = batch.reward.shape[0]
        alpha = jnp.exp(state.log_alpha)

        # 1. Critic, soft: the value of s' has the bonus -alpha log pi(a' | s').
        action, log_prob = jax.vmap(lambda o, k: self._sample(state.actor, o, k))(batch.next_obs, jr.split(k_next, n))
        critic, target, critic_opt, metrics = self.critic.learn(
            state.critic, state.target, state.critic_opt, batch, action, k_critic, -alpha * log_prob
        )

        # 2. Actor: minimise E[alpha log pi(a | s) - Q(s, a)], a reparameterised.
        keys = jr.split(k_now, n)

        def actor_loss(actor):
            def one(obs, key):
                action, log_prob = self._sample(actor, obs, key)
                return alpha * log_prob - critic.value(obs, action)

            return jnp.mean(jax.vmap(one)(batch.obs, keys))

        actor, actor_opt, loss, grad_norm = gradient_step(self._tx, actor_loss, state.actor, state.actor_opt)

        # 3. Entropy coefficient: its gradient in log alpha is the gap between entropy and target.
        entropy = -jnp.mean(
            jax.vmap(lambda o, k: self._sample(state.actor, o, k)[1])(batch.obs, jax.vmap(jr.clone)(keys))
        )
        wanted = -batch.action.shape[-1] if self.target_entropy is None else self.target_entropy
        log_alpha, alpha_opt, _, _ = gradient_step(
            self._alpha_tx, lambda log_alpha: log_alpha * (entropy - wanted), state.log_alpha, state.alpha_opt
        )
        metrics |= {
            "actor_loss": loss,
            "actor_grad_norm": grad_norm,
            "entropy": entropy,
            "temperature": alpha,
        }
        opts = actor_opt, critic_opt, alpha_opt
        return SACState(actor, critic, target, log_alpha, *opts, state.step + 1, stats), metrics

    def _gaussian(self, actor: MLP, obs: Float[Array, " o"]) -> tuple[Float[Array, " a"], Float[Array, " a"]]:
        mean, log_std = jnp.split(actor(obs), 2)
        return mean, jnp.exp(jnp.clip(log_std, self.log_std_min, self.log_std_max))

    def _sample(self, actor: MLP, obs: Float[Array, " o"], key: PRNGKey) -> tuple[Float[Array, " a"], Float[Array, ""]]:
        """a = tanh(u), u ~ N(mean, std^2), and log pi(a) = log N(u) - sum log sech^2 u."""
        mean, std = self._gaussian(actor, obs)
        u = mean + std * jr.normal(key, mean.shape)
        return jnp.tanh(u), log_normal(u, mean, std) - jnp.sum(log_sech2(u))

    @property
    def _tx(self):
        return clipped_adam(self.actor_lr, self.max_grad_norm, self.decay_steps)

    @property
    def _alpha_tx(self):
        return clipped_adam(self.alpha_lr, None)
