"""Reverse flow matching (arXiv 2601.08136) with a pretrained flow as prior: posterior means of p_ref exp(r / lambda).

Let u_1 ... u_n be draws of x_1 given x_t under the reference, w_i = exp(r(u_i) / lambda), and D = x_t + (1 - t) v_ref
the mean of such draws. The reference times exp(r / lambda) has at x_t, up to a constant, the density p_ref(x_t) E[w],
and there the posterior mean

    E[w x_1] / E[w] = D + cov(w, x_1) / E[w],

with expectations under the reference given x_t. The draws come from the memoryless process of the reference, simulated
from x_t to t = 1: its joint distribution of (x_t, x_1) is that of noising, so its ends are distributed as x_1 given
x_t. The predicted x_1 is regressed on

    D + n / (n - 1) sum_i w_i (u_i - mean u) / sum_i w_i    with the weight sum_i w_i.

With this weight the optimum is exact for every n >= 2, because numerator and denominator have the right expectations.
Equal weights, as in RFM, have a bias of 1 / n. Where the reward does not vary over the draws, the target is D itself,
without noise and without the error of finite steps.

Targets depend on the reference alone. They are kept, and each is used many times. Only rewards are needed, no gradient.
"""

from dataclasses import dataclass, replace
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int

from contraflow.agents.align.base import (
    AlignState,
    Draws,
    Scored,
    checked_flow,
    encoded,
    field,
    first_state,
    flat,
    policy_of,
    repeated,
    with_pretrained,
)
from contraflow.agents.base import Preset, flow_of
from contraflow.core.optim import Optim, check_positive
from contraflow.core.types import EnvSpec, Metrics, PRNGKey
from contraflow.flow.matching import posterior_error, square
from contraflow.flow.model import EDGE, Flow, FlowSpec
from contraflow.flow.path import Scalar, Vector
from contraflow.flow.plan import Ancestral, Field
from contraflow.policy.base import Policy


class Points(eqx.Module):
    """N states of the path, the estimates of E[x_1 | x_t] there, and log mean_i w_i."""

    cond: Float[Array, "N c"]
    x: Float[Array, "N d"]
    t: Float[Array, " N"]
    mean: Float[Array, "N d"]
    log_weight: Float[Array, " N"]


class Memory(eqx.Module):
    """The last points, in a ring; `count` were ever written."""

    points: Points
    count: Int[Array, ""]

    def add(self, points: Points) -> "Memory":
        """Returns the memory with the oldest points replaced."""
        size, new = self.points.t.shape[0], points.t.shape[0]
        place = (self.count + jnp.arange(new)) % size
        return Memory(jax.tree.map(lambda old, x: old.at[place].set(x), self.points, points), self.count + new)

    def draw(self, key: PRNGKey, n: int) -> Points:
        """Returns n random points."""
        rows = jr.randint(key, (n,), 0, jnp.minimum(self.count, self.points.t.shape[0]))
        return jax.tree.map(lambda x: x[rows], self.points)


def candidates(reference: Field, x: Vector, t: Scalar, n: int, steps: int, key: PRNGKey) -> Float[Array, "n d"]:
    """Returns n draws of x_1 given x_t under the memoryless process of a field, in `steps` equal steps from t to 1."""
    step, h = Ancestral(1.0), (1.0 - t) / steps

    def one(x, key):
        def body(x, inputs):
            k, noise = inputs
            now = t + k * h
            # Rounding may carry the end of the last step beyond 1.
            mean, std = step(x, reference(x, now), now, jnp.minimum(h, 1.0 - now))
            return mean + std * noise, None

        return jax.lax.scan(body, x, (jnp.arange(steps), jr.normal(key, (steps, *x.shape))))[0]

    return jax.vmap(one, (None, 0))(x, jr.split(key, n))


