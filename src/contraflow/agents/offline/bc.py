"""Imitation of demonstrations by conditional flow matching on chunks of actions; one-step policies too.

    x_t = alpha_t x1 + beta_t x0,   loss |v(x_t, t, s) - (alpha'_t x1 + beta'_t x0)|^2,

x1 the chunk that follows s and x0 ~ N(0, I) (2210.02747; for control Diffusion Policy, 2303.04137). Where the policy
predicts noise, that is regressed on x0 (DDPM, 2006.11239).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, PyTree

from contraflow.core.optim import clipped_adam, start
from contraflow.core.types import Chunks, EnvSpec, Metrics, PRNGKey
from contraflow.flow.coupling import Coupling, Independent
from contraflow.flow.fewstep import Matching, Objective, dispersion
from contraflow.flow.path import Vector
from contraflow.rl.flow_policy import EDGE, FlowPolicy, Network, Obs
from contraflow.rl.normalise import RunningMoments


class BCState(eqx.Module):
    net: Network
    average: Network  # exponential moving average, which acts
    opt: PyTree
    stats: RunningMoments
    step: Int[Array, ""]


@dataclass(frozen=True)
class BC:
    """Per row one evaluation with gradients, and one to three without for the rows that tie steps together."""

    acting: ClassVar[tuple[str, ...]] = ("average", "stats")

    policy: FlowPolicy = FlowPolicy()
    objective: Objective = Matching()
    """Other than `Matching` it needs, and gets, an averaged policy."""
    coupling: Coupling = Independent()
    """Of x0 and x1, for the rows that are matched to the flow."""
    dispersion: float = 0.0
    """Weight of the dispersive loss on the last hidden layer."""
    ema: float = 0.999
    lr: float = 3e-4
    decay_steps: int | None = None
    """Updates over which the rate falls to a tenth; None keeps it."""
    max_grad_norm: float | None = 10.0

    def __post_init__(self):
        if not 0 <= self.ema < 1 or not self.lr > 0:
            raise ValueError(f"BC needs 0 <= ema < 1 and lr > 0, got {self.ema} and {self.lr}")
        if self.objective.averaged != self.policy.averaged:
            object.__setattr__(self, "policy", replace(self.policy, averaged=self.objective.averaged))

    def init(self, key: PRNGKey, spec: EnvSpec) -> BCState:
        """A fresh network for `spec`'s sizes; statistics come from the data."""
        net = self.policy.init(key, spec)
        average = jax.tree.map(jnp.copy, net)
        return BCState(net, average, start(self._tx, net), RunningMoments.start(spec.obs_dim), jnp.zeros((), jnp.int32))

    def act(self, state: BCState, obs: Float[Array, " o"], key: PRNGKey, explore: bool) -> Float[Array, " a"]:
        """The end of the flow from a random x_0, clipped."""
        x0 = jr.normal(key, (state.average.dim,))
        return jnp.clip(self.policy(state.average, x0, state.stats(obs)), -1.0, 1.0)

    def update(self, state: BCState, batch: Chunks, key: PRNGKey) -> tuple[BCState, Metrics]:
        """One gradient step on chunks [B, h a]."""
        obs = jax.vmap(state.stats)(batch.obs)
        k_noise, k_rows, k_spread = jr.split(key, 3)
        keys = jr.split(k_rows, obs.shape[0])
        matched = round(self.objective.share * obs.shape[0])
        x0 = jr.normal(k_noise, batch.action.shape)
        first, weight = self.coupling(x0[:matched], batch.action[:matched], obs[:matched])
        rows = obs, jnp.concatenate([first, x0[matched:]]), batch.action, keys

        def loss_fn(net):
            """(loss, metrics) over all rows."""

            def losses(fn, part):
                error = jax.vmap(fn)(*(x[part] for x in rows))
                square = jnp.sum(batch.valid[part] * error**2, -1) / jnp.maximum(batch.valid[part].sum(-1), 1.0)
                if self.objective.power:
                    square = square * jax.lax.stop_gradient(square + 0.01) ** -self.objective.power
                return square

            flow = losses(partial(self.policy.match_error, net), slice(None, matched))
            loss = jnp.sum(weight * flow)
            metrics = {"matching_loss": flow.mean()}
            if matched < obs.shape[0]:
                tie = partial(self.policy.consistency_error, self.objective, net, state.average)
                tied = losses(tie, slice(matched, None))
                loss, metrics = loss + tied.sum(), metrics | {"tie_loss": tied.mean()}
            loss = loss / obs.shape[0]
            if self.dispersion:
                again = (*rows[:3], jr.split(k_spread, obs.shape[0]))
                spread = dispersion(jax.vmap(lambda *row: self._features(net, *row))(*again))
                loss, metrics = loss + self.dispersion * spread, metrics | {"dispersion": spread}
            return loss, metrics

        (loss, metrics), grad = jax.value_and_grad(loss_fn, has_aux=True)(state.net)
        updates, opt = self._tx.update(grad, state.opt, state.net)
        net = eqx.apply_updates(state.net, updates)
        # The average catches up quickly at first: min(ema, (1 + n) / (10 + n)).
        rate = jnp.minimum(self.ema, (1.0 + state.step) / (10.0 + state.step))
        average = jax.tree.map(lambda a, b: rate * a + (1 - rate) * b, state.average, net)
        metrics |= {"actor_loss": loss, "actor_grad_norm": optax.tree.norm(grad)}
        return BCState(net, average, opt, state.stats, state.step + 1), metrics

    def network(self, state: BCState) -> Network:
        """What others start from."""
        return state.average

    def adopt(self, state: BCState, net: Network, stats: RunningMoments) -> BCState:
        """The state with a trained network in it."""
        return eqx.tree_at(lambda s: (s.net, s.average, s.stats), state, (net, jax.tree.map(jnp.copy, net), stats))

    def _features(self, net: Network, obs: Obs, x0: Vector, x1: Vector, key: PRNGKey) -> Float[Array, " w"]:
        t = jr.uniform(key, minval=EDGE, maxval=1 - EDGE)
        return self.policy.features(net, self.policy.path.perturb(x0, x1, t), t, t, obs)

    @property
    def _tx(self):
        return clipped_adam(self.lr, self.max_grad_norm, self.decay_steps)
