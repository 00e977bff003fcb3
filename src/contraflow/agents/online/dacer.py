"""DACER (arXiv 2405.15177): a diffusion policy moved up Q through its whole sampler; added noise holds its entropy."""

from dataclasses import dataclass
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PyTree

from contraflow.core.optim import check_positive, clipped_adam, gradient_step, start
from contraflow.core.types import EnvSpec, Metrics, PRNGKey, Transition
from contraflow.flow.path import VP
from contraflow.nets.critic import QEnsemble
from contraflow.nets.heads import Quantile
from contraflow.rl.critics import Critics
from contraflow.rl.flow_policy import FlowPolicy, Network
from contraflow.rl.normalise import RunningMoments, first_stats, look, seen
from contraflow.rl.temperature import Tuned, gaussian_entropy


class DACERState(eqx.Module):
    actor: Network
    critic: QEnsemble
    target: QEnsemble
    log_scale: Float[Array, ""]
    actor_opt: PyTree
    critic_opt: PyTree
    step: Int[Array, ""]
    stats: RunningMoments | None = None  # of observations, where they are normalised


@dataclass(frozen=True)
class DACER:
    """Per update and sample: (1 + draws) F actor calls, F the policy's steps, of which F with gradients."""

    acting: ClassVar[tuple[str, ...]] = ("actor", "log_scale", "stats")

    policy: FlowPolicy = FlowPolicy(path=VP(), steps=20, width=256, depth=3)
    noise: float = 0.1
    """What is added to an action has the standard deviation `noise` times the tuned scale."""
    scale: Tuned = Tuned(entropy=-0.9, start=1.0, high=10.0)
    """Tuned so that explored actions have this entropy per dimension, told from `draws` by a Gaussian."""
    draws: int = 16
    normalise_obs: bool = False
    """Observations less their mean, divided by their deviation, of all replayed so far."""
    critic: Critics = Critics(width=256, depth=3, head=Quantile(), lr=1e-4, max_grad_norm=None)
    actor_lr: float = 1e-4
    decay_steps: int | None = None
    """Updates over which the learning rate falls to a tenth; None keeps it constant."""
    max_grad_norm: float | None = None

    def __post_init__(self):
        check_positive(self, "noise", "actor_lr")
        if self.draws < 4:
            raise ValueError(f"draws must be at least 4 to tell an entropy, got {self.draws}")

    def init(self, key: PRNGKey, spec: EnvSpec) -> DACERState:
        """Fresh networks for `spec`'s sizes; the target critic is a copy of the critic."""
        k_actor, k_critic = jr.split(key)
        actor = self.policy.init(k_actor, spec)
        critic, target, critic_opt = self.critic.init(k_critic, spec)
        opt = start(self._tx, actor)
        scale, step, stats = self.scale.first(), jnp.zeros((), jnp.int32), first_stats(self.normalise_obs, spec)
        return DACERState(actor, critic, target, scale, opt, critic_opt, step, stats)

    def act(self, state: DACERState, obs: Float[Array, " o"], key: PRNGKey, explore: bool) -> Float[Array, " a"]:
        """The end of the sampler from a random start, with noise while exploring."""
        obs = seen(state.stats, obs)
        return self._explore(state, obs, key) if explore else self._sample(state.actor, obs, jr.split(key)[0])

    def update(self, state: DACERState, batch: Transition, key: PRNGKey) -> tuple[DACERState, Metrics]:
        """One step of the critics, the actor, the scale of the noise and the targets on a batch [B]."""
        k_next, k_critic, k_now, k_entropy = jr.split(key, 4)
        n = batch.reward.shape[0]
        stats, batch = look(state.stats, batch)

        # 1. Critic, with a' as explored.
        action = jax.vmap(lambda o, k: self._explore(state, o, k))(batch.next_obs, jr.split(k_next, n))
        critic, target, critic_opt, metrics = self.critic.learn(
            state.critic, state.target, state.critic_opt, batch, action, k_critic
        )

        # 2. Actor: maximise Q(s, a(s, x_0)) through all steps of the sampler.
        def actor_loss(actor):
            def one(obs, key):
                return -critic.value(obs, self._sample(actor, obs, key))

            return jnp.mean(jax.vmap(one)(batch.obs, jr.split(k_now, n)))

        actor, actor_opt, loss, grad_norm = gradient_step(self._tx, actor_loss, state.actor, state.actor_opt)

        # 3. The scale of the noise, by the entropy of what is explored at a few states.
        def entropy_at(obs, key):
            return gaussian_entropy(jax.vmap(lambda k: self._explore(state, obs, k))(jr.split(key, self.draws)))

        few = min(n, 16)
        entropy = jax.vmap(entropy_at)(batch.obs[:few], jr.split(k_entropy, few)).mean()
        log_scale = self.scale.move(state.log_scale, entropy)
        metrics |= {
            "actor_loss": loss,
            "actor_grad_norm": grad_norm,
            "entropy": entropy,
            "temperature": jnp.exp(state.log_scale),
        }
        return DACERState(actor, critic, target, log_scale, actor_opt, critic_opt, state.step + 1, stats), metrics

    def _sample(self, actor: Network, obs: Float[Array, " o"], key: PRNGKey) -> Float[Array, " a"]:
        return into_box(self.policy(actor, jr.normal(key, (actor.dim,)), obs))

    def _explore(self, state: DACERState, obs: Float[Array, " o"], key: PRNGKey) -> Float[Array, " a"]:
        k_sample, k_noise = jr.split(key)
        action = self._sample(state.actor, obs, k_sample)
        noise = self.noise * jnp.exp(state.log_scale) * jr.normal(k_noise, action.shape)
        return jnp.clip(action + noise, -1.0, 1.0)

    @property
    def _tx(self):
        return clipped_adam(self.actor_lr, self.max_grad_norm, self.decay_steps)


@jax.custom_vjp
def into_box(end: Float[Array, " a"]) -> Float[Array, " a"]:
    """clip(end, -1, 1); beyond the box the gradient passes where descent along it leads back (1511.04143).

    Without it an end beyond the box would never come back; with all of it a slope outwards drives the end to infinity.
    """
    return jnp.clip(end, -1.0, 1.0)


def _forward(end):
    return into_box(end), end


def _backward(end, g):
    return (jnp.where((jnp.abs(end) > 1.0) & (end * g < 0.0), 0.0, g),)


into_box.defvjp(_forward, _backward)
