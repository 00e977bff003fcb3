"""What the methods of reward alignment share: their state, their data, and draws of a flow under conditions.

An alignment method has, besides `init`, `policy`, `starting_from` and `adopt` of other agents,

    explore(state, cond [B, c], group, key) -> Draws        `group` samples for each condition
    update(state, scored, key) -> (state, metrics)          from those samples and their rewards

A run alternates the two; its steps count rewards (training/sources/conditions.py).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, PyTree

from contraflow.agents.base import adopted
from contraflow.core.optim import Optim
from contraflow.core.types import EnvSpec, Metrics, PRNGKey
from contraflow.flow.model import EDGE, Flow, FlowSpec
from contraflow.flow.path import Linear, Scalar, Vector
from contraflow.policy.base import Policy
from contraflow.policy.flow import FlowPolicy
from contraflow.policy.normalise import RunningMoments, normalised

Score = Callable[[Vector, Vector], Scalar]


class Draws(eqx.Module):
    """Samples of a flow: `end` is what the flow ends in, before the support; `extras` belong to the method."""

    end: Float[Array, "B G d"]
    extras: Any = None


class Pairs(eqx.Module):
    """Rows of data: samples x under conditions."""

    cond: Float[Array, "n c"]
    x: Float[Array, "n d"]


class Scored(eqx.Module):
    """Samples with m rewards each; `score` is the weighted sum of the rewards as a function of one (sample,
    condition), None where rewards are not computed in JAX. `data` are rows of the problem's data, if it has any."""

    cond: Float[Array, "B c"]
    draws: Draws
    reward: Float[Array, "B G m"]
    data: Pairs | None = None
    weights: tuple[float, ...] = eqx.field(static=True, default=(1.0,))
    score: Score | None = eqx.field(static=True, default=None)

    @property
    def total(self) -> Float[Array, "B G"]:
        """The weighted sum of the rewards."""
        return self.reward @ jnp.asarray(self.weights)


class AlignState(eqx.Module):
    """`reference` is the pretrained flow; `old` follows `flow` slowly: it draws the samples or holds the flow back."""

    flow: Flow
    opt: PyTree
    step: Int[Array, ""]
    reference: Any  # a flow, or None
    old: Any = None
    stats: RunningMoments | None = None
    extra: Any = None


def first_state(
    spec: FlowSpec, optim: Optim, key: PRNGKey, env: EnvSpec, reference: bool = True, old: bool = False, **more: Any
) -> AlignState:
    """Returns a state with fresh weights, which `adopt` replaces by pretrained ones."""
    flow = spec.init(key, env.action_dim, env.observation, env.horizon)
    copy = lambda wanted: jax.tree.map(jnp.copy, flow) if wanted else None
    return AlignState(flow, optim.init(flow), jnp.zeros((), jnp.int32), copy(reference), copy(old), **more)


def checked_flow(spec: FlowSpec, method: str, averaged: bool = False) -> FlowSpec:
    """Returns the settings of a pretrained flow. Raises ValueError for a flow that is not a velocity on the linear
    path, and for one of average velocities unless it should be `averaged`."""
    if not (isinstance(spec.path, Linear) and spec.predict == "velocity" and spec.clip is None):
        raise ValueError(f"{method} aligns flows that predict the velocity of the linear path; train one with bc")
    if spec.averaged and not averaged:
        raise ValueError(f"{method} would spoil the long steps of a flow of average velocities; use mean-flow-nft")
    if averaged and not spec.averaged:
        raise ValueError(f"{method} needs a flow of average velocities; train one with bc agent.objective:mean-flow")
    return spec


def with_pretrained(state: AlignState, spec: FlowSpec, policy: Policy, agent: Any) -> AlignState:
    """Returns the state with the flow of a pretrained policy as flow, reference and old flow."""
    flow, stats = adopted(spec, policy, agent)
    copy = lambda part: None if part is None else jax.tree.map(jnp.copy, flow)
    return replace(
        state, flow=flow, reference=copy(state.reference), old=copy(state.old), stats=stats, opt=agent.optim.init(flow)
    )


