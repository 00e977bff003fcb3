"""Normalisation in training: running or frozen statistics of observations, and the scale of rewards."""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from contraflow.core.observation import shown
from contraflow.core.types import Batch, EnvSpec, Obs, UserError
from contraflow.policy.normalise import RunningMoments

NormaliseObs = Literal["off", "running", "frozen"]
"""`off` leaves observations unchanged. `running` subtracts the mean and divides by the deviation of all observations
replayed so far. `frozen` uses the statistics of a pretrained policy or dataset and does not update them."""


def initial_moments(mode: NormaliseObs, spec: EnvSpec) -> RunningMoments | None:
    """Returns statistics before any observation was seen; None for "off".

    Raises UserError for observations that are not vectors.
    """
    if mode != "off" and spec.obs_parts:
        raise UserError(
            f"observations of {shown(spec.observation)} cannot be normalised: set normalise_obs to off (images are "
            "divided by 255), and scale vectors in the environment"
        )
    return None if mode == "off" else RunningMoments.start(spec.obs_dim)


def pretrained_mode(mode: NormaliseObs, stats: RunningMoments | None) -> NormaliseObs:
    """Returns the mode after loading a pretrained policy: its statistics stay frozen unless the mode is "running"."""
    return "frozen" if mode == "off" and stats is not None else mode


def normalise(stats: RunningMoments | None, obs: Obs) -> Obs:
    """Returns the observation as the networks take it."""
    return obs if stats is None else stats(obs)


def update_and_normalise(
    stats: RunningMoments | None, batch: Batch, mode: NormaliseObs
) -> tuple[RunningMoments | None, Batch]:
    """Returns the statistics, updated with the batch [B] if running, and the batch as the networks take it."""
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
    """Divides rewards by the standard deviation of the discounted return, so that values are of order one.

    Rewards are not clipped: an offset that all rewards share would saturate, and the signal would be lost.
    """

    running: Float[Array, " N"]  # discounted return so far of each environment's current episode
    stats: RunningMoments

    @classmethod
    def start(cls, num_envs: int) -> "ReturnScale":
        return cls(jnp.zeros(num_envs), RunningMoments.start(1))

    def update(
        self, reward: Float[Array, "T N"], done: Bool[Array, "T N"], valid: Bool[Array, "T N"], gamma: float
    ) -> "ReturnScale":
        """Returns the scale updated with the returns g_t = gamma g_{t-1} + r_t of a rollout; g restarts after ends."""

        def step(g, inputs):
            reward, done = inputs
            g = gamma * g + reward
            return jnp.where(done, 0.0, g), g

        running, returns = jax.lax.scan(step, self.running, (reward, done))
        return ReturnScale(running, self.stats.update(returns.reshape(-1, 1), valid.reshape(-1)))

    def cut(self) -> "ReturnScale":
        """Returns the same statistics with all episodes restarted."""
        return ReturnScale(jnp.zeros_like(self.running), self.stats)

    def __call__(self, reward: Float[Array, "T N"]) -> Float[Array, "T N"]:
        """Returns reward / std of the return."""
        return reward / jnp.sqrt(self.stats.var[0] + 1e-8)
