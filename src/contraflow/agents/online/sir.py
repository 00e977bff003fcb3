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

from contraflow.core.optim import check_positive
from contraflow.core.types import EnvSpec, Metrics, PRNGKey, Transition
from contraflow.nets.critic import QEnsemble
from contraflow.policy.select import Argmax, Selector, Softmax, pick
from contraflow.rl.critics import Critics
from contraflow.rl.normalise import RunningMoments, first_stats, look, seen
from contraflow.rl.temperature import Constant, Schedule


class SIRState(eqx.Module):
    critic: QEnsemble
    target: QEnsemble
    critic_opt: PyTree
    action: Float[Array, " a"]  # zeros; carries the action dimension
    step: Int[Array, ""]
    stats: RunningMoments | None = None  # of observations, where they are normalised


@dataclass(frozen=True)
class SIR:
    """Base law over actions: a = 2 b - 1 with b ~ Beta(kappa, kappa)^d; 1 is uniform, below 1 favours the faces."""

    acting: ClassVar[tuple[str, ...]] = ("critic", "action", "step", "stats")

    explore: Selector = Softmax(particles=32)
    backup: Selector = Softmax(particles=32)
    greedy: Selector = Argmax(particles=32)
    base: float = 1.0
    """kappa; the density over u = atanh a is then ~ prod sech^(2 kappa) u_j, the base measure of RFM."""
    temperature: Schedule = Constant(0.02)
    normalise_obs: bool = False
    """Observations less their mean, divided by their deviation, of all replayed so far."""
    critic: Critics = Critics()

    def __post_init__(self):
        check_positive(self, "base")

    def init(self, key: PRNGKey, spec: EnvSpec) -> SIRState:
        """Fresh critics for `spec`'s sizes; the target is a copy."""
        action, step = jnp.zeros(spec.action_dim), jnp.zeros((), jnp.int32)
        return SIRState(*self.critic.init(key, spec), action, step, first_stats(self.normalise_obs, spec))

    def act(self, state: SIRState, obs: Float[Array, " o"], key: PRNGKey, explore: bool) -> Float[Array, " a"]:
        """One of n actions of the base law, picked by Q(s, a)."""
        return self._pick(state, seen(state.stats, obs), key, self.explore if explore else self.greedy)

    def update(self, state: SIRState, batch: Transition, key: PRNGKey) -> tuple[SIRState, Metrics]:
        """One step of the critics and targets on a batch [B]."""
        k_next, k_critic = jr.split(key)
        stats, batch = look(state.stats, batch)
        keys = jr.split(k_next, batch.reward.shape[0])
        action = jax.vmap(lambda o, k: self._pick(state, o, k, self.backup))(batch.next_obs, keys)
        critic, target, opt, metrics = self.critic.learn(
            state.critic, state.target, state.critic_opt, batch, action, k_critic
        )
        metrics["temperature"] = self.temperature(state.step)
        return SIRState(critic, target, opt, state.action, state.step + 1, stats), metrics

    def _pick(self, state: SIRState, obs: Float[Array, " o"], key: PRNGKey, selector: Selector) -> Float[Array, " a"]:
        k_action, k_pick = jr.split(key)
        shape = (selector.particles, *state.action.shape)
        if self.base == 1:
            actions = jr.uniform(k_action, shape, minval=-1.0, maxval=1.0)
        else:
            actions = symmetric_beta(k_action, self.base, shape)
        return actions[pick(selector, k_pick, state.critic, obs, actions, self.temperature(state.step))]


def symmetric_beta(key: PRNGKey, kappa: float, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Draws of 2 b - 1 in [-1, 1], b ~ Beta(kappa, kappa), kappa > 0, of that shape.

    With u, v uniform: cos(2 pi v) / sqrt(cos(2 pi v)^2 + 1 / (u^(-1 / kappa) - 1)) (Devroye, Random variate generation
    in one line of code, Winter Simulation Conference 1996). `jax.random.beta` rejects: fifteen times as long on a CPU.
    """
    k_size, k_angle = jr.split(key)
    cos = jnp.cos(2.0 * jnp.pi * jr.uniform(k_angle, shape))
    odds = jnp.expm1(-jnp.log(jr.uniform(k_size, shape, minval=1e-37)) / kappa) * cos**2  # inf for a small kappa is 1
    return jnp.sign(cos) / jnp.sqrt(1.0 + 1.0 / odds)
