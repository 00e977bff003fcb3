"""The data passed between environments, buffers, agents and loops.

Shape letters used throughout: B batch, N environments, K candidate samples, P particles, T time,
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
"""One observation, or its encoding: a vector [o], an image [H, W, C] or a dict of both."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)  # not an eqx.Module: a host loop makes one per step, and constructing a module takes 18 us
class Step:
    """The result of stepping N parallel copies; NumPy arrays on the host, JAX arrays on a device.

    `next_obs` is the true successor. `obs` is the observation to act on next, which differs after an episode ended.
    Rows with `valid` False are dummy steps of a NEXT_STEP autoreset, which are neither stored nor counted. `steps` is
    the number of environment steps in a row, more than 1 for chunks. `reward` is then their discounted sum, and
    `undiscounted` their plain sum, used for returns; None means that both are the same. `success` says whether the
    task is done; None means that the environment does not say.
    """

    obs: Any  # [N, o]
    next_obs: Any  # [N, o]
    reward: Any  # [N]
    terminated: Any  # [N]
    truncated: Any  # [N]
    valid: Any  # [N]
    steps: Any = 1  # [N], or one number for all rows
    undiscounted: Any = None  # [N]
    success: Any = None  # [N] bool


class Batch(eqx.Module):
    """Rows that an off-policy or offline agent learns from, with leading axis B.

    `discount` is gamma^span (1 - terminated), the factor on the value of `next_obs`, so agents need to know nothing
    about ends and spans. `reward` is discounted and summed over the span. An action may be a chunk of d = horizon * a
    numbers; `mask` is 0 for numbers beyond the end of the trajectory and 1 for the others.

    `next_action` is the recorded action at `next_obs`. `next_mask` is 0 where it is not known, because the trajectory
    ends there. Samplers fill both, which costs nothing if they are not read; None means not known.
    """

    obs: PyTree[Shaped[Array, "B ..."]]
    action: Float[Array, "B d"]
    reward: Float[Array, " B"]
    discount: Float[Array, " B"]
    next_obs: PyTree[Shaped[Array, "B ..."]]
    mask: Float[Array, "B d"]
    next_action: Float[Array, "B d"] | None = None
    next_mask: Float[Array, "B d"] | None = None
    human: Float[Array, "B d"] | None = None


class Rollout(eqx.Module):
    """T steps of N environments under one policy, which an on-policy update learns from.

    `extras` is the second result of the agent's `sample` for each action. `next_obs`, `terminated`, `truncated` and
    `valid` are as in `Step`.
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
    """Sizes of an environment. Actions lie in [-1, 1]^action_dim; `episode_length` None means unlimited.

    An action may be a chunk: `horizon` actions of the underlying environment, concatenated to action_dim numbers, of
    which the first `execute` are carried out (`contraflow.envs.chunk`). `low` and `high` bound one action of the
    underlying environment, onto which [-1, 1] is mapped; () if they are -1 and 1. `obs_keys` names the parts of a dict
    or tuple observation in the order of concatenation; () for one array.

    An observation is a vector of `obs_dim` numbers. For an image, or a flat dict of images and vectors, `obs_parts`
    describes each part in the order of `core/flatten.py`, and `obs_dim` is their total size. Raises ValueError for
    another total or for parts with equal names.
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
        """The observation as networks take it: its parts, or the size of a vector."""
        return self.obs_parts or self.obs_dim


__all__ = ["Batch", "EnvSpec", "Metrics", "Obs", "PRNGKey", "PRNGKeys", "Rollout", "Step", "UserError"]
