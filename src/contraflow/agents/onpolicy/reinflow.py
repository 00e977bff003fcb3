"""ReinFlow (arXiv 2505.22094): a flow policy of few steps, which learned noise turns into a chain that PPO improves.

x_0 ~ N(0, I), x_{k+1} ~ N(x_k + dt v(x_k, t_k, s), sigma(t_k, s)^2), action clip(x_K, -1, 1). The noise gives the chain
a likelihood with gradients for the velocity. Deployment drops it and solves the ODE on the same grid k / K.

Differences from the released code: sampling and scoring share one grid; means are not clipped inside the chain, draws
not truncated at three deviations and log-densities not clamped, so the ratio is exact; the anchor uses random x_0.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int

from contraflow.agents.base import Preset, adopted, flow_of
from contraflow.core.observation import rows
from contraflow.core.optim import Optim, check_positive
from contraflow.core.types import EnvSpec, Metrics, Obs, PRNGKey, Rollout
from contraflow.flow.kernel import Kernel, log_prob, rollout
from contraflow.flow.model import Flow, FlowSpec
from contraflow.nets.layers import time_embedding
from contraflow.nets.mlp import MLP
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


class Draw(eqx.Module):
    """Data kept from acting: the chain, and the log-density of each of its coordinates."""

    chain: Float[Array, "*batch n a"]
    log_prob: Float[Array, "*batch K a"]


class NoisyFlow(eqx.Module):
    """A flow with learned noise while exploring, log sigma^2 = low + (reach - low) (tanh(noise(s, t)) + 1) / 2."""

    flow: Flow
    noise: MLP
    reach: Float[Array, ""]  # largest log-variance allowed at present; no gradient flows through it
    low: float = eqx.field(static=True)
    steps: int = eqx.field(static=True)

    def kernel(self, obs: Obs) -> Kernel:
        """Returns the kernel of the chain at s."""
        cond, seen = self.flow.encode(obs), self.noise.encode(obs)

        def kernel(x, k):
            return self.flow.step(x, k / self.steps, (k + 1) / self.steps, cond), self.std(k, seen)

        return kernel

    def std(self, k: Int[Array, ""], obs: Obs) -> Float[Array, " a"]:
        """Returns sigma [a] of step k."""
        spec = self.flow.spec
        low, high = 2 * jnp.log(self.low), jax.lax.stop_gradient(self.reach)
        out = self.noise(obs, time_embedding(spec.clock * k / self.steps, spec.network.embedding))
        return jnp.exp(0.5 * (low + (high - low) * (jnp.tanh(out) + 1) / 2))

    def chain(self, obs: Obs, key: PRNGKey) -> Float[Array, "n a"]:
        """Returns x_0 ... x_K [K + 1, a]."""
        k_x0, k_chain = jr.split(key)
        return rollout(self.kernel(obs), self.flow.noise(k_x0), self.steps, k_chain)

    def sample(self, obs: Obs, key: PRNGKey) -> tuple[Float[Array, " a"], Draw]:
        """Returns an action [a] and the chain that led to it."""
        chain = self.chain(obs, key)
        return self.flow.action(chain[-1]), Draw(chain, log_prob(self.kernel(obs), chain, range(self.steps)))

    def __call__(self, obs: Obs, key: PRNGKey, greedy: bool = True) -> Float[Array, " a"]:
        end = self.flow.sample(self.flow.noise(key), obs, steps=self.steps) if greedy else self.chain(obs, key)[-1]
        return self.flow.action(end)

    @property
    def cost(self) -> Cost:
        return Cost(1, self.steps, 0)


@dataclass(frozen=True)
class ReinFlow:
    """PPO on the chain of a noisy flow (2505.22094).

    Cost: K evaluations of both networks per action, and as many with gradients per row of a minibatch. Raises
    ValueError for values out of range.
    """

    flow: FlowSpec = FlowSpec()
    """The flow to improve; a pretrained policy replaces it."""
    steps: int = 4
    """K, in training and deployment."""
    std: tuple[float, float] = (0.1, 0.24)
    """Smallest and largest sigma."""
    std_end: float = 0.7
    """The largest sigma falls along a cosine to min + std_end (max - min), over `std_rollouts`."""
    std_rollouts: int | None = None
    """Rollouts of that schedule, of which the first 35 % leave sigma unchanged; None keeps it constant."""
    ratio: Literal["mean", "sum"] = "mean"
    """Averages log-densities over steps and coordinates (`mean`, as in the paper) or sums them (`sum`, true ratio)."""
    entropy: float = 0.03
    """Weight of mean_{k,j} .5 log(2 pi e sigma_{k,j}^2)."""
    anchor: float = 0.0
    """Weight of |x_1 - x_1'|^2 with x_1' from the pretrained policy at equal x_0; bounds the Wasserstein distance."""
    clip: float = 0.01
    ppo: PPOSettings = PPOSettings(
        target_kl=1.0, actor_optim=Optim(4.5e-5, max_grad_norm=10.0), critic_optim=Optim(6.5e-4, max_grad_norm=10.0)
    )
    """The noise network has a quarter of the critic's width."""

    def __post_init__(self):
        check_positive(self, "steps", "clip")
        if not 0 < self.std[0] <= self.std[1]:
            raise ValueError(f"std needs 0 < smallest <= largest, got {self.std}")
        if not (0 <= self.std_end <= 1 and self.anchor >= 0):
            raise ValueError(f"ReinFlow needs std_end in [0, 1] and anchor >= 0, got {self.std_end} and {self.anchor}")

    @property
    def gamma(self) -> float:
        return self.ppo.gamma

    def init(self, key: PRNGKey, spec: EnvSpec) -> PPOState:
        """Returns fresh networks; `adopt` inserts a pretrained flow."""
        k_flow, k_noise, k_critic = jr.split(key, 3)
        flow = self.flow.init(k_flow, spec.action_dim, spec.observation, spec.horizon)
        sizes = spec.observation, spec.action_dim, max(self.ppo.critic.width // 4, 8), 2
        more, pixels = self.flow.network.embedding, self.flow.pixels
        noise = MLP(*sizes, more=more, activation="tanh", pixels=pixels, key=k_noise)
        noise = eqx.tree_at(lambda m: m.last.weight, noise, 0.01 * noise.last.weight)
        actor = NoisyFlow(flow, noise, self._reach(jnp.zeros((), jnp.int32)), self.std[0], self.steps)
        reference = jax.tree.map(jnp.copy, flow) if self.anchor else None
        return first_state(self.ppo, actor, spec, k_critic, reference=reference)

    def policy(self, state: PPOState) -> Policy:
        """Returns the end of a noisy chain, or of the ODE in evaluation."""
        return normalised(state.stats, state.actor)

    def update(self, state: PPOState, rollout: Rollout, key: PRNGKey) -> tuple[PPOState, Metrics]:
        """Makes the passes over one rollout [T, N]."""

        def surrogate(actor, batch, key):
            return self._surrogate(actor, batch, key, state.reference)

        state, metrics = improve(self.ppo, state, rollout, key, surrogate)
        reach = self._reach(state.step)
        return eqx.tree_at(lambda s: s.actor.reach, state, reach), metrics | {"largest_std": jnp.exp(0.5 * reach)}

    def starting_from(self, policy: Policy) -> "ReinFlow":
        """Returns the settings with the flow of a pretrained policy."""
        flow, stats = flow_of(policy, self)
        mode = pretrained_mode(self.ppo.normalise_obs, stats)
        return replace(self, flow=flow.spec, ppo=replace(self.ppo, normalise_obs=mode))

    def adopt(self, state: PPOState, policy: Policy) -> PPOState:
        """Returns the state with the networks of a pretrained policy, which is also the anchor."""
        flow, stats = adopted(self.flow, policy, self)
        reference = jax.tree.map(jnp.copy, flow) if self.anchor else None
        return replace(
            state,
            actor=replace(state.actor, flow=flow),
            reference=reference,
            stats=state.stats if stats is None else stats,
        )

    def _surrogate(
        self, actor: NoisyFlow, batch: Samples, key: PRNGKey, reference: Any
    ) -> tuple[Float[Array, ""], Metrics]:
        def one(obs, draw):
            new = log_prob(actor.kernel(obs), draw.chain, range(self.steps))
            log_std = jnp.log(jax.vmap(lambda k: actor.std(k, obs))(jnp.arange(self.steps)))
            reduce = jnp.mean if self.ratio == "mean" else jnp.sum
            return reduce(new - draw.log_prob), log_std.mean()

        log_ratio, log_std = jax.vmap(one)(batch.obs, batch.extras)
        loss = weighted_mean(clipped(log_ratio, batch.advantage, self.clip), batch.weight)
        log_std = weighted_mean(log_std, batch.weight)
        entropy = log_std + 0.5 * jnp.log(2 * jnp.pi * jnp.e)
        metrics = {"actor_loss": loss, "entropy": entropy, "std": jnp.exp(log_std)}
        loss = loss - self.entropy * entropy
        if self.anchor:
            gap = weighted_mean(self._distance(actor.flow, reference, batch.obs, key), batch.weight)
            loss, metrics = loss + self.anchor * gap, metrics | {"anchor": gap}
        return loss, metrics | ratio_metrics(log_ratio, self.clip, batch.weight)

    def _distance(self, flow: Flow, reference: Flow, obs: Obs, key: PRNGKey) -> Float[Array, " B"]:
        x0 = flow.noise(key, rows(obs))
        new, old = (
            jax.vmap(lambda o, x, f=f: f.sample(x, o, steps=self.steps))(obs, x0)
            for f in (flow, jax.lax.stop_gradient(reference))
        )
        return jnp.mean((new - old) ** 2, -1)

    def _reach(self, rollouts: Any) -> Float[Array, ""]:
        low, high = self.std
        if self.std_rollouts is None:
            return 2 * jnp.log(jnp.asarray(high, float))
        progress = jnp.clip((rollouts / self.std_rollouts - 0.35) / 0.65, 0.0, 1.0)
        share = self.std_end + (1 - self.std_end) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return 2 * jnp.log(low + share * (high - low))


PRESETS = (Preset("reinflow", ReinFlow(), "ReinFlow", "2505.22094", "PPO on the chain of a noisy flow", "rollout"),)
