"""TD3 (arXiv 1802.09477): the deterministic reference."""

from dataclasses import dataclass
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PyTree

from contraflow.core.optim import check_positive, clipped_adam, gradient_step, start
from contraflow.core.types import EnvSpec, Metrics, PRNGKey, Transition
from contraflow.nets.critic import QEnsemble
from contraflow.nets.mlp import MLP
from contraflow.rl.critics import Critics, polyak
from contraflow.rl.normalise import RunningMoments, first_stats, look, seen


class TD3State(eqx.Module):
    actor: MLP
    slow: MLP
    critic: QEnsemble
    target: QEnsemble
    actor_opt: PyTree
    critic_opt: PyTree
    step: Int[Array, ""]
    stats: RunningMoments | None = None  # of observations, where they are normalised


@dataclass(frozen=True)
class TD3:
    """a = tanh f(s), moved up Q; targets are made by a slow copy with clipped noise (1802.09477, algorithm 1)."""

    acting: ClassVar[tuple[str, ...]] = ("actor", "stats")

    noise: float = 0.1
    """Standard deviation of what is added while exploring."""
    smoothing: float = 0.2
    """Standard deviation of the noise of a' in targets."""
    smoothing_clip: float = 0.5
    delay: int = 2
    """Updates of the critics for one of the actor and its slow copy."""
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
        check_positive(self, "width", "depth", "actor_lr", "delay")
        if min(self.noise, self.smoothing, self.smoothing_clip) < 0:
            raise ValueError("noise, smoothing and smoothing_clip must not be negative")

    def init(self, key: PRNGKey, spec: EnvSpec) -> TD3State:
        """Fresh networks for `spec`'s sizes; the slow copies are copies."""
        k_actor, k_critic = jr.split(key)
        actor = MLP(spec.obs_dim, spec.action_dim, self.width, self.depth, key=k_actor)
        critic, target, critic_opt = self.critic.init(k_critic, spec)
        slow, step = jax.tree.map(jnp.copy, actor), jnp.zeros((), jnp.int32)
        stats = first_stats(self.normalise_obs, spec)
        return TD3State(actor, slow, critic, target, start(self._tx, actor), critic_opt, step, stats)

    def act(self, state: TD3State, obs: Float[Array, " o"], key: PRNGKey, explore: bool) -> Float[Array, " a"]:
        """tanh f(s), with noise while exploring."""
        action = jnp.tanh(state.actor(seen(state.stats, obs)))
        return jnp.clip(action + explore * self.noise * jr.normal(key, action.shape), -1.0, 1.0)

    def update(self, state: TD3State, batch: Transition, key: PRNGKey) -> tuple[TD3State, Metrics]:
        """One step of the critics on a batch [B], and every `delay`-th time of the actor and its slow copy."""
        k_smooth, k_critic = jr.split(key)
        stats, batch = look(state.stats, batch)

        # 1. Critic, with a' of the slow copy, smoothed.
        noise = self.smoothing * jr.normal(k_smooth, batch.action.shape)
        noise = jnp.clip(noise, -self.smoothing_clip, self.smoothing_clip)
        action = jnp.clip(jnp.tanh(jax.vmap(state.slow)(batch.next_obs)) + noise, -1.0, 1.0)
        critic, target, critic_opt, metrics = self.critic.learn(
            state.critic, state.target, state.critic_opt, batch, action, k_critic
        )

        # 2. Actor: maximise Q(s, tanh f(s)).
        def actor_loss(actor):
            return -jnp.mean(jax.vmap(lambda obs: critic.value(obs, jnp.tanh(actor(obs))))(batch.obs))

        actor, actor_opt, loss, grad_norm = gradient_step(self._tx, actor_loss, state.actor, state.actor_opt)
        moved = actor, polyak(actor, state.slow, self.critic.tau), actor_opt
        due = state.step % self.delay == self.delay - 1
        actor, slow, actor_opt = jax.tree.map(
            lambda new, old: jnp.where(due, new, old), moved, (state.actor, state.slow, state.actor_opt)
        )
        metrics |= {"actor_loss": loss, "actor_grad_norm": grad_norm}
        return TD3State(actor, slow, critic, target, actor_opt, critic_opt, state.step + 1, stats), metrics

    @property
    def _tx(self):
        return clipped_adam(self.actor_lr, self.max_grad_norm, self.decay_steps)
