"""Implicit Q-learning (arXiv 2110.06169): values of recorded actions, and an actor beside them.

    value     V(s): the kappa-expectile of min_j Q'_j(s, a) over the actions of the data, Q' the target critics;
    critic    y = r + discount V(s'): only actions of the data are evaluated;
    actor     learned from the data alone, by the rule `Regressed` or `Cloned`.

With kappa = 1/2, V is the mean over the data, which is SARSA. As kappa -> 1 it becomes the value of the best action in
the data. IFQL and IDQL are this class with a cloned flow or diffusion policy (ifql.py, idql.py).
"""

from dataclasses import dataclass, replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PyTree

from contraflow.agents.base import Preset
from contraflow.core.checks import check_count
from contraflow.core.optim import Optim, check_positive, gradient_step
from contraflow.core.types import Batch, EnvSpec, Metrics, PRNGKey
from contraflow.flow.model import Flow, FlowSpec
from contraflow.nets.critic import QEnsemble
from contraflow.nets.mlp import MLP, MLPSpec
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.base import Policy
from contraflow.policy.best_of import Argmax, BestOf
from contraflow.policy.flow import FlowPolicy
from contraflow.policy.gaussian import ClippedGaussian
from contraflow.policy.normalise import RunningMoments, normalised
from contraflow.rl.cloning import cloning_loss
from contraflow.rl.critics import Critics, polyak
from contraflow.rl.expectile import expectile_loss
from contraflow.rl.normalise import NormaliseObs, initial_moments, unit_scale, update_and_normalise

OPTIM = Optim(3e-4)
LOG_STD = (-5.0, 2.0)  # bounds of the log-deviation of a regressed actor


@dataclass(frozen=True)
class Regressed:
    """A Gaussian by advantage-weighted regression: - min(exp(beta A), cap) log pi(a | s), A = min_j Q'_j(s, a) - V(s).

    `normalise_q` divides A by the mean of |A| in the batch. Actors that climb Q divide by the mean of |Q| instead. Here
    the level of Q cancels in A, and with an offset of the rewards that division would make all weights close to 1.
    Raises ValueError unless beta and cap are positive.
    """

    net: MLPSpec = MLPSpec(512, 4, "gelu")
    beta: float = 3.0
    """Inverse temperature; 3 or 10 in the paper, without normalisation."""
    cap: float = 100.0
    """Largest weight of a row."""
    normalise_q: bool = True
    """Gives beta the same meaning for all rewards; off as published."""

    def __post_init__(self):
        check_positive(self, "beta", "cap")

    def init(self, key: PRNGKey, spec: EnvSpec) -> ClippedGaussian:
        """Returns a fresh network with a deviation of 1."""
        return ClippedGaussian(self.net.init(key, spec.observation, spec.action_dim), jnp.zeros(spec.action_dim))

    def policy(self, actor: ClippedGaussian, critic: QEnsemble) -> Policy:
        """Returns the Gaussian, which acts by its mean and explores by draws."""
        return actor

    def loss(
        self, actor: ClippedGaussian, batch: Batch, advantage: Float[Array, " B"], key: PRNGKey
    ) -> Float[Array, ""]:
        """Returns the loss, a mean over the coordinates of actions that are not masked."""
        scale = unit_scale(advantage) if self.normalise_q else 1.0
        weight = jnp.minimum(jnp.exp(self.beta * scale * advantage), self.cap)
        log_std = jnp.clip(actor.log_std, *LOG_STD)[None]
        unit = (batch.action - jax.vmap(actor.mean)(batch.obs)) / jnp.exp(log_std)
        nats = batch.mask * (0.5 * unit**2 + log_std)  # - log pi, without its constant
        return jnp.sum(weight[:, None] * nats) / jnp.maximum(batch.mask.sum(), 1.0)


@dataclass(frozen=True)
class Cloned:
    """A cloned flow: of `particles` of its actions the one with the highest min_j Q_j acts (2304.10573, section 4).

    The critic does not enter the loss. It only chooses among cloned actions.
    """

    flow: FlowSpec = FlowSpec(network=ResidualMLP(512, 3))
    particles: int = 32

    def __post_init__(self):
        check_count(self, 1, "particles")

    def init(self, key: PRNGKey, spec: EnvSpec) -> Flow:
        """Returns a fresh flow."""
        return self.flow.init(key, spec.action_dim, spec.observation, spec.horizon)

    def policy(self, actor: Flow, critic: QEnsemble) -> Policy:
        """Returns the best of the particles, in evaluation and while exploring."""
        return BestOf(FlowPolicy(actor), critic, None, Argmax(self.particles), Argmax(self.particles))

    def loss(self, actor: Flow, batch: Batch, advantage: Float[Array, " B"], key: PRNGKey) -> Float[Array, ""]:
        """Returns the matching loss of the actions of the data, all with the same weight."""
        return cloning_loss(actor, batch, key)


