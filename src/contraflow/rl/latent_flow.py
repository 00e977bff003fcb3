"""The flow of RFM: from x_0 ~ N(0, I) to latent ends u in R^a, of which an action is the tanh, or u itself in a box."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.core.types import PRNGKey
from contraflow.flow.fewstep import Average, Matching, Objective, sample_average_velocity
from contraflow.flow.likelihood import PolicyDensity
from contraflow.flow.matching import Predict, matching_loss
from contraflow.flow.path import Linear, Path, Scalar, Vector
from contraflow.flow.solver import Drift, Euler, EulerMaruyama, Solver
from contraflow.flow.targets import log_sech2
from contraflow.nets.layers import time_embedding
from contraflow.nets.velocity import Velocity
from contraflow.rl.flow_policy import CLOCK

Bounds = Literal["tanh", "box"]
Condition = Float[Array, " c"]


@dataclass(frozen=True)
class LatentFlow:
    """Settings as in `RFM`, and what follows from them for a network and the condition it is given.

    Raises ValueError for t_min outside (0, .5), a stochastic solver of another path, and an averaged velocity with a
    solver other than Euler, off the linear path, with predicted noise or with weighed rows.
    """

    path: Path
    solver: Solver
    bounds: Bounds
    predict: Predict
    objective: Objective
    t_min: float
    width: int
    depth: int
    embedding: int

    def __post_init__(self):
        if not 0 < self.t_min < 0.5:
            raise ValueError(f"t_min must lie in (0, 0.5), got {self.t_min}")
        if isinstance(self.solver, EulerMaruyama) and self.solver.path != self.path:
            raise ValueError(f"the solver's path {self.solver.path} is not the agent's {self.path}")
        if self.objective.averaged:
            if not isinstance(self.solver, Euler):
                raise ValueError(f"an averaged velocity makes its steps itself: use Euler(n), not {self.solver}")
            if self.predict != "velocity" or not isinstance(self.path, Linear):
                raise ValueError("an averaged velocity lives on the linear path: use predict='velocity' and Linear()")
            if self.objective.power:
                raise ValueError(f"rows are not weighed here: use {type(self.objective).__name__}(power=0)")

    def init(self, key: PRNGKey, dim: int, cond: int) -> Velocity:
        """A fresh network for actions of size `dim` under a condition of size `cond`."""
        cond += self.embedding * self.objective.averaged
        return Velocity(dim, cond, self.width, self.depth, embedding=self.embedding, key=key)

    def average(self, net: Velocity, cond: Condition) -> Average:
        """u(x [a], t, r) -> [a]: the velocity of the whole step from t to r, of an averaged flow."""
        length = lambda t, r: time_embedding(CLOCK * (r - t), self.embedding)
        return lambda x, t, r: net(x, t, jnp.concatenate([cond, length(t, r)]))

    def drift(self, net: Velocity, cond: Condition) -> Drift:
        """v(x [a], t) -> [a], the velocity at t."""
        if self.objective.averaged:
            u = self.average(net, cond)
            return lambda x, t: u(x, t, t)
        if self.predict == "velocity":
            return lambda x, t: net(x, t, cond)

        def from_noise(x, t):
            x1 = self.path.x1_from_x0(net(x, t, cond), x, t)
            # An error of the noise counts 1 / alpha times in x1: at small t only the box keeps it in check.
            return self.path.velocity(x1 if self.bounds == "tanh" else jnp.clip(x1, -1.0, 1.0), x, t)

        return from_noise

    def draw(
        self, net: Velocity, cond: Condition, key: PRNGKey, n: int
    ) -> tuple[Float[Array, "n a"], Float[Array, "n a"]]:
        """n noises x_0 [n, a] and the ends u [n, a] that they have."""
        x0 = self.path.source_scale * jr.normal(key, (n, net.dim))
        keys = jr.split(jr.fold_in(key, 1), n)  # for solvers that add noise
        return x0, jax.vmap(lambda x, k: self.end(net, cond, x, k))(x0, keys)

    def end(self, net: Velocity, cond: Condition, x0: Vector, key: PRNGKey | None = None) -> Vector:
        """The end u [a] of x_0 [a]; `key` is for solvers that add noise.

        Averaged velocities step over the whole of [0, 1], others over [t_min, 1 - t_min].
        """
        if self.objective.averaged:
            return sample_average_velocity(self.average(net, cond), x0, self.solver.nfe)
        return self.solver(self.drift(net, cond), x0, self.t_min, 1 - self.t_min, key)

    def action(self, u: Float[Array, "*n a"]) -> Float[Array, "*n a"]:
        """The action that an end u stands for."""
        return jnp.tanh(u) if self.bounds == "tanh" else jnp.clip(u, -1.0, 1.0)

    def latent(self, action: Float[Array, "*n a"]) -> Float[Array, "*n a"]:
        """An end u that stands for an action; one at the edge of the box is moved 1e-4 inside for tanh."""
        return jnp.arctanh(jnp.clip(action, -1 + 1e-4, 1 - 1e-4)) if self.bounds == "tanh" else action

    def log_prob(
        self, density: PolicyDensity, net: Velocity, cond: Condition, x0: Vector, u: Vector, key: PRNGKey
    ) -> Scalar:
        """log pi(a | s) [] of the action that the end u [a] of x_0 [a] stands for, as `density` finds it."""
        drift, sampler = self.drift(net, cond), lambda x: self.end(net, cond, x)
        log_p = density(drift, sampler, self.path, x0, u, self.t_min, 1 - self.t_min, key)
        return log_p - jnp.sum(log_sech2(u)) if self.bounds == "tanh" else log_p

    def match(self, net: Velocity, cond: Condition, mean: Vector, x_t: Vector, t: Scalar) -> Scalar:
        """Squared error of the velocity, or noise, against that of the mean x1 of x_t."""
        if self.objective.averaged:
            return matching_loss(self.drift(net, cond), self.path, mean, x_t, t)
        return matching_loss(lambda x, t: net(x, t, cond), self.path, mean, x_t, t, self.predict)

    def tie(self, net: Velocity, slow: Velocity, cond: Condition, x1: Vector, key: PRNGKey) -> Scalar:
        """Squared error of a step of random size, somewhere on the way to x1, against those that it is made of.

        The velocity that MeanFlow's target needs is the network's own: what `match` made of it, without its noise.
        """
        assert not isinstance(self.objective, Matching)
        k_interval, k_x0, k_target = jr.split(key, 3)
        t, r = self.objective.interval(k_interval)
        x_t = self.path.perturb(jr.normal(k_x0, x1.shape), x1, t)
        u = self.average(net, cond)
        v = jax.lax.stop_gradient(u(x_t, t, t))
        target = self.objective.target(u, self.average(slow, cond), v, x_t, t, r, k_target)
        return jnp.mean((u(x_t, t, r) - target) ** 2)
