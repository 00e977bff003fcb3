"""A flow as a policy: the action is the end of the flow from random noise."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.core.types import Obs, PRNGKey
from contraflow.flow.model import Condition, Ddpm, Flow, FlowSpec
from contraflow.flow.path import Linear, Scalar, Vector
from contraflow.flow.solver import EulerMaruyama
from contraflow.nets.layers import time_embedding
from contraflow.policy.base import Cost


class FlowPolicy(eqx.Module):
    """a = support(x_1) with x_1 the end of the flow from x_0 ~ N(0, I), conditioned on s and any `temperature`."""

    flow: Flow
    temperature: Scalar | None = None

    def condition(self, obs: Obs) -> Condition:
        """Returns the condition of the flow [c]."""
        return condition(self.flow, obs, self.temperature)

    def from_noise(self, obs: Obs, x0: Vector, key: PRNGKey | None = None) -> Float[Array, " a"]:
        """Returns the action [a] that the flow maps x_0 [a] to. Stochastic solvers need `key`."""
        return self.flow.action(self.flow.sample(x0, self.condition(obs), key))

    def particles(self, obs: Obs, key: PRNGKey, n: int) -> Float[Array, "n a"]:
        """Returns n independent actions [n, a]."""
        return self.flow.action(self.flow.particles(self.condition(obs), key, n)[1])

    def __call__(self, obs: Obs, key: PRNGKey, greedy: bool = True) -> Float[Array, " a"]:
        return self.from_noise(obs, self.flow.noise(key), jr.fold_in(key, 1))

    @property
    def cost(self) -> Cost:
        spec = self.flow.spec
        return Cost(1, spec.solver.nfe * (1 if spec.guidance == 1.0 else 2), 0)


def solves_velocity(spec: FlowSpec) -> bool:
    """Returns whether the network is a velocity on the linear path that a solver without noise integrates."""
    plain = spec.predict == "velocity" and spec.clip is None and not spec.averaged and not spec.unit_input
    return plain and isinstance(spec.path, Linear) and not isinstance(spec.solver, EulerMaruyama | Ddpm)


def condition(flow: Flow, obs: Obs, temperature: Scalar | None) -> Condition:
    """Returns the encoded observation, followed by features of the temperature unless it is None."""
    cond = flow.encode(obs)
    if temperature is None:
        return cond
    return jnp.concatenate([cond, time_embedding(temperature, flow.spec.network.embedding)])
