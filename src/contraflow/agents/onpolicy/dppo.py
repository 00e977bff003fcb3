"""Diffusion policy policy optimisation, DPPO (arXiv 2409.00588): PPO on the last denoising steps.

x_0 ~ N(0, I). Each step draws x_{k+1} around the mean of q(x_r | x_t, x1) at the predicted x1, with the larger of
DDPM's standard deviation and `min_std`. The first steps stay those of the pretrained network and the last `learned` are
improved. Each learned step is a separate decision: its ratio is clipped separately, and its advantage is that of the
action, discounted for each later denoising step.

Differences from the released code: minibatches hold whole chains, not pairs of environment and denoising step;
log-densities are not clamped and noise is not cut at three standard deviations.
"""

from dataclasses import dataclass, replace
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.agents.base import Preset, adopted, flow_of
from contraflow.core.optim import Optim, check_positive
from contraflow.core.types import EnvSpec, Metrics, Obs, PRNGKey, Rollout
from contraflow.flow.kernel import Kernel, log_prob, posterior_std, rollout
from contraflow.flow.model import Ddim, Flow, FlowSpec
from contraflow.flow.path import VP
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.base import Cost, Policy
from contraflow.policy.normalise import normalised
from contraflow.rl.normalise import pretrained_mode
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

DIFFUSION = FlowSpec(path=VP(), predict="noise", solver=Ddim(20), clip=1.0, network=ResidualMLP(256, 3, 32))


class Draw(eqx.Module):
    """Data kept from acting: the learned part of the chain, and the log-density of each of its coordinates."""

    chain: Float[Array, "*batch n a"]
    log_prob: Float[Array, "*batch l a"]


class Denoiser(eqx.Module):
    """A chain of `steps` denoising steps: the first ones by `reference`, the last `learned` by `actor`."""

    actor: Flow
    reference: Flow
    steps: int = eqx.field(static=True)
    learned: int = eqx.field(static=True)
    min_std: float = eqx.field(static=True)

    @property
    def flow(self) -> Flow:
        return self.actor

    def kernel(self, flow: Flow, obs: Obs, min_std: float, first: int) -> Kernel:
        """Returns steps first, first + 1, ... of a flow at s, with the larger of DDPM's deviation and `min_std`."""
        path, n, cond = flow.spec.path, self.steps, flow.encode(obs)

        def kernel(x, k):
            t, r = (first + k) / n, (first + k + 1) / n
            x1, x0 = flow.ends(x, t, cond, r)
            std = posterior_std(path, t, r)
            mean = path.alpha(r) * x1 + jnp.sqrt(jnp.maximum(path.beta(r) ** 2 - std**2, 0.0)) * x0
            return mean, jnp.full_like(x, jnp.maximum(std, min_std))

        return kernel

    def learned_kernel(self, obs: Obs) -> Kernel:
        """Returns the learned steps as they act in training."""
        return self.kernel(self.actor, obs, self.min_std, self.steps - self.learned)

    def chain(self, obs: Obs, key: PRNGKey, min_std: float) -> Float[Array, "n a"]:
        """Returns the learned part of a chain [learned + 1, a], from the x where the pretrained steps end."""
        k_x0, k_before, k_learned = jr.split(key, 3)
        x, first = self.actor.noise(k_x0), self.steps - self.learned
        if first:
            x = rollout(self.kernel(self.reference, obs, min_std, 0), x, first, k_before)[-1]
        return rollout(self.kernel(self.actor, obs, min_std, first), x, self.learned, k_learned)

    def sample(self, obs: Obs, key: PRNGKey) -> tuple[Float[Array, " a"], Draw]:
        """Returns an action [a] and the learned part of its chain."""
        chain = self.chain(obs, key, self.min_std)
        return self.actor.action(chain[-1]), Draw(chain, log_prob(self.learned_kernel(obs), chain, range(self.learned)))

    def __call__(self, obs: Obs, key: PRNGKey, greedy: bool = True) -> Float[Array, " a"]:
        return self.actor.action(self.chain(obs, key, 0.0 if greedy else self.min_std)[-1])

    @property
    def cost(self) -> Cost:
        return Cost(1, self.steps, 0)


