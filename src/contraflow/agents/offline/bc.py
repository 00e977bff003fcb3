"""Imitation of demonstrations by conditional flow matching on chunks of actions, in several steps or in one.

    x_t = alpha_t x1 + beta_t x0,   loss |v(x_t, t, s) - (alpha'_t x1 + beta'_t x0)|^2,

with x1 the chunk that follows s and x0 ~ N(0, I) (2210.02747; for control Diffusion Policy, 2303.04137). A policy that
predicts noise is regressed on x0 (DDPM, 2006.11239).

With `delay_max` the first d ~ U{0..delay_max} actions of a chunk are given: their time is 1, they are not noisy, and
the loss is that of the others. Such a policy can continue a chunk that is being executed (2512.05964).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, PyTree

from contraflow.agents.base import Preset, adopted, flow_of
from contraflow.core.optim import Optim
from contraflow.core.types import Batch, EnvSpec, Metrics, Obs, PRNGKey, UserError
from contraflow.flow.coupling import Coupling, Independent
from contraflow.flow.fewstep import Matching, Objective, dispersion
from contraflow.flow.matching import consistency_error, matching_error, with_objective
from contraflow.flow.model import EDGE, Flow, FlowSpec
from contraflow.flow.path import Vector
from contraflow.policy.base import Policy
from contraflow.policy.flow import FlowPolicy, solves_velocity
from contraflow.policy.normalise import RunningMoments, normalised
from contraflow.policy.realtime import Prefix, RealTime
from contraflow.rl.normalise import normalise


class BCState(eqx.Module):
    flow: Flow
    average: Flow  # exponential moving average, which acts
    opt: PyTree
    stats: RunningMoments | None  # None for observations with parts
    step: Int[Array, ""]
    horizon: int = eqx.field(static=True)


@dataclass(frozen=True)
class BC:
    """Behaviour cloning with a flow.

    An update takes, per row, one evaluation with gradients, and one to three without for the rows that tie steps
    together.
    """

    flow: FlowSpec = FlowSpec()
    objective: Objective = Matching()
    """Any objective but `Matching` makes the flow an averaged one."""
    coupling: Coupling = Independent()
    """Of x0 and x1, for the rows that are matched to the flow."""
    dispersion: float = 0.0
    """Weight of the dispersive loss on the last hidden layer."""
    drop_condition: float = 0.0
    """Share of the rows that are trained without their condition, for guidance; conditions must be vectors."""
    guidance: float = 1.0
    """Weight of classifier-free guidance when the policy acts; 1 is none."""
    delay_max: int = 0
    """Longest delay, in actions, that the policy can bridge when it resumes a chunk; 0 trains without."""
    ema: float = 0.999
    optim: Optim = Optim(3e-4, max_grad_norm=10.0)

    def __post_init__(self):
        if not 0 <= self.ema < 1 or self.dispersion < 0:
            raise ValueError(f"BC needs 0 <= ema < 1 and dispersion >= 0, got {self.ema} and {self.dispersion}")
        if not 0 <= self.drop_condition < 1:
            raise ValueError(f"drop_condition must lie in [0, 1), got {self.drop_condition}")
        if self.guidance != 1.0 and not self.drop_condition:
            raise ValueError(
                "guidance needs a flow that also knows no condition: set drop_condition, to .1 for instance"
            )
        plain = self.objective == Matching() and self.coupling == Independent() and solves_velocity(self.flow)
        if self.delay_max < 0 or (self.delay_max and (self.drop_condition or not plain)):
            raise ValueError(
                "delay_max must not be negative, and needs a velocity on the linear path that is solved without noise, "
                "the objective Matching, the coupling Independent and no drop_condition"
            )
        object.__setattr__(self, "flow", with_objective(self.flow, self.objective))

    def init(self, key: PRNGKey, spec: EnvSpec) -> BCState:
        """Returns a fresh flow for the sizes of `spec`. Statistics come from the data; parts are not normalised.

        Raises UserError for a delay as long as a chunk, and for conditions that are dropped but not vectors.
        """
        if self.delay_max and self.delay_max >= spec.horizon:
            raise UserError(f"delay_max {self.delay_max} leaves nothing of a chunk of {spec.horizon}: use --horizon")
        if self.drop_condition and spec.obs_parts:
            raise UserError("drop_condition takes vectors, and these observations have parts: set it to 0")
        flow = self.flow.init(key, spec.action_dim, spec.observation, spec.horizon)
        stats, step = None if spec.obs_parts else RunningMoments.start(spec.obs_dim), jnp.zeros((), jnp.int32)
        return BCState(flow, jax.tree.map(jnp.copy, flow), self.optim.init(flow), stats, step, spec.horizon)

    def policy(self, state: BCState) -> Policy:
        """Returns the end of the averaged flow from a random x_0, which can resume chunks if trained for delays."""
        flow = replace(state.average, spec=replace(state.average.spec, guidance=self.guidance))
        policy = normalised(state.stats, FlowPolicy(flow))
        return RealTime(policy, Prefix(self.delay_max)) if self.delay_max else policy

    def update(self, state: BCState, batch: Batch, key: PRNGKey) -> tuple[BCState, Metrics]:
        """Makes one gradient step on chunks [B, h a]. Of the batch it reads only `obs`, `action` and `mask`."""
        cond = jax.vmap(partial(normalise, state.stats))(batch.obs)
        k_noise, k_rows, k_spread, k_drop, k_delay = jr.split(key, 5)
        n = batch.action.shape[0]
        if self.drop_condition:
            cond = jnp.where(jr.bernoulli(k_drop, self.drop_condition, (n, 1)), 0.0, cond)
        matched = round(self.objective.share * n)
        x1 = self.flow.support.latent(batch.action)
        x0 = state.flow.noise(k_noise, n)
        first, weight = self.coupling(x0[:matched], x1[:matched], jax.tree.map(lambda x: x[:matched], cond))
        mask, given = batch.mask, None
        if self.delay_max:
            delay = jr.randint(k_delay, (n, 1), 0, self.delay_max + 1)
            given = jnp.arange(state.horizon)[None] < delay
            mask = mask * ~jnp.repeat(given, x1.shape[1] // state.horizon, axis=1)
        rows = cond, jnp.concatenate([first, x0[matched:]]), x1, jr.split(k_rows, n), given

        def loss_fn(flow):
            """Returns (loss, metrics) over all rows."""

            def losses(fn, part):
                error = jax.vmap(fn)(*jax.tree.map(lambda x: x[part], rows))
                square = jnp.sum(mask[part] * error**2, -1) / jnp.maximum(mask[part].sum(-1), 1.0)
                if self.objective.power:
                    square = square * jax.lax.stop_gradient(square + 0.01) ** -self.objective.power
                return square

            def match(cond, x0, x1, key, given):
                t = jr.uniform(key, minval=EDGE, maxval=1 - EDGE)
                return matching_error(flow, cond, x0, x1, t if given is None else jnp.where(given, 1.0, t))

            def tie(cond, x0, x1, key, given):
                keys = jr.split(key)
                return consistency_error(self.objective, flow, state.average, cond, x0, x1, *keys, velocity=x1 - x0)

            matching = losses(match, slice(None, matched))
            loss = jnp.sum(weight * matching)
            metrics = {"matching_loss": matching.mean()}
            if matched < n:
                tied = losses(tie, slice(matched, None))
                loss, metrics = loss + tied.sum(), metrics | {"tie_loss": tied.mean()}
            loss = loss / n
            if self.dispersion:
                again = (*rows[:3], jr.split(k_spread, n))
                spread = dispersion(jax.vmap(partial(_features, flow))(*again))
                loss, metrics = loss + self.dispersion * spread, metrics | {"dispersion": spread}
            return loss, metrics

        params: Any = state.flow
        (loss, metrics), grad = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt = self.optim.tx.update(grad, state.opt, params)
        flow = eqx.apply_updates(params, updates)
        # The average catches up quickly at first: min(ema, (1 + n) / (10 + n)).
        rate = jnp.minimum(self.ema, (1.0 + state.step) / (10.0 + state.step))
        average = jax.tree.map(lambda a, b: rate * a + (1 - rate) * b, state.average, flow)
        metrics |= {"actor_loss": loss, "actor_grad_norm": optax.tree.norm(grad)}
        return replace(state, flow=flow, average=average, opt=opt, step=state.step + 1), metrics

    def starting_from(self, policy: Policy) -> "BC":
        """Returns the settings with the flow of a pretrained policy."""
        return replace(self, flow=replace(flow_of(policy, self)[0].spec, guidance=1.0))

    def adopt(self, state: BCState, policy: Policy) -> BCState:
        """Returns the state with the networks of a pretrained policy."""
        flow, stats = adopted(self.flow, policy, self)
        average = jax.tree.map(jnp.copy, flow)
        return replace(state, flow=flow, average=average, stats=state.stats if stats is None else stats)


def _features(flow: Flow, cond: Obs, x0: Vector, x1: Vector, key: PRNGKey) -> Float[Array, " w"]:
    t = jr.uniform(key, minval=EDGE, maxval=1 - EDGE)
    return flow.features(flow.spec.path.perturb(x0, x1, t), t, cond)


PRESETS = (Preset("bc", BC(), "Behaviour cloning with a flow", "2303.04137", "imitation of demonstrations", "dataset"),)
