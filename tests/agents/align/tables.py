"""Flows whose network is known: affine fields between Gaussians, and the exact field of a mixture with a correction."""

from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from tests.flow.tilts import affine

from contraflow.agents.align.base import AlignState, Scored
from contraflow.core.types import EnvSpec
from contraflow.envs.align.mixture import mixture
from contraflow.flow import grid
from contraflow.flow.model import Ddim, Flow, FlowSpec
from contraflow.flow.path import Linear
from contraflow.flow.solver import Midpoint
from contraflow.flow.support import Real
from contraflow.nets.velocity import ResidualMLP

M, S = 0.3, 0.5
SPEC = FlowSpec(support=Real(), solver=Ddim(20), network=ResidualMLP(16, 1, 4))


class Table(eqx.Module):
    """v(x, t) = a(t) x + b(t), linear in t between K + 1 knots; every conditional mean between Gaussians is such."""

    a: jax.Array
    b: jax.Array
    dim: int = eqx.field(static=True, default=1)

    def __call__(self, x, t, cond):
        place = jnp.linspace(0.0, 1.0, self.a.shape[0])
        return jnp.interp(t / 5.0, place, self.a) * x + jnp.interp(t / 5.0, place, self.b)  # the clock of the flow

    def ends(self) -> tuple[float, float]:
        """Mean and standard deviation of Euler's ends from N(0, 1) in K steps."""
        mean, std, k = 0.0, 1.0, self.a.shape[0] - 1
        for a, b in zip(np.asarray(self.a, float)[:-1], np.asarray(self.b, float)[:-1], strict=True):
            mean, std = mean + (a * mean + b) / k, std * abs(1 + a / k)
        return mean, std


def table(steps: int, mean: float = M, std: float = S) -> Flow:
    """The field of N(mean, std^2)."""
    t = np.minimum(np.arange(steps + 1) / steps, 1 - 1e-6)
    a, b = (jnp.asarray(y, jnp.float32) for y in affine(t, mean, std))
    return Flow(Table(a, b), replace(SPEC, solver=Ddim(steps)))


class Corrected(eqx.Module):
    """The exact field of the eight Gaussians, plus a network that begins as 0."""

    net: Any

    @property
    def dim(self) -> int:
        return 2

    def __call__(self, x, t, cond):
        now = jnp.minimum(t / 5.0, 0.999)
        return Linear().velocity(mixture().posterior_mean(Linear(), x, now), x, now) + self.net(x, t, cond)


def corrected(width: int = 64, depth: int = 2) -> Flow:
    net = ResidualMLP(width, depth).init(jr.key(0), 2, 1)
    net = eqx.tree_at(lambda n: (n.last.weight, n.last.bias), net, replace_fn=jnp.zeros_like)
    return Flow(Corrected(net), FlowSpec(solver=Ddim(20)))


def start(agent: Any, flow: Flow) -> tuple[Any, AlignState]:
    """(agent, state) with a flow as pretrained."""
    agent = replace(agent, flow=flow.spec)
    state = agent.init(jr.key(0), EnvSpec(1, flow.dim, 1, 1, True))
    copy = lambda: jax.tree.map(jnp.copy, flow)
    old = None if state.old is None else copy()
    return agent, replace(state, flow=copy(), reference=copy(), old=old, opt=agent.optim.init(flow))


def trained(
    agent: Any, flow: Flow, reward: Any, iterations: int, group: int, host: bool = False
) -> tuple[AlignState, Any]:
    """(state, metrics of each iteration), as the loop of training does it, for one condition."""
    agent, state = start(agent, flow)
    cond = jnp.zeros((1, 1))

    def iterate(state, key):
        k_draw, k_update = jr.split(key)
        draws = agent.explore(state, cond, group, k_draw)
        found = jax.vmap(jax.vmap(lambda x: reward(x, cond[0])))(flow.spec.support.action(draws.end))
        return agent.update(state, Scored(cond, draws, found[..., None], score=None if host else reward), k_update)

    keys = jr.split(jr.key(1), iterations)
    return jax.jit(lambda state: jax.lax.scan(iterate, state, keys))(state)


def tilt_distance(flow: Flow, reward: Any, temperature: float) -> tuple[float, float, grid.Mass, grid.Mass]:
    """(total variation of a flow to the mixture tilted by a reward, that of the mixture itself, masses of the flow and
    of the tilt). Mixture and tilt are in closed form. 48 steps of the density are within .005 of them for the exact
    field; 24 steps are .02 away."""
    on = grid.grid(1.1, 66)
    field = lambda x, t: flow.velocity(x, t, jnp.zeros(1))
    found = jax.jit(lambda: grid.density(field, on, Midpoint(48, power=1.5)))()
    before = jax.nn.softmax(jax.vmap(mixture())(on.points))
    right = grid.tilted(before, jax.vmap(lambda x: reward(x, x))(on.points), temperature)
    away = [float(grid.total_variation(mass, right)) for mass in (found, before)]
    return away[0], away[1], found, right
