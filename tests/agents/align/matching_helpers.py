"""Flows, rewards and gradients for tests of the methods that learn from fresh (t, x0) by matching."""

from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.scipy.stats import norm

from contraflow.agents.align.base import AlignState, Draws, Scored, batches, line
from contraflow.core.optim import Optim
from contraflow.flow.model import Flow, FlowSpec
from contraflow.nets.velocity import ResidualMLP
from contraflow.rl.group import GroupAdvantage

CLOCK = FlowSpec().clock


class Descent(Optim):
    """One step of size 1 along the gradient, so that a step shows it."""

    @property
    def tx(self):
        return optax.sgd(1.0)


class Given(GroupAdvantage):
    """The rewards are the advantages."""

    def __call__(self, reward, weights):
        return jnp.sum(reward, -1)


def variance(t, std=1.0):
    """Of x_t where x1 has the deviation `std`."""
    return (t * std) ** 2 + (1 - t) ** 2


def gaussian(x, t, mean=0.0, std=1.0):
    """The velocity from N(0, 1) to N(mean, std^2)."""
    return mean + (t * std**2 - (1 - t)) / variance(t, std) * (x - t * mean)


class Moved(eqx.Module):
    """The velocity to N(0, 1) plus theta . features(x, t), which are numbers that vary with x and t."""

    theta: jax.Array
    features: object = eqx.field(static=True)
    dim: int = eqx.field(static=True, default=1)

    def __call__(self, x, t, cond):
        t = t / CLOCK
        return gaussian(x, t) + self.theta @ jnp.stack(self.features(x[0], t))


class Fitted(eqx.Module):
    """The velocity to N(mean, exp(log_std)^2)."""

    mean: jax.Array
    log_std: jax.Array
    dim: int = eqx.field(static=True, default=1)

    def __call__(self, x, t, cond):
        return gaussian(x, t / CLOCK, self.mean, jnp.exp(self.log_std))


def start(flow, optim, extra=None, old=None):
    """The state of a flow that is its own reference."""
    copy = lambda tree: jax.tree.map(jnp.copy, tree)
    reference = copy(flow if old is None else old)
    return AlignState(flow, optim.init(flow), jnp.zeros((), jnp.int32), reference, copy(reference), None, extra)


def small(key, dim=2, cond=3):
    """A network with random weights in every layer."""
    spec = FlowSpec(network=ResidualMLP(8, 1, 4))
    k_init, k_more = jr.split(key)
    leaves, tree = jax.tree.flatten(spec.init(k_init, dim, cond))
    keys = jr.split(k_more, len(leaves))
    return jax.tree.unflatten(tree, [x + 0.3 * jr.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def groups(key, conds=3, group=4, dim=2, cond=3, reward=None):
    """Samples of random conditions, with random rewards."""
    k_cond, k_end, k_reward = jr.split(key, 3)
    reward = jr.normal(k_reward, (conds, group)) if reward is None else reward
    return Scored(
        jr.normal(k_cond, (conds, cond)), Draws(0.7 * jr.normal(k_end, (conds, group, dim))), reward[..., None]
    )


def one_group(x1, reward):
    """Samples [n] under one condition, with rewards [n]."""
    return Scored(jnp.zeros((1, 1)), Draws(x1[None, :, None]), reward[None, :, None])


def normals(n):
    """The quantiles of N(0, 1) at n equally spaced levels: moments without the noise of draws."""
    return norm.ppf((jnp.arange(n) + 0.5) / n)


@partial(jax.jit, static_argnums=0)
def update(agent, state, scored, key):
    """Compiled once for equal agents."""
    return agent.update(state, scored, key)


def gradient(agent, state, scored, key):
    """The gradient of one update with respect to the flow, and its metrics; keys may be used again."""
    agent = replace(agent, optim=Descent(), minibatches=1)
    state = replace(state, opt=agent.optim.init(state.flow))
    new, metrics = update(agent, state, scored, jr.clone(key))
    return jax.tree.map(jnp.subtract, state.flow, new.flow), metrics


def flattened(tree):
    return jax.flatten_util.ravel_pytree(tree)[0]


def drawn(flow, rows, key, times):
    """The rows in the order of an update with one share, and its (x_t, t, u), each [n, times, ...]."""
    k_order, k_loss = jr.split(jr.clone(key))
    rows, key = batches(k_order, rows, 1), jr.split(k_loss, 1)[0]
    rows = jax.tree.map(lambda x: x[0], rows)
    keys = jr.split(key, (rows[1].shape[0], times))
    return rows, jax.vmap(jax.vmap(lambda x1, k: line(flow, x1, k), (None, 0)))(rows[1], keys)


def flow_of(net, **more):
    return Flow(net, FlowSpec(**more))
