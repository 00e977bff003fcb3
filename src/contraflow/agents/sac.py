"""Soft Actor-Critic (arXiv 1801.01290, 1812.05905): the Gaussian reference."""

from dataclasses import dataclass
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PyTree

from contraflow.agents.base import check_common
from contraflow.flow.density import log_normal, log_sech2
from contraflow.nets.critic import QEnsemble
from contraflow.nets.mlp import MLP
from contraflow.rl.optim import clipped_adam, descend, start
from contraflow.rl.td import fit_critic, polyak, start_critic, td_target
from contraflow.types import EnvSpec, Metrics, PRNGKey, Transition


class SACState(eqx.Module):
    actor: MLP
    critic: QEnsemble
    target: QEnsemble
    log_alpha: Float[Array, ""]
    actor_opt: PyTree
    critic_opt: PyTree
    alpha_opt: PyTree
    step: Int[Array, ""]


@dataclass(frozen=True)
class SAC:
    """Tanh-Gaussian policy, twin critic, entropy coefficient alpha tuned to a target entropy (1812.05905, eq. 18)."""

    acting: ClassVar[tuple[str, ...]] = ("actor",)

    target_entropy: float | None = None
    """None is -action_dim."""
    init_alpha: float = 1.0
    log_std_min: float = -20.0
    log_std_max: float = 2.0
    gamma: float = 0.99
    tau: float = 0.005
    width: int = 256
    depth: int = 2
    num_q: int = 2
    normalise_critic: bool = False
    actor_lr: float = 3e-4
    critic_lr: float = 1e-3
    alpha_lr: float = 3e-4
    decay_steps: int | None = None
    """Updates over which the learning rates fall to a tenth; None keeps them constant."""
    max_grad_norm: float | None = None

    def __post_init__(self):
        check_common(
            self.gamma, self.tau, width=self.width, actor_lr=self.actor_lr, critic_lr=self.critic_lr,
            alpha_lr=self.alpha_lr, init_alpha=self.init_alpha,
        )  # fmt: skip

    def init(self, key: PRNGKey, spec: EnvSpec) -> SACState:
        """Fresh networks for `spec`'s sizes; the target critic is a copy of the critic."""
        k_actor, k_critic = jr.split(key)
        actor = MLP(spec.obs_dim, 2 * spec.action_dim, self.width, self.depth, key=k_actor)
        critic = QEnsemble(
            self.num_q,
            spec.obs_dim,
            spec.action_dim,
            self.width,
            self.depth,
            normalise=self.normalise_critic,
            key=k_critic,
        )
        log_alpha = jnp.log(jnp.asarray(self.init_alpha, jnp.float32))
        return SACState(
            actor, critic, jax.tree.map(jnp.copy, critic), log_alpha, start(self._actor_tx, actor),
            start_critic(self._critic_tx, critic), start(self._alpha_tx, log_alpha), jnp.zeros((), jnp.int32),
        )  # fmt: skip

    def act(self, state: SACState, obs: Float[Array, " o"], key: PRNGKey, explore: bool) -> Float[Array, " a"]:
        """A draw of the squashed Gaussian, or tanh of its mean in evaluation."""
        mean, _ = self._gaussian(state.actor, obs)
        return self._sample(state.actor, obs, key)[0] if explore else jnp.tanh(mean)

    def update(self, state: SACState, batch: Transition, key: PRNGKey) -> tuple[SACState, Metrics]:
        """One step of the critics, the actor, the temperature and the targets on a batch [B] (1812.05905)."""
        k_next, k_now = jr.split(key)
        n = batch.reward.shape[0]
        alpha = jnp.exp(state.log_alpha)

        # 1. Critic, soft: y = r + gamma (1 - terminated) [min_i Q'_i(s', a') - alpha log pi(a' | s')].
        def next_value(obs, key):
            action, log_prob = self._sample(state.actor, obs, key)
            return state.target.min(obs, action) - alpha * log_prob

        y = td_target(batch, jax.vmap(next_value)(batch.next_obs, jr.split(k_next, n)), self.gamma)
        critic, critic_opt, critic_loss, _ = fit_critic(self._critic_tx, state.critic, state.critic_opt, batch, y)

        # 2. Actor: minimise E[alpha log pi(a | s) - min_i Q_i(s, a)], a reparameterised.
        keys = jr.split(k_now, n)

        def actor_loss(actor):
            def one(obs, key):
                action, log_prob = self._sample(actor, obs, key)
                return alpha * log_prob - critic.min(obs, action)

            return jnp.mean(jax.vmap(one)(batch.obs, keys))

        actor, actor_opt, loss, grad_norm = descend(self._actor_tx, actor_loss, state.actor, state.actor_opt)

        # 3. Entropy coefficient: its gradient in log alpha is the gap between entropy and target.
        entropy = -jnp.mean(
            jax.vmap(lambda o, k: self._sample(state.actor, o, k)[1])(batch.obs, jax.vmap(jr.clone)(keys))
        )
        wanted = -batch.action.shape[-1] if self.target_entropy is None else self.target_entropy
        log_alpha, alpha_opt, _, _ = descend(
            self._alpha_tx, lambda log_alpha: log_alpha * (entropy - wanted), state.log_alpha, state.alpha_opt
        )
        target = polyak(critic, state.target, self.tau)
        metrics = {
            "critic_loss": critic_loss,
            "actor_loss": loss,
            "actor_grad_norm": grad_norm,
            "q": y.mean(),
            "entropy": entropy,
            "temperature": alpha,
        }
        return SACState(actor, critic, target, log_alpha, actor_opt, critic_opt, alpha_opt, state.step + 1), metrics

    def _gaussian(self, actor: MLP, obs: Float[Array, " o"]) -> tuple[Float[Array, " a"], Float[Array, " a"]]:
        mean, log_std = jnp.split(actor(obs), 2)
        return mean, jnp.exp(jnp.clip(log_std, self.log_std_min, self.log_std_max))

    def _sample(self, actor: MLP, obs: Float[Array, " o"], key: PRNGKey) -> tuple[Float[Array, " a"], Float[Array, ""]]:
        """a = tanh(u), u ~ N(mean, std^2), and log pi(a) = log N(u) - sum log sech^2 u."""
        mean, std = self._gaussian(actor, obs)
        u = mean + std * jr.normal(key, mean.shape)
        return jnp.tanh(u), log_normal(u, mean, std) - jnp.sum(log_sech2(u))

    @property
    def _actor_tx(self):
        return clipped_adam(self.actor_lr, self.max_grad_norm, self.decay_steps)

    @property
    def _critic_tx(self):
        return clipped_adam(self.critic_lr, self.max_grad_norm, self.decay_steps)

    @property
    def _alpha_tx(self):
        return clipped_adam(self.alpha_lr, None)
