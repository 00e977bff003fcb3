"""ReinFlow (arXiv 2505.22094): a flow policy of few steps, improved by PPO on the chain that learned noise makes of it.

x_0 ~ N(0, I), x_{k+1} ~ N(x_k + dt v(x_k, t_k, s), sigma(t_k, s)^2), action clip(x_K, -1, 1). The noise network lets
gradients of a likelihood reach the velocity; deployment drops it and solves the ODE on the same grid k / K.

Differences to the released code: sampling and scoring share one grid; means are not clipped inside the chain, draws not
truncated at three deviations and log-densities not clamped, so that the ratio is exact; the anchor uses random x_0.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.core.types import EnvSpec, Metrics, PRNGKey, Rollout
from contraflow.flow.kernel import chain_log_prob, run_chain
from contraflow.nets.layers import time_embedding
from contraflow.nets.mlp import MLP
from contraflow.rl.flow_policy import CLOCK, FlowPolicy, Network
from contraflow.rl.normalise import RunningMoments
from contraflow.rl.ppo import PPOState, Samples, check_ppo, clipped, first_state, improve, ratio_metrics, weighted_mean


class Noisy(eqx.Module):
    velocity: Network
    noise: MLP
    reach: Float[Array, ""]  # largest log-variance now allowed, of which no gradient is taken


class Draw(eqx.Module):
    """What acting remembers: the chain, and the log-density of each of its coordinates."""

    chain: Float[Array, "*batch n a"]
    log_prob: Float[Array, "*batch K a"]


@dataclass(frozen=True)
class ReinFlow:
    """Per action K evaluations of both networks; per row of a minibatch as many, with gradients."""

    acting: ClassVar[tuple[str, ...]] = ("actor", "stats")

    policy: FlowPolicy = FlowPolicy()
    """The policy to improve: that of the pretrained artefact, where one is given."""
    steps: int = 4
    """K, in training and deployment."""
    std: tuple[float, float] = (0.1, 0.24)
    """Smallest and largest sigma."""
    std_end: float = 0.7
    """The largest falls along a cosine to min + std_end (max - min), over `std_rollouts`."""
    std_rollouts: int | None = None
    """Rollouts until then, of which the first 35 % leave it as it is; None keeps it throughout."""
    ratio: Literal["mean", "sum"] = "mean"
    """Log-densities of a chain are averaged over steps and coordinates (as in the paper) or summed (the true ratio)."""
    entropy: float = 0.03
    """Weight of mean_{k,j} .5 log(2 pi e sigma_{k,j}^2)."""
    anchor: float = 0.0
    """Weight of |x_1 - x_1'|^2 for the pretrained policy from the same noise, a bound of the Wasserstein distance."""
    gamma: float = 0.99
    lam: float = 0.95
    clip: float = 0.01
    epochs: int = 5
    minibatches: int = 8
    target_kl: float | None = 1.0
    normalise_obs: bool = False
    """Whether statistics of observations go on moving from those of the pretrained policy."""
    scale_reward: bool = True
    width: int = 256
    """Of the critic; the noise network has a quarter."""
    depth: int = 3
    actor_lr: float = 4.5e-5
    critic_lr: float = 6.5e-4
    decay_steps: int | None = None
    max_grad_norm: float | None = 10.0

    def __post_init__(self):
        check_ppo(self)
        if not 0 < self.std[0] <= self.std[1]:
            raise ValueError(f"std needs 0 < smallest <= largest, got {self.std}")

    def init(self, key: PRNGKey, spec: EnvSpec) -> PPOState:
        """Fresh networks; `contraflow.train.pretrained` puts a trained velocity in."""
        k_velocity, k_noise, k_critic = jr.split(key, 3)
        velocity = self.policy.init(k_velocity, spec)
        into, hidden = spec.obs_dim + self.policy.embedding, max(self.width // 4, 8)
        noise = MLP(into, spec.action_dim, hidden, 2, activation="tanh", key=k_noise)
        noise = eqx.tree_at(lambda m: m.last.weight, noise, 0.01 * noise.last.weight)
        actor = Noisy(velocity, noise, self._reach(jnp.zeros((), jnp.int32)))
        reference = jax.tree.map(jnp.copy, velocity) if self.anchor else None
        return first_state(self, actor, spec, k_critic, reference=reference)

    def act(self, state: PPOState, obs: Float[Array, " o"], key: PRNGKey, explore: bool) -> Float[Array, " a"]:
        """The end of a noisy chain, or of the ODE in evaluation, clipped."""
        if explore:
            return self.sample(state, obs, key)[0]
        x0 = jr.normal(key, (state.actor.velocity.dim,))
        return jnp.clip(self.policy(state.actor.velocity, x0, state.stats(obs), self.steps), -1.0, 1.0)

    def sample(self, state: PPOState, obs: Float[Array, " o"], key: PRNGKey) -> tuple[Float[Array, " a"], Draw]:
        """An action and the chain that led to it."""
        k_x0, k_chain = jr.split(key)
        kernel = self._kernel(state.actor, state.stats(obs))
        chain = run_chain(kernel, jr.normal(k_x0, (state.actor.velocity.dim,)), self.steps, k_chain)
        return jnp.clip(chain[-1], -1.0, 1.0), Draw(chain, chain_log_prob(kernel, chain, range(self.steps)))

    def update(self, state: PPOState, rollout: Rollout, key: PRNGKey) -> tuple[PPOState, Metrics]:
        """Passes over one rollout [T, N]."""

        def surrogate(actor, batch, key):
            return self._surrogate(actor, batch, key, state.reference)

        state, metrics = improve(self, state, rollout, key, surrogate)
        reach = self._reach(state.step)
        return eqx.tree_at(lambda s: s.actor.reach, state, reach), metrics | {"largest_std": jnp.exp(0.5 * reach)}

    def network(self, state: PPOState) -> Network:
        """What others start from."""
        return state.actor.velocity

    def adopt(self, state: PPOState, net: Network, stats: RunningMoments) -> PPOState:
        """The state with a trained network in it, which is also the anchor."""
        state = eqx.tree_at(lambda s: (s.actor.velocity, s.stats), state, (net, stats))
        return eqx.tree_at(lambda s: s.reference, state, jax.tree.map(jnp.copy, net)) if self.anchor else state

    def _surrogate(
        self, actor: Noisy, batch: Samples, key: PRNGKey, reference: Any
    ) -> tuple[Float[Array, ""], Metrics]:
        def one(obs, draw):
            log_prob = chain_log_prob(self._kernel(actor, obs), draw.chain, range(self.steps))
            log_std = jnp.log(jax.vmap(lambda k: self._std(actor, k, obs))(jnp.arange(self.steps)))
            reduce = jnp.mean if self.ratio == "mean" else jnp.sum
            return reduce(log_prob - draw.log_prob), log_std.mean()

        log_ratio, log_std = jax.vmap(one)(batch.obs, batch.extras)
        loss = weighted_mean(clipped(log_ratio, batch.advantage, self.clip), batch.weight)
        entropy = log_std.mean() + 0.5 * jnp.log(2 * jnp.pi * jnp.e)
        metrics = {"actor_loss": loss, "entropy": entropy, "std": jnp.exp(log_std.mean())}
        loss = loss - self.entropy * entropy
        if self.anchor:
            gap = self._distance(actor.velocity, reference, batch.obs, key)
            loss, metrics = loss + self.anchor * gap, metrics | {"anchor": gap}
        return loss, metrics | ratio_metrics(log_ratio, self.clip)

    def _distance(self, velocity: Network, reference: Network, obs: Float[Array, "B o"], key: PRNGKey):
        x0 = jr.normal(key, (obs.shape[0], velocity.dim))
        new, old = (
            jax.vmap(lambda o, x, net=net: self.policy(net, x, o, self.steps))(obs, x0)
            for net in (velocity, jax.lax.stop_gradient(reference))
        )
        return jnp.mean((new - old) ** 2)

    def _kernel(self, actor: Noisy, obs: Float[Array, " o"]):
        def kernel(x, k):
            mean = self.policy.move(actor.velocity, x, k / self.steps, (k + 1) / self.steps, obs)
            return mean, self._std(actor, k, obs)

        return kernel

    def _std(self, actor: Noisy, k: Any, obs: Float[Array, " o"]) -> Float[Array, " a"]:
        """log sigma^2 = low + (high - low) (tanh(net) + 1) / 2."""
        low, high = 2 * jnp.log(self.std[0]), jax.lax.stop_gradient(actor.reach)
        out = actor.noise(jnp.concatenate([obs, time_embedding(CLOCK * k / self.steps, self.policy.embedding)]))
        return jnp.exp(0.5 * (low + (high - low) * (jnp.tanh(out) + 1) / 2))

    def _reach(self, rollouts: Any) -> Float[Array, ""]:
        low, high = self.std
        if self.std_rollouts is None:
            return 2 * jnp.log(jnp.asarray(high, float))
        progress = jnp.clip((rollouts / self.std_rollouts - 0.35) / 0.65, 0.0, 1.0)
        share = self.std_end + (1 - self.std_end) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return 2 * jnp.log(low + share * (high - low))
