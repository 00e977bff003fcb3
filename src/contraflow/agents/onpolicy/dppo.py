"""Diffusion policy policy optimisation, DPPO (arXiv 2409.00588): PPO on the last denoising steps.

x_0 ~ N(0, I); each step draws x_{k+1} around the mean of q(x_r | x_t, x1) at the predicted x1, with DDPM's deviation
or `min_std`, whichever is larger. The first steps stay those of the pretrained network, the last `learned` are
improved, each a decision of its own: its ratio is clipped by itself, and its advantage is that of the action,
discounted for noise.

Differences to the released code: minibatches hold whole chains, not pairs of environment and denoising step;
log-densities are not clamped and noise is not cut at three deviations.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.core.types import EnvSpec, Metrics, PRNGKey, Rollout
from contraflow.flow.kernel import Kernel, chain_log_prob, posterior_std, run_chain
from contraflow.flow.path import VP
from contraflow.rl.flow_policy import FlowPolicy, Network
from contraflow.rl.normalise import RunningMoments
from contraflow.rl.ppo import PPOState, Samples, check_ppo, clipped, first_state, improve, ratio_metrics, weighted_mean

DIFFUSION = FlowPolicy(path=VP(), predict="noise", steps=20, clip=1.0)


class Draw(eqx.Module):
    """What acting remembers: the learned part of the chain, and the log-density of each of its coordinates."""

    chain: Float[Array, "*batch n a"]
    log_prob: Float[Array, "*batch l a"]


@dataclass(frozen=True)
class DPPO:
    """Per action `steps` evaluations; per row of a minibatch `learned`, with gradients."""

    acting: ClassVar[tuple[str, ...]] = ("actor", "stats", "reference")

    policy: FlowPolicy = DIFFUSION
    """The policy to improve: that of the pretrained artefact, where one is given."""
    steps: int | None = None
    """Denoising steps; None is those of the policy."""
    learned: int = 10
    """Denoising steps that are improved, counted from the last."""
    min_std: float = 0.1
    """Of every step that acts in training or is learned; evaluation has the deviation of DDPM itself."""
    ratio: Literal["mean", "sum"] = "mean"
    """Log-densities of a step are averaged over coordinates (as released) or summed (true)."""
    gamma_denoise: float = 0.99
    """Advantages of a step j steps before the last are multiplied by gamma_denoise^j."""
    clip: float = 0.01
    """Of the last step."""
    clip_first: float = 0.01
    """Of the first learned step; in between exponentially."""
    gamma: float = 0.99
    lam: float = 0.95
    epochs: int = 5
    minibatches: int = 8
    target_kl: float | None = 1.0
    normalise_obs: bool = False
    scale_reward: bool = True
    width: int = 256
    """Of the critic."""
    depth: int = 3
    actor_lr: float = 1e-4
    critic_lr: float = 1e-3
    decay_steps: int | None = None
    max_grad_norm: float | None = 10.0

    def __post_init__(self):
        check_ppo(self)
        if not 1 <= self.learned <= self._steps:
            raise ValueError(f"learned must lie between 1 and the {self._steps} steps, got {self.learned}")
        if self.min_std <= 0:
            raise ValueError(f"min_std must be positive, got {self.min_std}: the last step would have no density")

    def init(self, key: PRNGKey, spec: EnvSpec) -> PPOState:
        """Fresh networks; `contraflow.train.pretrained` puts a trained one in."""
        k_net, k_critic = jr.split(key)
        net = self.policy.init(k_net, spec)
        return first_state(self, net, spec, k_critic, reference=jax.tree.map(jnp.copy, net))

    def act(self, state: PPOState, obs: Float[Array, " o"], key: PRNGKey, explore: bool) -> Float[Array, " a"]:
        """The end of a chain, clipped; in evaluation without the additional noise."""
        chain = self._generate(state, obs, key, self.min_std if explore else 0.0)
        return jnp.clip(chain[-1], -1.0, 1.0)

    def sample(self, state: PPOState, obs: Float[Array, " o"], key: PRNGKey) -> tuple[Float[Array, " a"], Draw]:
        """An action and the learned part of its chain."""
        chain = self._generate(state, obs, key, self.min_std)
        kernel = self._kernel(state.actor, state.stats(obs), self.min_std, self._first)
        return jnp.clip(chain[-1], -1.0, 1.0), Draw(chain, chain_log_prob(kernel, chain, range(self.learned)))

    def update(self, state: PPOState, rollout: Rollout, key: PRNGKey) -> tuple[PPOState, Metrics]:
        """Passes over one rollout [T, N]."""
        return improve(self, state, rollout, key, self._surrogate)

    def adopt(self, state: PPOState, net: Network, stats: RunningMoments) -> PPOState:
        """The state with a trained network in it, for the steps that stay and for those that learn."""
        return eqx.tree_at(lambda s: (s.actor, s.reference, s.stats), state, (net, jax.tree.map(jnp.copy, net), stats))

    def _surrogate(self, actor: Network, batch: Samples, key: PRNGKey) -> tuple[Float[Array, ""], Metrics]:
        def one(obs, draw):
            kernel = self._kernel(actor, obs, self.min_std, self._first)
            reduce = jnp.mean if self.ratio == "mean" else jnp.sum
            return reduce(chain_log_prob(kernel, draw.chain, range(self.learned)) - draw.log_prob, axis=-1)

        log_ratio = jax.vmap(one)(batch.obs, batch.extras)  # [B, l]
        order = jnp.arange(self.learned)
        discount = self.gamma_denoise ** (self.learned - 1 - order)
        rise = jnp.expm1(3.0 * order / max(self.learned - 1, 1)) / jnp.expm1(3.0)
        clip = self.clip_first + (self.clip - self.clip_first) * (rise if self.learned > 1 else 1.0)
        loss = jax.vmap(lambda x, a: clipped(x, a * discount, clip).mean())(log_ratio, batch.advantage)
        loss = weighted_mean(loss, batch.weight)
        return loss, {"actor_loss": loss} | ratio_metrics(log_ratio, self.clip)

    @property
    def _first(self) -> int:
        return self._steps - self.learned

    @property
    def _steps(self) -> int:
        return self.steps or self.policy.steps

    def _generate(self, state: PPOState, obs: Float[Array, " o"], key: PRNGKey, min_std: float):
        """The learned part of a chain, from the x that the pretrained steps lead to."""
        k_x0, k_before, k_learned = jr.split(key, 3)
        obs, x = state.stats(obs), jr.normal(k_x0, (state.actor.dim,))
        if self._first:
            x = run_chain(self._kernel(state.reference, obs, min_std, 0), x, self._first, k_before)[-1]
        return run_chain(self._kernel(state.actor, obs, min_std, self._first), x, self.learned, k_learned)

    def _kernel(self, net: Network, obs: Float[Array, " o"], min_std: float, first: int) -> Kernel:
        path, n = self.policy.path, self._steps

        def kernel(x, k):
            t, r = (first + k) / n, (first + k + 1) / n
            x1, x0 = self.policy.ends(net, x, t, r, obs)
            std = posterior_std(path, t, r)
            mean = path.alpha(r) * x1 + jnp.sqrt(jnp.maximum(path.beta(r) ** 2 - std**2, 0.0)) * x0
            return mean, jnp.full_like(x, jnp.maximum(std, min_std))

        return kernel
