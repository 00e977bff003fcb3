"""Sampling-importance-resampling, the actor-free yardstick: n actions of a fixed base, one by softmax(Q / lambda).

What a policy adds over this is what the policy has learned; the rest is done by the critic and the pick.
"""

from dataclasses import dataclass
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PyTree

from contraflow.agents.base import check_common
from contraflow.nets.critic import QEnsemble
from contraflow.rl.optim import clipped_adam
from contraflow.rl.select import Argmax, Selector, Softmax
from contraflow.rl.td import fit_critic, polyak, start_critic, td_target
from contraflow.rl.temperature import Constant, Schedule
from contraflow.types import EnvSpec, Metrics, PRNGKey, Transition


class SIRState(eqx.Module):
    critic: QEnsemble
    target: QEnsemble
    critic_opt: PyTree
    action: Float[Array, " a"]  # zeros; carries the action dimension
    step: Int[Array, ""]


@dataclass(frozen=True)
class SIR:
    """Base law over actions: a = 2 b - 1 with b ~ Beta(kappa, kappa)^d; 1 is uniform, below 1 favours the faces."""

    acting: ClassVar[tuple[str, ...]] = ("critic", "action", "step")

    explore: Selector = Softmax(particles=32)
    backup: Selector = Softmax(particles=32)
    exploit: Selector = Argmax(particles=32)
    base: float = 1.0
    """kappa; the density over u = atanh a is then ~ prod sech^(2 kappa) u_j, the base measure of RFM."""
    temperature: Schedule = Constant(0.02)
    gamma: float = 0.99
    tau: float = 0.005
    width: int = 64
    depth: int = 2
    num_q: int = 2
    normalise_critic: bool = False
    critic_lr: float = 1e-3
    decay_steps: int | None = None
    """Updates over which the learning rates fall to a tenth; None keeps them constant."""
    max_grad_norm: float | None = 10.0

    def __post_init__(self):
        check_common(self.gamma, self.tau, width=self.width, critic_lr=self.critic_lr, base=self.base)

    def init(self, key: PRNGKey, spec: EnvSpec) -> SIRState:
        """Fresh critics for `spec`'s sizes; the target is a copy."""
        critic = QEnsemble(
            self.num_q, spec.obs_dim, spec.action_dim, self.width, self.depth, normalise=self.normalise_critic, key=key
        )
        target = jax.tree.map(jnp.copy, critic)
        opt = start_critic(self._tx, critic)
        return SIRState(critic, target, opt, jnp.zeros(spec.action_dim), jnp.zeros((), jnp.int32))

    def act(self, state: SIRState, obs: Float[Array, " o"], key: PRNGKey, explore: bool) -> Float[Array, " a"]:
        """One of n actions of the base law, picked by min_i Q_i(s, a)."""
        return self._pick(state, obs, key, self.explore if explore else self.exploit)

    def update(self, state: SIRState, batch: Transition, key: PRNGKey) -> tuple[SIRState, Metrics]:
        """One step of the critics and targets on a batch [B]: y = r + gamma (1 - terminated) min_i Q'_i(s', a')."""

        def next_value(obs, key):
            return state.target.min(obs, self._pick(state, obs, key, self.backup))

        y = td_target(batch, jax.vmap(next_value)(batch.next_obs, jr.split(key, batch.reward.shape[0])), self.gamma)
        critic, opt, loss, _ = fit_critic(self._tx, state.critic, state.critic_opt, batch, y)
        new = SIRState(critic, polyak(critic, state.target, self.tau), opt, state.action, state.step + 1)
        return new, {"critic_loss": loss, "q": y.mean(), "temperature": self.temperature(state.step)}

    def _pick(self, state: SIRState, obs: Float[Array, " o"], key: PRNGKey, selector: Selector) -> Float[Array, " a"]:
        k_action, k_pick = jr.split(key)
        shape = (selector.particles, *state.action.shape)
        actions = (
            2.0 * jr.beta(k_action, self.base, self.base, shape) - 1.0
            if self.base != 1
            else jr.uniform(k_action, shape, minval=-1.0, maxval=1.0)
        )
        score = jax.vmap(lambda a: state.critic.min(obs, a))(actions) / self.temperature(state.step)
        return actions[selector(k_pick, score)]

    @property
    def _tx(self):
        return clipped_adam(self.critic_lr, self.max_grad_norm, self.decay_steps)