def estimate(ends: Float[Array, "n d"], log_w: Float[Array, " n"], mean: Vector) -> tuple[Vector, Scalar, Scalar]:
    """Returns the estimate of E[w x_1] / E[w] [d], log mean_i w_i and the effective share of the draws, in [1 / n, 1].

    `mean` [d] is that of the draws' distribution.
    """
    n, w = ends.shape[0], jax.nn.softmax(log_w)
    shift = n / (n - 1) * (w @ ends - jnp.mean(ends, 0))
    return mean + shift, jax.nn.logsumexp(log_w) - jnp.log(n), 1.0 / (n * jnp.sum(w**2))


@dataclass(frozen=True)
class RFMAlign:
    """A flow regressed on posterior means of the reference times exp(r / lambda).

    Cost of a sample, which is a candidate: `draws` evaluations of the reference. Each x_t takes those of the solver for
    the flow and for the reference, and one more. An iteration takes `updates` gradient steps. Raises ValueError for
    values out of range.
    """

    flow: FlowSpec = FlowSpec()
    """The flow to align; a pretrained policy replaces it."""
    temperature: float = 0.1
    """lambda, in units of reward."""
    particles: int = 8
    """n, candidates for each x_t. A group consists of group / n states x_t."""
    draws: int = 30
    """Steps of the memoryless process from x_t to t = 1. Few steps make candidates too much alike: between Gaussians
    their variance is short by about 3.5 / draws of itself, and the tilt within a mode by as much."""
    own: float = 0.5
    """Share of the x_t that are noised samples of the flow; the others are noised samples of the reference."""
    weight: Literal["sum", "equal"] = "sum"
    """Weights of the points; "equal" is RFM's."""
    memory: int = 8192
    """Points that are kept."""
    batch: int = 256
    """Points of a gradient step."""
    updates: int = 8
    """Gradient steps of an iteration."""
    ema: float = 0.0
    """Decay of an average of the weights over gradient steps, which then is the policy; 0 takes the weights
    themselves. Their noise is what is left of the error where candidates are many."""
    optim: Optim = Optim(3e-4, max_grad_norm=1.0)

    needs = "conditions"

    def __post_init__(self):
        check_positive(self, "temperature", "draws", "memory", "batch", "updates")
        if self.particles < 2:
            raise ValueError(f"rfm-align compares particles: give at least 2 for each x_t, got {self.particles}")
        if not 0 <= self.own <= 1:
            raise ValueError(f"own must lie in [0, 1], got {self.own}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is what an average keeps of itself, in [0, 1), got {self.ema}")

    @property
    def leaves(self) -> int:
        """Samples that share an x_t."""
        return self.particles

    def init(self, key: PRNGKey, spec: EnvSpec) -> AlignState:
        """Returns fresh networks, which `adopt` replaces, and an empty memory."""
        n, d = self.memory, spec.action_dim
        c = jnp.zeros((n, spec.obs_dim))
        points = Points(c, jnp.zeros((n, d)), jnp.zeros(n), jnp.zeros((n, d)), jnp.zeros(n))
        memory = Memory(points, jnp.zeros((), jnp.int32))
        return first_state(self.flow, self.optim, key, spec, old=self.ema > 0, extra=memory)

    def policy(self, state: AlignState) -> Policy:
        """Returns the end of the flow, or of its average, from random noise."""
        return policy_of(state if state.old is None else replace(state, flow=state.old))

    def starting_from(self, policy: Policy) -> "RFMAlign":
        """Returns the settings with the flow of a pretrained policy."""
        return replace(self, flow=checked_flow(flow_of(policy, self)[0].spec, "rfm-align"))

    def adopt(self, state: AlignState, policy: Policy) -> AlignState:
        """Returns the state with the networks of a pretrained policy."""
        return with_pretrained(state, self.flow, policy, self)

    def explore(self, state: AlignState, cond: Float[Array, "B c"], group: int, key: PRNGKey) -> Draws:
        """Returns the candidates of group / n states x_t for each condition; `extras` are (x_t, t, D),
        [B, G / n, ...]."""
        queries = group // self.particles

        def one(cond, key):
            k_t, k_own, k_x1, k_x0, k_draw = jr.split(key, 5)
            t = jr.uniform(k_t, minval=EDGE, maxval=1.0 - EDGE)
            start = state.flow.noise(k_x1)
            mine, other = (flow.sample(start, cond, jr.fold_in(k_x1, 1)) for flow in (state.flow, state.reference))
            x1 = jnp.where(jr.bernoulli(k_own, self.own), mine, other)
            x = t * x1 + (1.0 - t) * state.flow.noise(k_x0)
            reference = field(state.reference, cond)
            ends = candidates(reference, x, t, self.particles, self.draws, k_draw)
            return ends, x, t, x + (1.0 - t) * reference(x, t)

        seen = repeated(encoded(state, cond), queries)
        found = jax.vmap(one)(seen, jr.split(key, seen.shape[0]))
        ends, *more = (y.reshape(cond.shape[0], queries, *y.shape[1:]) for y in found)
        return Draws(ends.reshape(cond.shape[0], queries * self.particles, -1), tuple(more))

    def update(self, state: AlignState, scored: Scored, key: PRNGKey) -> tuple[AlignState, Metrics]:
        """Adds the new points to the memory and makes gradient steps on random ones."""
        x, t, before = flat(scored.draws.extras)
        split = lambda y: y.reshape(t.shape[0], self.particles, *y.shape[2:])
        log_w = split(scored.reward @ jnp.asarray(scored.weights)) / self.temperature
        mean, log_weight, ess = jax.vmap(estimate)(split(scored.draws.end), log_w, before)
        cond = repeated(encoded(state, scored.cond), t.shape[0] // scored.cond.shape[0])
        memory = state.extra.add(Points(cond, x, t, mean, log_weight))

        def loss(flow: Flow, points: Points):
            errors = jax.vmap(lambda *row: square(posterior_error(flow, *row)))
            found = errors(points.cond, points.mean, points.x, points.t)
            return jnp.mean(self.weights(memory, points) * found)

        # The average catches up quickly at first.
        done = state.step * self.updates + jnp.arange(self.updates)
        kept = jnp.minimum(self.ema, (1.0 + done) / (10.0 + done))

        def body(carry, inputs):
            flow, opt, old = carry
            key, kept = inputs
            value, grad = jax.value_and_grad(loss)(flow, memory.draw(key, self.batch))
            updates, opt = self.optim.tx.update(grad, opt, flow)
            flow = eqx.apply_updates(flow, updates)
            old = None if old is None else jax.tree.map(lambda a, b: kept * a + (1 - kept) * b, old, flow)
            return (flow, opt, old), {"loss": value, "grad_norm": optax.tree.norm(grad)}

        first, inputs = (state.flow, state.opt, state.old), (jr.split(key, self.updates), kept)
        (flow, opt, old), metrics = jax.lax.scan(body, first, inputs)
        metrics = jax.tree.map(jnp.mean, metrics) | {"ess": jnp.mean(ess)}
        return replace(state, flow=flow, opt=opt, old=old, step=state.step + 1, extra=memory), metrics

    def weights(self, memory: Memory, points: Points) -> Float[Array, " N"]:
        """Returns the weights of points, with mean 1 over the memory."""
        if self.weight == "equal":
            return jnp.ones_like(points.t)
        size = memory.points.t.shape[0]
        written = jnp.where(jnp.arange(size) < memory.count, memory.points.log_weight, -jnp.inf)
        total = jax.nn.logsumexp(written) - jnp.log(jnp.minimum(memory.count, size))
        return jnp.exp(points.log_weight - total)


PRESETS = (
    Preset(
        "rfm-align", RFMAlign(), "RFM with a pretrained prior", "2601.08136",
        "posterior means of the reference times exp(r / lambda)", "conditions",
    ),
)  # fmt: skip
