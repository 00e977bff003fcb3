"""Proximal policy optimisation (1707.06347) with a Gaussian policy: the on-policy reference.

Details as in the best-tested implementations (Huang et al., "The 37 implementation details of PPO", 2022): normalised
observations, rewards scaled by the deviation of the return, state-independent standard deviation, small last layer.
"""

from dataclasses import dataclass
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.core.types import EnvSpec, Metrics, PRNGKey, Rollout
from contraflow.flow.targets import log_normal
from contraflow.nets.mlp import MLP
from contraflow.rl.ppo import PPOState, Samples, check_ppo, clipped, first_state, improve, ratio_metrics, weighted_mean


class Gaussian(eqx.Module):
    mean: MLP
    log_std: Float[Array, " a"]


class Draw(eqx.Module):
    """What acting remembers: the action before it was clipped to [-1, 1], and its log-density."""

    action: Float[Array, "*batch a"]
    log_prob: Float[Array, "*batch"]


@dataclass(frozen=True)
class PPO:
    """a = clip(x, -1, 1), x ~ N(mean(s), std^2); ratios are those of x."""

    acting: ClassVar[tuple[str, ...]] = ("actor", "stats")

    gamma: float = 0.99
    lam: float = 0.95
    clip: float = 0.2
    entropy: float = 0.0
    """Weight of the entropy bonus."""
    init_std: float = 1.0
    epochs: int = 10
    minibatches: int = 32
    target_kl: float | None = None
    """Approximate KL(old, new) after which a rollout is not used any further; None always goes through."""
    normalise_obs: bool = True
    scale_reward: bool = True
    width: int = 64
    depth: int = 2
    actor_lr: float = 3e-4
    critic_lr: float = 3e-4
    decay_steps: int | None = None
    """Gradient steps over which the learning rates fall to a tenth; None keeps them constant."""
    max_grad_norm: float | None = 0.5

    def __post_init__(self):
        check_ppo(self)

    def init(self, key: PRNGKey, spec: EnvSpec) -> PPOState:
        """Fresh networks for `spec`'s sizes; the last layer of the mean is a hundredth of the usual."""
        k_actor, k_critic = jr.split(key)
        mean = MLP(spec.obs_dim, spec.action_dim, self.width, self.depth, activation="tanh", key=k_actor)
        mean = eqx.tree_at(lambda m: m.last.weight, mean, 0.01 * mean.last.weight)
        actor = Gaussian(mean, jnp.full(spec.action_dim, jnp.log(self.init_std), float))
        return first_state(self, actor, spec, k_critic, activation="tanh")

    def act(self, state: PPOState, obs: Float[Array, " o"], key: PRNGKey, explore: bool) -> Float[Array, " a"]:
        """A clipped draw, or the clipped mean in evaluation."""
        if explore:
            return self.sample(state, obs, key)[0]
        return jnp.clip(state.actor.mean(state.stats(obs)), -1.0, 1.0)

    def sample(self, state: PPOState, obs: Float[Array, " o"], key: PRNGKey) -> tuple[Float[Array, " a"], Draw]:
        """An action and what the update needs to know of it."""
        actor = state.actor
        mean = actor.mean(state.stats(obs))
        x = mean + jnp.exp(actor.log_std) * jr.normal(key, mean.shape)
        return jnp.clip(x, -1.0, 1.0), Draw(x, log_normal(x, mean, jnp.exp(actor.log_std)))

    def update(self, state: PPOState, rollout: Rollout, key: PRNGKey) -> tuple[PPOState, Metrics]:
        """Passes over one rollout [T, N]."""
        return improve(self, state, rollout, key, self._surrogate)

    def _surrogate(self, actor: Gaussian, batch: Samples, key: PRNGKey) -> tuple[Float[Array, ""], Metrics]:
        std = jnp.exp(actor.log_std)
        log_prob = jax.vmap(lambda o, x: log_normal(x, actor.mean(o), std))(batch.obs, batch.extras.action)
        log_ratio = log_prob - batch.extras.log_prob
        loss = weighted_mean(clipped(log_ratio, batch.advantage, self.clip), batch.weight)
        entropy = jnp.sum(actor.log_std + 0.5 * jnp.log(2 * jnp.pi * jnp.e))
        metrics = {"actor_loss": loss, "entropy": entropy} | ratio_metrics(log_ratio, self.clip)
        return loss - self.entropy * entropy, metrics
