"""Soft actor-critic (arXiv 1801.01290, 1812.05905): the Gaussian reference."""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PyTree

from contraflow.agents.base import Preset
from contraflow.core.optim import Optim, check_positive, gradient_step
from contraflow.core.types import Batch, EnvSpec, Metrics, PRNGKey
from contraflow.nets.critic import QEnsemble
from contraflow.nets.mlp import MLP, MLPSpec
from contraflow.policy.base import Policy
from contraflow.policy.gaussian import SquashedGaussian
from contraflow.policy.normalise import RunningMoments, normalised
from contraflow.rl.critics import Critics
from contraflow.rl.normalise import NormaliseObs, initial_moments, update_and_normalise


class SACState(eqx.Module):
    """Everything that SAC learns: actor, critics, entropy coefficient, optimisers and statistics."""

    actor: MLP
    critic: QEnsemble
    target: QEnsemble
    log_alpha: Float[Array, ""]
    actor_opt: PyTree
    critic_opt: PyTree
    alpha_opt: PyTree
    step: Int[Array, ""]
    stats: RunningMoments | None = None  # of observations; None if they are not normalised


@dataclass(frozen=True)
class SAC:
    """Soft actor-critic with a tanh-Gaussian policy, a twin critic and a tuned entropy coefficient alpha.

    alpha is tuned to a target entropy (1812.05905, eq. 18). Raises ValueError unless `init_alpha` is positive.
    """

    target_entropy: float | None = None
    """In nats; None means -action_dim."""
    init_alpha: float = 1.0
    log_std: tuple[float, float] = (-20.0, 2.0)
    """Range of the log standard deviation before tanh."""
    normalise_obs: NormaliseObs = "off"
    critic: Critics = Critics(width=256, optim=Optim(1e-3))
    actor: MLPSpec = MLPSpec(256, 2)
    optim: Optim = Optim(3e-4)
    alpha_optim: Optim = Optim(3e-4)

    def __post_init__(self):
        check_positive(self, "init_alpha")

    @property
    def gamma(self) -> float:
        return self.critic.gamma

    def init(self, key: PRNGKey, spec: EnvSpec) -> SACState:
        """Returns fresh networks for the sizes of `spec`; the target critic is a copy of the critic."""
        k_actor, k_critic = jr.split(key)
        actor = self.actor.init(k_actor, spec.observation, 2 * spec.action_dim)
        critic, target, critic_opt = self.critic.init(k_critic, spec)
        log_alpha = jnp.log(jnp.asarray(self.init_alpha, jnp.float32))
        return SACState(
            actor, critic, target, log_alpha, self.optim.init(actor), critic_opt,
            self.alpha_optim.init(log_alpha), jnp.zeros((), jnp.int32), initial_moments(self.normalise_obs, spec),
        )  # fmt: skip

    def policy(self, state: SACState) -> Policy:
        """Returns the squashed Gaussian, which acts by tanh of its mean in evaluation."""
        return normalised(state.stats, SquashedGaussian(state.actor, self.log_std))

    def update(self, state: SACState, batch: Batch, key: PRNGKey) -> tuple[SACState, Metrics]:
        """Makes one step of the critics, the actor, the temperature and the targets on a batch [B] (1812.05905)."""
        k_next, k_now, k_critic = jr.split(key, 3)
        stats, batch = update_and_normalise(state.stats, batch, self.normalise_obs)
        n, alpha = batch.reward.shape[0], jnp.exp(state.log_alpha)
        policy = SquashedGaussian(state.actor, self.log_std)

        # 1. Soft critic: the value of s' has the bonus -alpha log pi(a' | s').
        action, log_prob = jax.vmap(policy.draw)(batch.next_obs, jr.split(k_next, n))
        critic, target, critic_opt, metrics = self.critic.learn(
            state.critic, state.target, state.critic_opt, batch, action, k_critic, -alpha * log_prob
        )

        # 2. Actor: minimise E[alpha log pi(a | s) - Q(s, a)] with a reparameterised.
        keys = jr.split(k_now, n)

        def actor_loss(actor):
            def one(obs, key):
                action, log_prob = SquashedGaussian(actor, self.log_std).draw(obs, key)
                return alpha * log_prob - critic.value(obs, action)

            return jnp.mean(jax.vmap(one)(batch.obs, keys))

        actor, actor_opt, loss, grad_norm = gradient_step(self.optim.tx, actor_loss, state.actor, state.actor_opt)

        # 3. Entropy coefficient: its gradient in log alpha is the difference between entropy and target.
        entropy = -jnp.mean(jax.vmap(policy.draw)(batch.obs, jax.vmap(jr.clone)(keys))[1])
        wanted = -batch.action.shape[-1] if self.target_entropy is None else self.target_entropy
        log_alpha, alpha_opt, _, _ = gradient_step(
            self.alpha_optim.tx, lambda log_alpha: log_alpha * (entropy - wanted), state.log_alpha, state.alpha_opt
        )
        metrics |= {"actor_loss": loss, "actor_grad_norm": grad_norm, "entropy": entropy, "temperature": alpha}
        opts = actor_opt, critic_opt, alpha_opt
        return SACState(actor, critic, target, log_alpha, *opts, state.step + 1, stats), metrics


PRESETS = (Preset("sac", SAC(), "Soft actor-critic", "1812.05905", "the Gaussian reference"),)
