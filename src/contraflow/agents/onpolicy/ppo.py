"""Proximal policy optimisation (1707.06347) with a Gaussian policy: the on-policy reference.

It follows the best-tested implementations (Huang et al., "The 37 implementation details of PPO", 2022): normalised
observations, rewards scaled by the deviation of the return, state-independent standard deviation, small last layer.
"""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.agents.base import Preset
from contraflow.core.optim import Optim, check_positive
from contraflow.core.types import EnvSpec, Metrics, PRNGKey, Rollout
from contraflow.nets.mlp import MLPSpec
from contraflow.policy.base import Policy
from contraflow.policy.gaussian import ClippedGaussian
from contraflow.policy.normalise import normalised
from contraflow.rl.ppo import (
    PPOSettings,
    PPOState,
    Samples,
    clipped,
    first_state,
    improve,
    ratio_metrics,
    weighted_mean,
)

SMALL = MLPSpec(64, 2, "tanh")
OPTIM = Optim(3e-4, max_grad_norm=0.5)


@dataclass(frozen=True)
class PPO:
    """PPO with a = clip(x, -1, 1), x ~ N(mean(s), std^2); ratios are those of x (1707.06347).

    Raises ValueError unless `clip` and `init_std` are positive.
    """

    clip: float = 0.2
    entropy: float = 0.0
    """Weight of the entropy bonus."""
    init_std: float = 1.0
    actor: MLPSpec = SMALL
    ppo: PPOSettings = PPOSettings(
        epochs=10, minibatches=32, normalise_obs="running", critic=SMALL, actor_optim=OPTIM, critic_optim=OPTIM
    )

    def __post_init__(self):
        check_positive(self, "clip", "init_std")

    @property
    def gamma(self) -> float:
        return self.ppo.gamma

    def init(self, key: PRNGKey, spec: EnvSpec) -> PPOState:
        """Returns fresh networks for the sizes of `spec`; the last layer of the mean is scaled by .01."""
        k_actor, k_critic = jr.split(key)
        mean = self.actor.init(k_actor, spec.observation, spec.action_dim)
        mean = eqx.tree_at(lambda m: m.last.weight, mean, 0.01 * mean.last.weight)
        actor = ClippedGaussian(mean, jnp.full(spec.action_dim, jnp.log(self.init_std), float))
        return first_state(self.ppo, actor, spec, k_critic)

    def policy(self, state: PPOState) -> Policy:
        """Returns the clipped Gaussian, which acts by its clipped mean in evaluation."""
        return normalised(state.stats, state.actor)

    def update(self, state: PPOState, rollout: Rollout, key: PRNGKey) -> tuple[PPOState, Metrics]:
        """Makes the passes over one rollout [T, N]."""
        return improve(self.ppo, state, rollout, key, self._surrogate)

    def _surrogate(self, actor: ClippedGaussian, batch: Samples, key: PRNGKey) -> tuple[Float[Array, ""], Metrics]:
        log_ratio = jax.vmap(actor.log_prob)(batch.obs, batch.extras.action) - batch.extras.log_prob
        loss = weighted_mean(clipped(log_ratio, batch.advantage, self.clip), batch.weight)
        entropy = jnp.sum(actor.log_std + 0.5 * jnp.log(2 * jnp.pi * jnp.e))
        metrics = {"actor_loss": loss, "entropy": entropy} | ratio_metrics(log_ratio, self.clip, batch.weight)
        return loss - self.entropy * entropy, metrics


PRESETS = (Preset("ppo", PPO(), "Proximal policy optimisation", "1707.06347", "the on-policy reference", "rollout"),)
