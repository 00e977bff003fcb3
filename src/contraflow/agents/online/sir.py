"""Sampling-importance-resampling without an actor: draw n actions of a fixed base, pick one by softmax(Q / lambda).

This is a baseline. The gain of a policy over it is what the policy has learned; the critic and the selection do the
rest.
"""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PyTree

from contraflow.agents.base import Preset
from contraflow.core.optim import check_positive
from contraflow.core.types import Batch, EnvSpec, Metrics, PRNGKey
from contraflow.nets.critic import QEnsemble
from contraflow.policy.base import Policy
from contraflow.policy.best_of import Argmax, BestOf, Selector, Softmax
from contraflow.policy.normalise import RunningMoments, normalised
from contraflow.policy.uniform import BetaActions
from contraflow.rl.critics import Critics
from contraflow.rl.normalise import NormaliseObs, initial_moments, update_and_normalise
from contraflow.rl.temperature import Constant, Schedule


class SIRState(eqx.Module):
    """Everything that SIR learns: critics, temperature, optimiser and statistics."""

    critic: QEnsemble
    target: QEnsemble
    critic_opt: PyTree
    action: Float[Array, " a"]  # zeros; holds the size of an action
    temperature: Float[Array, ""]
    step: Int[Array, ""]
    stats: RunningMoments | None = None  # of observations; None if they are not normalised


@dataclass(frozen=True)
class SIR:
    """Sampling-importance-resampling from a = 2 b - 1 with b ~ Beta(kappa, kappa)^d.

    kappa = 1 is uniform and kappa < 1 favours the faces of the box. Raises ValueError unless kappa is positive.
    """

    explore: Selector = Softmax(particles=32)
    backup: Selector = Softmax(particles=32)
    greedy: Selector = Argmax(particles=32)
    kappa: float = 1.0
    """The density over u = atanh a is ~ prod sech^(2 kappa) u_j, as with the `jacobian_power` of RFM."""
    temperature: Schedule = Constant(0.02)
    normalise_obs: NormaliseObs = "off"
    critic: Critics = Critics()

    def __post_init__(self):
        check_positive(self, "kappa")

    @property
    def gamma(self) -> float:
        return self.critic.gamma

    def init(self, key: PRNGKey, spec: EnvSpec) -> SIRState:
        """Returns fresh critics for the sizes of `spec`; the target is a copy."""
        return SIRState(
            *self.critic.init(key, spec), jnp.zeros(spec.action_dim), self.temperature.first(),
            jnp.zeros((), jnp.int32), initial_moments(self.normalise_obs, spec),
        )  # fmt: skip

    def policy(self, state: SIRState) -> Policy:
        """Returns the policy that picks one of n base actions by Q(s, a)."""
        return normalised(state.stats, self._best(state, self.explore, self.greedy))

    def update(self, state: SIRState, batch: Batch, key: PRNGKey) -> tuple[SIRState, Metrics]:
        """Makes one step of the critics and targets on a batch [B]."""
        k_next, k_critic = jr.split(key)
        stats, batch = update_and_normalise(state.stats, batch, self.normalise_obs)
        keys = jr.split(k_next, batch.reward.shape[0])
        action = jax.vmap(self._best(state, self.backup, self.backup))(batch.next_obs, keys)
        critic, target, opt, metrics = self.critic.learn(
            state.critic, state.target, state.critic_opt, batch, action, k_critic
        )
        metrics["temperature"] = state.temperature
        lam = self.temperature.following(state.temperature, state.step + 1, jnp.zeros(()))
        return SIRState(critic, target, opt, state.action, lam, state.step + 1, stats), metrics

    def _best(self, state: SIRState, explore: Selector, greedy: Selector) -> BestOf:
        return BestOf(BetaActions(state.action, self.kappa), state.critic, state.temperature, explore, greedy)


PRESETS = (Preset("sir", SIR(), "Sampling-importance-resampling", "", "no actor: what the critic does alone"),)
