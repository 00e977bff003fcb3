"""Acting through the start noise of a frozen policy: a = f(s, w), with w chosen by a small policy (2506.15799)."""

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.core.optim import check_positive
from contraflow.core.types import Obs, PRNGKey
from contraflow.flow.targets import log_normal, log_sech2
from contraflow.nets.mlp import MLP
from contraflow.policy.abilities import ability
from contraflow.policy.base import Cost

Noise = Float[Array, " n"]
Scalar = Float[Array, ""]
LOG_STD = (-5.0, 2.0)


@dataclass(frozen=True)
class Prior:
    """w ~ N(mean(s), std(s)^2), held to N(0, I), the noise of the frozen policy.

    The network begins with mean 0 and std 1, hence as the frozen policy.
    """

    def draw(self, out: Float[Array, " m"], key: PRNGKey) -> tuple[Noise, Scalar]:
        """Returns w, and log N(w; mean, std^2) - log N(w; 0, I): its mean is the relative entropy."""
        mean, std = moments(out)
        w = mean + std * jr.normal(key, mean.shape)
        return w, log_normal(w, mean, std) - log_normal(w, jnp.zeros_like(w), jnp.ones_like(w))

    def usual(self, out: Float[Array, " m"], key: PRNGKey) -> Noise:
        """Returns w in evaluation, which is a draw: the mean alone would lose the variety of the frozen policy."""
        return self.draw(out, key)[0]


@dataclass(frozen=True)
class Bounded:
    """w = bound tanh(u), u ~ N(mean(s), std(s)^2), rewarded for its entropy as in SAC.

    Uniform noise in the box has the variance bound^2 / 3, that of N(0, 1) at bound = sqrt 3. It never is the frozen
    policy.
    """

    bound: float = 1.5

    def __post_init__(self):
        check_positive(self, "bound")

    def draw(self, out: Float[Array, " m"], key: PRNGKey) -> tuple[Noise, Scalar]:
        """Returns w and the log-density of tanh(u)."""
        mean, std = moments(out)
        u = mean + std * jr.normal(key, mean.shape)
        return self.bound * jnp.tanh(u), log_normal(u, mean, std) - jnp.sum(log_sech2(u))

    def usual(self, out: Float[Array, " m"], key: PRNGKey) -> Noise:
        """Returns w in evaluation, bound tanh(mean)."""
        return self.bound * jnp.tanh(moments(out)[0])


Form = Prior | Bounded


def moments(out: Float[Array, " m"]) -> tuple[Noise, Noise]:
    """Returns mean and standard deviation, each [m / 2], from the output of a network."""
    mean, log_std = jnp.split(out, 2)
    return mean, jnp.exp(jnp.clip(log_std, *LOG_STD))


class Steered(eqx.Module):
    """A frozen policy whose start noise is chosen by a network. `base` has `from_noise(obs, x0) -> action`.

    The noise has `repeat` times the numbers of the network's choice: the same for each action of a chunk.
    """

    base: Any
    net: MLP
    form: Form = eqx.field(static=True)
    repeat: int = eqx.field(static=True, default=1)

    def act(self, obs: Obs, w: Noise) -> Float[Array, " a"]:
        """Returns the action that starts from w."""
        return self.base.from_noise(obs, jnp.tile(w, self.repeat))

    def draw(self, obs: Obs, key: PRNGKey) -> tuple[Noise, Scalar]:
        """Returns w and the cost of choosing it, in nats."""
        return self.form.draw(self.net(obs), key)

    def __call__(self, obs: Obs, key: PRNGKey, greedy: bool = True) -> Float[Array, " a"]:
        out = self.net(obs)
        return self.act(obs, self.form.usual(out, key) if greedy else self.form.draw(out, key)[0])

    @property
    def cost(self) -> Cost:
        return Cost(1, self.base.cost.nfe + 1, 0)


class ByNoise(eqx.Module):
    """a = f(s, bound u(s)): a frozen policy f from start noise that another policy u chooses in [-1, 1]^n.

    The noise has `repeat` times the numbers of the choice: the same for each action of a chunk.
    """

    base: Any
    chooser: Any
    bound: float = eqx.field(static=True)
    repeat: int = eqx.field(static=True, default=1)

    def __call__(self, obs: Any, key: PRNGKey, greedy: bool = True) -> Float[Array, " a"]:
        return acted(self.base, obs, self.noise(self.chooser(obs, key, greedy)))

    def noise(self, choice: Float[Array, " n"]) -> Float[Array, " a"]:
        """Returns the start noise of a choice in [-1, 1]^n."""
        return jnp.tile(self.bound * choice, self.repeat)

    @property
    def cost(self) -> Cost:
        return Cost(1, self.base.cost.nfe + self.chooser.cost.nfe, 0)


def acted(base: Any, obs: Any, noise: Float[Array, " a"]) -> Float[Array, " a"]:
    """Returns the action [a] that a policy, within its wrappers, maps start noise [a] to."""
    method, obs = ability(base, obs, "from_noise")
    return method(obs, noise)
