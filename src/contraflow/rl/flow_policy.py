"""A conditional flow over actions (or chunks of them), the policy that imitation learns and fine-tuning improves."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.core.types import EnvSpec, PRNGKey
from contraflow.flow.fewstep import Matching, Objective
from contraflow.flow.matching import Predict
from contraflow.flow.path import Linear, Path, Scalar, Vector
from contraflow.nets.layers import time_embedding
from contraflow.nets.transformer import Transformer
from contraflow.nets.velocity import Velocity

Obs = Float[Array, " o"]
Network = Any
"""A module with a `dim` that takes (x, t, cond) to a vector of that size, as `Velocity` does."""
EDGE = 1e-3  # times are drawn from [EDGE, 1 - EDGE]: some paths have no velocity at their ends
CLOCK = 5.0  # times reach the embedding as [0, 5]: at [0, 100] the derivative that MeanFlow trains on blows up


@dataclass(frozen=True)
class FlowPolicy:
    """x_0 ~ N(0, I) is carried along `path` to x_1, the action before it is clipped to [-1, 1].

    One step from time t to r goes to alpha_r x1 + beta_r x0 with the ends that the network predicts at x_t: Euler's
    step for a velocity on the linear path, DDIM's (2010.02502) in general. An averaged velocity u(x, t, r) is that of
    the whole step, so that few steps, or one, are enough (flow/onestep.py).
    """

    path: Path = Linear()
    predict: Predict = "velocity"
    """What the network returns: dx/dt, or E[x0 | x_t]."""
    averaged: bool = False
    """The network also takes the time at which the step ends."""
    steps: int = 10
    """Network evaluations per action."""
    clip: float | None = None
    """Bound of the predicted x1 within a step; usual where noise is predicted."""
    network: Literal["mlp", "transformer"] = "mlp"
    """A transformer has one token per action of a chunk: for long ones. Its width is a multiple of 4, the heads."""
    width: int = 256
    depth: int = 3
    embedding: int = 32

    def __post_init__(self):
        if self.steps < 1 or self.width < 1:
            raise ValueError(f"steps and width must be at least 1, got {self.steps} and {self.width}")
        if self.network == "transformer" and self.width % 4:
            raise ValueError(f"the width of a transformer must be a multiple of 4, got {self.width}")
        if self.averaged and (self.predict != "velocity" or not isinstance(self.path, Linear)):
            raise ValueError("an averaged velocity lives on the linear path: use predict='velocity' and Linear()")

    def init(self, key: PRNGKey, spec: EnvSpec) -> Network:
        cond = spec.obs_dim + self.embedding * self.averaged
        sizes = spec.action_dim, cond, self.width, self.depth
        if self.network == "transformer":
            return Transformer(*sizes, horizon=spec.horizon, embedding=self.embedding, key=key)
        return Velocity(*sizes, embedding=self.embedding, key=key)

    def output(self, net: Network, x: Vector, t: Scalar, r: Scalar, obs: Obs) -> Vector:
        """What the network returns for a step from t to r."""
        return net(x, CLOCK * t, self._condition(t, r, obs))

    def features(self, net: Network, x: Vector, t: Scalar, r: Scalar, obs: Obs) -> Float[Array, " w"]:
        """Its last hidden layer."""
        return net.features(x, CLOCK * t, self._condition(t, r, obs))

    def ends(self, net: Network, x: Vector, t: Scalar, r: Scalar, obs: Obs) -> tuple[Vector, Vector]:
        """(x1, x0) predicted at x_t; of an averaged velocity, those that its step to r implies."""
        out = self.output(net, x, t, r, obs)
        if self.predict == "velocity":
            x1, x0 = self.path.x1_from_velocity(out, x, t), self.path.x0_from_velocity(out, x, t)
        else:
            late = jnp.maximum(t, EDGE)  # at t = 0 x_t is noise alone on some paths, and x1 would be 0 / 0
            x1, x0 = self.path.x1_from_x0(out, x, late), out
        if self.clip is not None:
            x1 = jnp.clip(x1, -self.clip, self.clip)
            x0 = self.path.x0_from_x1(x1, x, t)
        return x1, x0

    def move(self, net: Network, x: Vector, t: Scalar, r: Scalar, obs: Obs) -> Vector:
        """x_r from x_t, without noise."""
        if self.averaged or (self.predict == "velocity" and self.clip is None and isinstance(self.path, Linear)):
            return x + (r - t) * self.output(net, x, t, r, obs)
        x1, x0 = self.ends(net, x, t, r, obs)
        return self.path.alpha(r) * x1 + self.path.beta(r) * x0

    def __call__(self, net: Network, x0: Vector, obs: Obs, steps: int | None = None) -> Vector:
        """x_1 from x_0 in `steps` equal steps (None: the policy's own)."""
        n = steps or self.steps

        def step(x, k):
            return self.move(net, x, k / n, (k + 1) / n, obs), None

        return jax.lax.scan(step, x0, jnp.arange(n, dtype=x0.dtype))[0]

    def match_error(self, net: Network, obs: Obs, x0: Vector, x1: Vector, key: PRNGKey) -> Vector:
        """Error of the output at a random time between x0 and x1: its target is their velocity, or x0."""
        t, path = jr.uniform(key, minval=EDGE, maxval=1 - EDGE), self.path
        target = x0 if self.predict == "noise" else path.d_alpha(t) * x1 + path.d_beta(t) * x0
        return self.output(net, path.perturb(x0, x1, t), t, t, obs) - target

    def consistency_error(
        self, objective: Objective, net: Network, slow: Network, obs: Obs, x0: Vector, x1: Vector, key: PRNGKey
    ) -> Vector:
        """Error of a step of random size, between x0 and x1, against those that it is made of (flow/onestep.py)."""
        assert not isinstance(objective, Matching)
        k_interval, k_target = jr.split(key)
        t, r = objective.interval(k_interval)
        x_t = self.path.perturb(x0, x1, t)

        def u(net):
            return lambda x, t, r: self.output(net, x, t, r, obs)

        target = objective.target(u(net), u(slow), x1 - x0, x_t, t, r, k_target)
        return u(net)(x_t, t, r) - target

    def _condition(self, t: Scalar, r: Scalar, obs: Obs) -> Float[Array, " c"]:
        return jnp.concatenate([obs, time_embedding(CLOCK * (r - t), self.embedding)]) if self.averaged else obs
