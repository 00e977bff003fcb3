"""The data that travels between environments, buffers, agents and loops.

Shape letters used everywhere: B batch, N environments, K candidate samples, P particles, T time,
o observation dim, a action dim, d latent dim, m ensemble members.
"""

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Bool, Float, Key, PyTree, Shaped

from contraflow.core.errors import UserError
from contraflow.core.observation import Observation, Part

Metrics = dict[str, Any]
PRNGKey = Key[Array, ""]
PRNGKeys = Key[Array, " S"]  # one for each of S seeds
Obs = PyTree[Shaped[Array, "..."]]
"""One observation, or what an encoder made of it: a vector [o], an image [H, W, C] or a dict of both."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)  # not an eqx.Module: a host loop makes one in every step, and making one of those takes 18 us
class Step:
    """What an environment returns for N parallel copies; NumPy arrays on the host, JAX arrays on a device.

    `next_obs` is the true successor; `obs` is what to act on next (another one only after an episode ended).
    Rows with `valid` False are the dummy steps of a NEXT_STEP autoreset: they are not stored and not counted.
    `steps` is what a row counts for where one decision is several environment steps; their rewards are then discounted
    in `reward`, and `undiscounted` is their plain sum, of which returns are made: None where both are the same.
    """

    obs: Any  # [N, o]
    next_obs: Any  # [N, o]
    reward: Any  # [N]
    terminated: Any  # [N]
    truncated: Any  # [N]
    valid: Any  # [N]
    steps: Any = 1  # [N], or one number for all
    undiscounted: Any = None  # [N]


class Batch(eqx.Module):
    """Rows that an off-policy or offline agent learns from; leading axis B.

    `discount` is gamma^span (1 - terminated), what the value of `next_obs` counts for: no agent needs to know of ends
    and spans. `reward` is discounted and summed over the span. An action may be a chunk, d = horizon * a numbers;
    `mask` is 0 for those that lie beyond the end of its trajectory, 1 for the others.

    `next_action` is what was done at `next_obs`, and `next_mask` is 0 where that is not known: nothing follows in the
    trajectory, or nothing yet. Samplers fill both, which costs nothing where they are not read; None is not known.
    """

    obs: PyTree[Shaped[Array, "B ..."]]
    action: Float[Array, "B d"]
    reward: Float[Array, " B"]
    discount: Float[Array, " B"]
    next_obs: PyTree[Shaped[Array, "B ..."]]
    mask: Float[Array, "B d"]
    next_action: Float[Array, "B d"] | None = None
    next_mask: Float[Array, "B d"] | None = None


class Rollout(eqx.Module):
    """T steps of N environments under one policy, what an on-policy update learns from.

    `extras` is what the agent's `sample` returned beside each action; `next_obs`, `terminated`, `truncated` and `valid`
    as in `Step`.
    """

    obs: PyTree[Shaped[Array, "T N ..."]]
    extras: Any  # every leaf [T, N, ...]
    reward: Float[Array, "T N"]
    next_obs: PyTree[Shaped[Array, "T N ..."]]
    terminated: Bool[Array, "T N"]
    truncated: Bool[Array, "T N"]
    valid: Bool[Array, "T N"]


@dataclass(frozen=True)
class EnvSpec:
    """Sizes of an environment. Actions are presented in [-1, 1]^action_dim; `episode_length` None means unlimited.

    An action may be a chunk: `horizon` actions of the environment proper, one after the other in action_dim numbers, of
    which the first `execute` are carried out (`contraflow.envs.chunk`). `low` and `high` are the range of one action of
    the environment proper, onto which [-1, 1] is mapped; () where it is [-1, 1] itself. `obs_keys` names the parts of a
    dict or tuple observation in the order in which they follow each other; () where it is one array.

    An observation is a vector of `obs_dim` numbers. Where it is more, an image or a flat dict of images and vectors,
    `obs_parts` says so part by part, kept in the order of `core/flatten.py`, and `obs_dim` counts the numbers of all.
    Raises ValueError for another count, and for parts of one name.
    """

    obs_dim: int
    action_dim: int
    num_envs: int
    episode_length: int | None
    jittable: bool
    horizon: int = 1
    execute: int = 1
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    obs_keys: tuple[str, ...] = ()
    obs_parts: tuple[Part, ...] = ()

    def __post_init__(self):
        names, size = [part.name for part in self.obs_parts], sum(part.size for part in self.obs_parts)
        if len(set(names)) < len(names) or ("" in names and len(names) > 1):
            raise ValueError(f"parts of an observation need different names, got {names}")
        if names and size != self.obs_dim:
            raise ValueError(f"the parts of an observation have {size} numbers, obs_dim says {self.obs_dim}")
        object.__setattr__(self, "obs_parts", tuple(sorted(self.obs_parts, key=lambda part: part.name)))

    @property
    def observation(self) -> Observation:
        """What networks are made for."""
        return self.obs_parts or self.obs_dim


__all__ = ["Batch", "EnvSpec", "Metrics", "Obs", "PRNGKey", "PRNGKeys", "Rollout", "Step", "UserError"]