@dataclass(frozen=True)
class DPPO:
    """PPO on the last `learned` denoising steps (2409.00588).

    Cost: `steps` evaluations per action, and `learned` with gradients per row of a minibatch. Raises ValueError for
    values out of range.
    """

    flow: FlowSpec = DIFFUSION
    """The flow to improve; a pretrained policy replaces it."""
    steps: int | None = None
    """Denoising steps; None uses those of the flow's solver."""
    learned: int = 10
    """Number of denoising steps to improve, counted from the last."""
    min_std: float = 0.1
    """Minimum standard deviation of every step in training; evaluation uses DDPM's own."""
    ratio: Literal["mean", "sum"] = "mean"
    """Averages the log-density of a step over coordinates (`mean`, as released) or sums it (`sum`, the true ratio)."""
    gamma_denoise: float = 0.99
    """The advantage of a step j steps before the last is multiplied by gamma_denoise^j."""
    clip: float = 0.01
    """Clip of the last step's ratio."""
    clip_first: float = 0.01
    """Clip of the first learned step's ratio; exponential in between."""
    ppo: PPOSettings = PPOSettings(
        target_kl=1.0, actor_optim=Optim(1e-4, max_grad_norm=10.0), critic_optim=Optim(1e-3, max_grad_norm=10.0)
    )

    def __post_init__(self):
        check_positive(self, "clip", "clip_first", "gamma_denoise")
        if not 1 <= self.learned <= self._steps:
            raise ValueError(f"learned must lie between 1 and the {self._steps} steps, got {self.learned}")
        if self.min_std <= 0:
            raise ValueError(f"min_std must be positive, got {self.min_std}: the last step would have no density")

    @property
    def gamma(self) -> float:
        return self.ppo.gamma

    def init(self, key: PRNGKey, spec: EnvSpec) -> PPOState:
        """Returns fresh networks; `adopt` inserts a pretrained flow."""
        k_flow, k_critic = jr.split(key)
        flow = self.flow.init(k_flow, spec.action_dim, spec.observation, spec.horizon)
        return first_state(self.ppo, flow, spec, k_critic, reference=jax.tree.map(jnp.copy, flow))

    def policy(self, state: PPOState) -> Policy:
        """Returns the end of a chain; evaluation uses the noise of DDPM without `min_std`."""
        return normalised(state.stats, self._denoiser(state.actor, state.reference))

    def update(self, state: PPOState, rollout: Rollout, key: PRNGKey) -> tuple[PPOState, Metrics]:
        """Makes the passes over one rollout [T, N]."""
        return improve(self.ppo, state, rollout, key, self._surrogate)

    def starting_from(self, policy: Policy) -> "DPPO":
        """Returns the settings with the flow of a pretrained policy."""
        flow, stats = flow_of(policy, self)
        mode = pretrained_mode(self.ppo.normalise_obs, stats)
        return replace(self, flow=flow.spec, ppo=replace(self.ppo, normalise_obs=mode))

    def adopt(self, state: PPOState, policy: Policy) -> PPOState:
        """Returns the state with the networks of a pretrained policy, for the frozen and the learned steps."""
        flow, stats = adopted(self.flow, policy, self)
        reference = jax.tree.map(jnp.copy, flow)
        return replace(state, actor=flow, reference=reference, stats=state.stats if stats is None else stats)

    def _surrogate(self, actor: Flow, batch: Samples, key: PRNGKey) -> tuple[Float[Array, ""], Metrics]:
        denoiser = self._denoiser(actor, actor)

        def one(obs, draw):
            reduce = jnp.mean if self.ratio == "mean" else jnp.sum
            new = log_prob(denoiser.learned_kernel(obs), draw.chain, range(self.learned))
            return reduce(new - draw.log_prob, axis=-1)

        log_ratio = jax.vmap(one)(batch.obs, batch.extras)  # [B, l]
        order = jnp.arange(self.learned)
        discount = self.gamma_denoise ** (self.learned - 1 - order)
        rise = jnp.expm1(3.0 * order / max(self.learned - 1, 1)) / jnp.expm1(3.0)
        clip = self.clip_first + (self.clip - self.clip_first) * (rise if self.learned > 1 else 1.0)
        loss = jax.vmap(lambda x, a: clipped(x, a * discount, clip).mean())(log_ratio, batch.advantage)
        loss = weighted_mean(loss, batch.weight)
        return loss, {"actor_loss": loss} | ratio_metrics(log_ratio, self.clip, batch.weight)

    @property
    def _steps(self) -> int:
        return self.steps or self.flow.solver.nfe

    def _denoiser(self, actor: Flow, reference: Flow) -> Denoiser:
        return Denoiser(actor, reference, self._steps, self.learned, self.min_std)


PRESETS = (
    Preset(
        "dppo",
        DPPO(),
        "Diffusion policy policy optimisation",
        "2409.00588",
        "PPO on the last denoising steps",
        "rollout",
    ),
)
