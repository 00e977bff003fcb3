"""Running moments of observations, and a policy that normalises its observations with them."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from contraflow.core.types import PRNGKey
from contraflow.policy.base import Policy, mapped_ablations


class RunningMoments(eqx.Module):
    """Mean and variance per dimension of all rows seen so far."""

    mean: Float[Array, " d"]
    var: Float[Array, " d"]
    count: Float[Array, ""]

    @classmethod
    def start(cls, dim: int) -> "RunningMoments":
        """Starts from one virtual row with mean 0 and variance 1: the identity at first, with little weight later."""
        return cls(jnp.zeros(dim), jnp.ones(dim), jnp.ones(()))

    def update(self, rows: Float[Array, "n d"], valid: Bool[Array, " n"]) -> "RunningMoments":
        """Returns the moments with the valid rows included (Chan et al. 1979)."""
        weight = valid[:, None].astype(rows.dtype)
        n = weight.sum()
        mean = jnp.sum(weight * rows, 0) / jnp.maximum(n, 1.0)
        square = jnp.sum(weight * (rows - mean[None]) ** 2, 0)
        total, gap = self.count + n, mean - self.mean
        var = (self.var * self.count + square + gap**2 * self.count * n / total) / total
        return RunningMoments(self.mean + gap * n / total, var, total)

    def __call__(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        """Returns (x - mean) / std [d], clipped to [-10, 10]."""
        return jnp.clip((x - self.mean) / jnp.sqrt(self.var + 1e-8), -10.0, 10.0)


class Normalised(eqx.Module):
    """policy((obs - mean) / std)."""

    stats: RunningMoments
    policy: Any

    def __call__(self, obs: Float[Array, " o"], key: PRNGKey, greedy: bool = True) -> Float[Array, " a"]:
        return self.policy(self.stats(obs), key, greedy)

    def sample(self, obs: Float[Array, " o"], key: PRNGKey) -> tuple[Float[Array, " a"], Any]:
        return self.policy.sample(self.stats(obs), key)

    def ablations(self) -> dict[str, Policy]:
        return mapped_ablations(self.policy, lambda policy: Normalised(self.stats, policy))

    @property
    def cost(self):
        return self.policy.cost


def normalised(stats: RunningMoments | None, policy: Policy) -> Policy:
    """Returns the policy with its observations normalised, or the policy itself if `stats` is None."""
    return policy if stats is None else Normalised(stats, policy)
