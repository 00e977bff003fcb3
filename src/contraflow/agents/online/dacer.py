"""DACER (arXiv 2405.15177): a diffusion policy trained to climb Q through its sampler; noise controls its entropy."""

from dataclasses import dataclass, replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PyTree

from contraflow.agents.base import Preset, adopted, flow_of
from contraflow.core.optim import Optim, check_positive, gradient_step
from contraflow.core.types import Batch, EnvSpec, Metrics, PRNGKey
from contraflow.flow.model import Ddim, Flow, FlowSpec
from contraflow.flow.path import VP
from contraflow.flow.support import Box
from contraflow.nets.critic import QEnsemble
from contraflow.nets.heads import Quantile
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.base import Noisy, Policy
from contraflow.policy.flow import FlowPolicy
from contraflow.policy.normalise import RunningMoments, normalised
from contraflow.rl.critics import Critics
from contraflow.rl.normalise import NormaliseObs, initial_moments, pretrained_mode, update_and_normalise
from contraflow.rl.temperature import Tuned, gaussian_entropy


class DACERState(eqx.Module):
    """Everything that DACER learns: actor, critics, noise scale, optimisers and statistics."""

    actor: Flow
    critic: QEnsemble
    target: QEnsemble
    scale: Float[Array, ""]
    actor_opt: PyTree
    critic_opt: PyTree
    step: Int[Array, ""]
    stats: RunningMoments | None = None  # of observations; None if they are not normalised


@dataclass(frozen=True)
class DACER:
    """Diffusion actor-critic with an entropy regulator (2405.15177).

    Cost per update and sample, with F solver steps of the policy: (1 + draws) F actor evaluations, of which F with
    gradients. Raises ValueError unless noise is positive and draws >= 4.
    """

    flow: FlowSpec = FlowSpec(path=VP(), solver=Ddim(20), network=ResidualMLP(256, 3, 32))
    noise: float = 0.1
    """The noise added to an action has standard deviation `noise` times the tuned scale."""
    scale: Tuned = Tuned(entropy=-0.9, start=1.0, high=10.0)
    """Tuned so that exploring actions have this entropy per dimension, estimated from `draws` by a Gaussian."""
    draws: int = 16
    normalise_obs: NormaliseObs = "off"
    critic: Critics = Critics(width=256, depth=3, head=Quantile(), optim=Optim(1e-4))
    optim: Optim = Optim(1e-4)

    def __post_init__(self):
        check_positive(self, "noise")
        if self.draws < 4:
            raise ValueError(f"draws must be at least 4 to estimate an entropy, got {self.draws}")

    @property
    def gamma(self) -> float:
        return self.critic.gamma

    def init(self, key: PRNGKey, spec: EnvSpec) -> DACERState:
        """Returns fresh networks for the sizes of `spec`; the target critic is a copy of the critic."""
        k_actor, k_critic = jr.split(key)
        actor = self.flow.init(k_actor, spec.action_dim, spec.observation, spec.horizon)
        critic, target, critic_opt = self.critic.init(k_critic, spec)
        return DACERState(
            actor, critic, target, self.scale.first(), self.optim.init(actor), critic_opt,
            jnp.zeros((), jnp.int32), initial_moments(self.normalise_obs, spec),
        )  # fmt: skip

    def policy(self, state: DACERState) -> Policy:
        """Returns the end of the sampler from random noise, with added noise while exploring."""
        return normalised(state.stats, self._policy(state))

    def update(self, state: DACERState, batch: Batch, key: PRNGKey) -> tuple[DACERState, Metrics]:
        """Makes one step of the critics, the actor, the noise scale and the targets on a batch [B]."""
        k_next, k_critic, k_now, k_entropy = jr.split(key, 4)
        n, policy = batch.reward.shape[0], self._policy(state)
        stats, batch = update_and_normalise(state.stats, batch, self.normalise_obs)
        explored = lambda obs, key: policy(obs, key, False)

        # 1. Critic, with a' from the exploring policy.
        action = jax.vmap(explored)(batch.next_obs, jr.split(k_next, n))
        critic, target, critic_opt, metrics = self.critic.learn(
            state.critic, state.target, state.critic_opt, batch, action, k_critic
        )

        # 2. Actor: maximise Q(s, a(s, x_0)) through all steps of the sampler.
        def actor_loss(actor):
            def one(obs, key):
                end = actor.sample(actor.noise(key), obs, jr.fold_in(key, 1))
                return -critic.value(obs, into_box(end) if isinstance(self.flow.support, Box) else actor.action(end))

            return jnp.mean(jax.vmap(one)(batch.obs, jr.split(k_now, n)))

        actor, actor_opt, loss, grad_norm = gradient_step(self.optim.tx, actor_loss, state.actor, state.actor_opt)

        # 3. Noise scale, tuned to the entropy of exploring actions at a few states.
        def entropy_at(obs, key):
            return gaussian_entropy(jax.vmap(lambda k: explored(obs, k))(jr.split(key, self.draws)))

        few = min(n, 16)
        entropy = jax.vmap(entropy_at)(jax.tree.map(lambda x: x[:few], batch.obs), jr.split(k_entropy, few)).mean()
        scale = self.scale.following(state.scale, state.step + 1, entropy)
        metrics |= {
            "actor_loss": loss,
            "actor_grad_norm": grad_norm,
            "entropy": entropy,
            "temperature": state.scale,
        }
        return DACERState(actor, critic, target, scale, actor_opt, critic_opt, state.step + 1, stats), metrics

    def starting_from(self, policy: Policy) -> "DACER":
        """Returns the settings with the flow of a pretrained policy."""
        flow, stats = flow_of(policy, self)
        return replace(self, flow=flow.spec, normalise_obs=pretrained_mode(self.normalise_obs, stats))

    def adopt(self, state: DACERState, policy: Policy) -> DACERState:
        """Returns the state with the networks of a pretrained policy."""
        actor, stats = adopted(self.flow, policy, self)
        return replace(state, actor=actor, stats=state.stats if stats is None else stats)

    def _policy(self, state: DACERState) -> Policy:
        return Noisy(FlowPolicy(state.actor), state.scale, self.noise)


@jax.custom_vjp
def into_box(end: Float[Array, " a"]) -> Float[Array, " a"]:
    """Returns clip(end, -1, 1) [a]; outside the box, passes only gradients whose descent leads back (1511.04143).

    With no gradient an end outside the box would never return; with all of it, an outward slope would drive the end to
    infinity.
    """
    return jnp.clip(end, -1.0, 1.0)


def _forward(end):
    return into_box(end), end


def _backward(end, g):
    return (jnp.where((jnp.abs(end) > 1.0) & (end * g < 0.0), 0.0, g),)


into_box.defvjp(_forward, _backward)


PRESETS = (
    Preset("dacer", DACER(), "Diffusion actor-critic with entropy regulator", "2405.15177", "climbs Q by its sampler"),
)
