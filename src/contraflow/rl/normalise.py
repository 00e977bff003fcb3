"""RunningMoments statistics of observations and of discounted returns, carried in an agent's state."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from contraflow.core.types import EnvSpec, Transition


class RunningMoments(eqx.Module):
    """Mean and variance of all rows seen so far, per dimension."""

    mean: Float[Array, " d"]
    var: Float[Array, " d"]
    count: Float[Array, ""]

    @classmethod
    def start(cls, dim: int) -> "RunningMoments":
        """As if one row had been seen, of mean 0 and variance 1: the identity at first, soon forgotten."""
        return cls(jnp.zeros(dim), jnp.ones(dim), jnp.ones(()))

    def update(self, rows: Float[Array, "n d"], valid: Bool[Array, " n"]) -> "RunningMoments":
        """Joined with the valid rows (Chan et al. 1979)."""
        weight = valid[:, None].astype(rows.dtype)
        n = weight.sum()
        mean = jnp.sum(weight * rows, 0) / jnp.maximum(n, 1.0)
        square = jnp.sum(weight * (rows - mean[None]) ** 2, 0)
        total, gap = self.count + n, mean - self.mean
        var = (self.var * self.count + square + gap**2 * self.count * n / total) / total
        return RunningMoments(self.mean + gap * n / total, var, total)

    def __call__(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        """(x - mean) / std, within 10."""
        return jnp.clip((x - self.mean) / jnp.sqrt(self.var + 1e-8), -10.0, 10.0)


def first_stats(wanted: bool, spec: EnvSpec) -> RunningMoments | None:
    """Statistics of observations before any was seen; None where they are not wanted."""
    return RunningMoments.start(spec.obs_dim) if wanted else None


def seen(stats: RunningMoments | None, obs: Float[Array, " o"]) -> Float[Array, " o"]:
    """The observation as networks get it."""
    return obs if stats is None else stats(obs)


def look(stats: RunningMoments | None, batch: Transition) -> tuple[RunningMoments | None, Transition]:
    """(statistics joined with a batch [B] of replay, the batch as networks get it)."""
    if stats is None:
        return None, batch
    stats = stats.update(batch.obs, jnp.ones_like(batch.terminated))
    seen = jax.vmap(stats)
    return stats, eqx.tree_at(lambda b: (b.obs, b.next_obs), batch, (seen(batch.obs), seen(batch.next_obs)))


class ReturnScale(eqx.Module):
    """Standard deviation of the discounted return, by which rewards are divided: values are then of order one."""

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

    def __call__(self, reward: Float[Array, "T N"]) -> Float[Array, "T N"]:
        """reward / std of the return, within 10."""
        return jnp.clip(reward / jnp.sqrt(self.stats.var[0] + 1e-8), -10.0, 10.0)
