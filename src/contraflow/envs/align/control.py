"""Actions of a policy as samples, under observations of recorded steps."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.envs.align.generation import Reward


@dataclass(frozen=True, eq=False)
class Control:
    """`dim` numbers of an action, or of a chunk of them, under observations [n, o]; two such problems are never equal.

    It has no reward of its own and no judge: the environment tells what the actions are worth.
    """

    obs: Float[Array, "n o"]
    dim: int

    @property
    def sizes(self) -> tuple[int, int]:
        return self.dim, self.obs.shape[1]

    @property
    def rewards(self) -> Mapping[str, Reward]:
        return {}

    def condition(self, key):
        return self.obs[jr.randint(key, (), 0, self.obs.shape[0])]

    def approved(self, x, cond):
        return jnp.ones((), bool)

    def data(self) -> None:
        return None