def policy_of(state: AlignState) -> Policy:
    """Returns the end of the flow from random noise, by the flow's own solver."""
    return normalised(state.stats, FlowPolicy(state.flow))


def encoded(state: AlignState, cond: Float[Array, "B c"]) -> Float[Array, "B c"]:
    """Returns conditions as the networks take them."""
    return cond if state.stats is None else jax.vmap(state.stats)(cond)


def field(flow: Flow, cond: Vector) -> Callable[[Vector, Scalar], Vector]:
    """Returns v(x, t) under a condition as `encoded` returns it."""
    return lambda x, t: flow.velocity(x, t, cond)


def line(flow: Flow, x1: Vector, key: PRNGKey) -> tuple[Vector, Scalar, Vector]:
    """Returns (x_t [d], t [], x1 - x0 [d]) at a random time between a fresh noise x0 and x1."""
    k_x0, k_t = jr.split(key)
    x0, t = flow.noise(k_x0), jr.uniform(k_t, minval=EDGE, maxval=1 - EDGE)
    return t * x1 + (1 - t) * x0, t, x1 - x0


def ends(flow: Flow, cond: Float[Array, "B c"], group: int, key: PRNGKey) -> Float[Array, "B G d"]:
    """Returns `group` ends for each encoded condition, by the flow's own solver."""
    keys = jr.split(key, cond.shape[0])
    return jax.vmap(lambda c, k: flow.particles(c, k, group)[1])(cond, keys)


def followed(state: AlignState, rate: float, cap: float) -> tuple[AlignState, Metrics]:
    """Returns the state whose old flow keeps the share min(cap, rate * iteration) of itself and takes the rest from the
    flow, and that share."""
    kept = jnp.minimum(cap, rate * state.step)
    old = jax.tree.map(lambda old, new: kept * old + (1 - kept) * new, state.old, state.flow)
    return replace(state, old=old), {"kept": kept}


def batches(key: PRNGKey, rows: Any, parts: int) -> Any:
    """Returns the rows [n, ...] in random order, as [parts, n // parts, ...]; a rest is left out."""
    n = jax.tree.leaves(rows)[0].shape[0]
    order = jr.permutation(key, n)[: n // parts * parts].reshape(parts, -1)
    return jax.tree.map(lambda x: x[order], rows)


def flat(scored_rows: Any) -> Any:
    """Returns rows [B, G, ...] as [B G, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), scored_rows)


def repeated(cond: Float[Array, "B c"], group: int) -> Float[Array, "n c"]:
    """Returns the condition of each of B G samples."""
    return jnp.repeat(cond, group, 0)


def descend(
    optim: Optim,
    state: AlignState,
    loss: Callable[[Flow, Any, PRNGKey], tuple[Scalar, Metrics]],
    rows: Any,
    key: PRNGKey,
    parts: int,
) -> tuple[AlignState, Metrics]:
    """Returns the state after one gradient step on each of `parts` shares of the rows [n, ...], and mean metrics."""
    k_order, k_loss = jr.split(key)

    def body(carry, inputs):
        flow, opt = carry
        part, key = inputs
        (value, metrics), grad = jax.value_and_grad(loss, has_aux=True)(flow, part, key)
        updates, opt = optim.tx.update(grad, opt, flow)
        metrics |= {"loss": value, "grad_norm": optax.tree.norm(grad)}
        return (eqx.apply_updates(flow, updates), opt), metrics

    inputs = batches(k_order, rows, parts), jr.split(k_loss, parts)
    (flow, opt), metrics = jax.lax.scan(body, (state.flow, state.opt), inputs)
    return replace(state, flow=flow, opt=opt, step=state.step + 1), jax.tree.map(jnp.mean, metrics)