class IQLState(eqx.Module):
    actor: Any
    average: Any  # exponential moving average of the actor, which acts
    value: MLP
    critic: QEnsemble
    target: QEnsemble
    actor_opt: PyTree
    value_opt: PyTree
    critic_opt: PyTree
    step: Int[Array, ""]
    stats: RunningMoments | None = None  # of observations; None if they are not normalised


@dataclass(frozen=True)
class IQL:
    """Implicit Q-learning with one of two rules for the actor.

    An update takes, per row, one evaluation with gradients of the actor, V and each critic, and without gradients two
    more of V and one of each target.
    """

    actor: Regressed | Cloned = Regressed()
    kappa: float = 0.9
    """Expectile, in (0, 1); .7 or .9 in the papers."""
    ema: float = 0.0
    """Decay of the averaged actor, which acts; 0 acts by the actor itself."""
    value: MLPSpec = MLPSpec(512, 4, "gelu")
    normalise_obs: NormaliseObs = "off"
    """"frozen" normalises by the moments of the data."""
    critic: Critics = Critics(width=512, depth=4, block="normalised", optim=OPTIM)
    optim: Optim = OPTIM
    """Optimiser of the actor and of V, each with its own state."""

    def __post_init__(self):
        if not 0 < self.kappa < 1:
            raise ValueError(f"kappa is an expectile in (0, 1), got {self.kappa}: .5 is the mean, .9 near the best")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is what an average keeps of itself, in [0, 1), got {self.ema}")

    @property
    def gamma(self) -> float:
        return self.critic.gamma

    def init(self, key: PRNGKey, spec: EnvSpec) -> IQLState:
        """Returns fresh networks for the sizes of `spec`; the average and the targets are copies."""
        k_actor, k_value, k_critic = jr.split(key, 3)
        actor = self.actor.init(k_actor, spec)
        value = self.value.init(k_value, spec.observation, 1)
        critic, target, critic_opt = self.critic.init(k_critic, spec)
        return IQLState(
            actor, jax.tree.map(jnp.copy, actor), value, critic, target, self.optim.init(actor), self.optim.init(value),
            critic_opt, jnp.zeros((), jnp.int32), initial_moments(self.normalise_obs, spec),
        )  # fmt: skip

    def policy(self, state: IQLState) -> Policy:
        """Returns the policy of the actor's rule, with the averaged actor."""
        return normalised(state.stats, self.actor.policy(state.average, state.critic))

    def update(self, state: IQLState, batch: Batch, key: PRNGKey) -> tuple[IQLState, Metrics]:
        """Makes one step of V, the critics and the actor on a batch [B] (2110.06169, algorithm 1)."""
        k_critic, k_actor = jr.split(key)
        stats, batch = update_and_normalise(state.stats, batch, self.normalise_obs)

        # 1. V, an expectile over the actions of the data.
        q = jax.vmap(state.target.value)(batch.obs, batch.action)

        def value_loss(value):
            return jnp.mean(expectile_loss(q - jax.vmap(value)(batch.obs)[:, 0], self.kappa))

        value, value_opt, loss, _ = gradient_step(self.optim.tx, value_loss, state.value, state.value_opt)

        # 2. Critic. A row with the value V of s' equals a row that ends with the reward y.
        following = jnp.where(batch.discount == 0, 0.0, jax.vmap(value)(batch.next_obs)[:, 0])
        ended = replace(batch, reward=batch.reward + batch.discount * following, discount=jnp.zeros_like(batch.reward))
        critic, target, critic_opt, metrics = self.critic.learn(
            state.critic, state.target, state.critic_opt, ended, batch.action, k_critic
        )
        metrics |= {"value_loss": loss}

        # 3. Actor.
        advantage = q - jax.vmap(value)(batch.obs)[:, 0]

        def actor_loss(actor):
            return self.actor.loss(actor, batch, advantage, k_actor)

        actor, actor_opt, loss, grad_norm = gradient_step(self.optim.tx, actor_loss, state.actor, state.actor_opt)
        average = polyak(actor, state.average, 1 - self.ema)
        metrics |= {"actor_loss": loss, "actor_grad_norm": grad_norm, "advantage": advantage.mean()}
        opts = actor_opt, value_opt, critic_opt
        return IQLState(actor, average, value, critic, target, *opts, state.step + 1, stats), metrics


PRESETS = (
    Preset(
        "iql", IQL(), "Implicit Q-learning", "2110.06169", "advantage-weighted Gaussian, no unseen actions", "dataset"
    ),
)
