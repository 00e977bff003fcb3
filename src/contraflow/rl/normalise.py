"""Normalisation in training: statistics of observations that move or are frozen, and the scale of rewards."""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from contraflow.core.observation import shown
from contraflow.core.types import Batch, EnvSpec, Obs, UserError
from contraflow.policy.normalise import RunningMoments

NormaliseObs = Literal["off", "running", "frozen"]
"""Observations as they are; less the mean and divided by the deviation of all replayed so far; or by statistics that
came with a pretrained policy or dataset and stay."""


def initial_moments(mode: NormaliseObs, spec: EnvSpec) -> RunningMoments | None:
    """Statistics of observations before any was seen; None where they are not wanted. Raises UserError
    where observations have parts."""
    if mode != "off" and spec.obs_parts:
        raise UserError(
            f"observations of {shown(spec.observation)} cannot be normalised: set normalise_obs to off (images are "
            "divided by 255), and scale vectors in the environment"
        )
    return None if mode == "off" else RunningMoments.start(spec.obs_dim)


def pretrained_mode(mode: NormaliseObs, stats: RunningMoments | None) -> NormaliseObs:
    """Statistics that a pretrained policy brought stay as they are, unless they were told to move."""
    return "frozen" if mode == "off" and stats is not None else mode


def normalise(stats: RunningMoments | None, obs: Obs) -> Obs:
    """The observation as networks get it."""
    return obs if stats is None else stats(obs)


def update_and_normalise(
    stats: RunningMoments | None, batch: Batch, mode: NormaliseObs
) -> tuple[RunningMoments | None, Batch]:
    """(statistics, joined with the batch [B] where they move; the batch as networks get it)."""
    if stats is None:
        return None, batch
    if mode == "running":
        stats = stats.update(batch.obs, jnp.ones(batch.reward.shape, bool))
    each = jax.vmap(stats)
    return stats, eqx.tree_at(lambda b: (b.obs, b.next_obs), batch, (each(batch.obs), each(batch.next_obs)))


def unit_scale(q: Float[Array, "*n"]) -> Float[Array, ""]:
    """1 / mean |q|, held fixed: q times it is of order one whatever the unit of rewards."""
    return jax.lax.stop_gradient(1.0 / jnp.maximum(jnp.mean(jnp.abs(q)), 1e-6))


class ReturnScale(eqx.Module):
    """Standard deviation of the discounted return, by which rewards are divided: values are then of order one.

    Rewards are not clipped: a level that all rewards share would saturate there and the signal be lost.
    """

    running: Float[Array, " N"]  # discounted return so far of each environment's episode
    stats: RunningMoments

    @classmethod
    def start(cls, num_envs: int) -> "ReturnScale":
        return cls(jnp.zeros(num_envs), RunningMoments.start(1))

    def update(
        self, reward: Float[Array, "T N"], done: Bool[Array, "T N"], valid: Bool[Array, "T N"], gamma: float
    ) -> "ReturnScale":
        """Joined with the returns g_t = gamma g_{t-1} + r_t of a rollout, which start anew after an end."""

        def step(g, inputs):
            reward, done = inputs
            g = gamma * g + reward
            return jnp.where(done, 0.0, g), g

        running, returns = jax.lax.scan(step, self.running, (reward, done))
        return ReturnScale(running, self.stats.update(returns.reshape(-1, 1), valid.reshape(-1)))

    def cut(self) -> "ReturnScale":
        """The same statistics; what comes next starts new episodes."""
        return ReturnScale(jnp.zeros_like(self.running), self.stats)

    def __call__(self, reward: Float[Array, "T N"]) -> Float[Array, "T N"]:
        """reward / std of the return."""
        return reward / jnp.sqrt(self.stats.var[0] + 1e-8)
