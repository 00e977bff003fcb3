"""Flow matching policy gradients, FPO (arXiv 2507.21053) and FPO++ (2602.02481): PPO for a flow without likelihoods.

Minus the flow-matching loss of the action, a lower bound, replaces log pi(a | s):

    rho = exp(mean_j l_old,j - mean_j l_new,j),   l_j = w(t_j) |v(x_{t_j}, t_j, s) - (a - eps_j)|^2.

The pairs (t_j, eps_j) are drawn and kept when the action is taken. Noise enters only at x_0. log rho is clipped to +-3,
because one outlier among weighted losses would dominate the gradient or overflow.

FPO++ has a ratio rho_j = exp(l_old,j - l_new,j) for each pair, each in its own trust region. Outside of it, actions
of negative advantage are pulled back (ASPO), not left without a gradient. FPO++ caps losses and evaluates from x_0 = 0.
"""

from dataclasses import dataclass, replace
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.agents.base import Preset, adopted, flow_of
from contraflow.core.optim import Optim, check_positive
from contraflow.core.types import EnvSpec, Metrics, Obs, PRNGKey, Rollout
from contraflow.flow.matching import matching_error
from contraflow.flow.model import EDGE, Flow, FlowSpec
from contraflow.flow.path import Linear
from contraflow.policy.base import Cost, Policy
from contraflow.policy.flow import FlowPolicy
from contraflow.policy.normalise import normalised
from contraflow.rl.normalise import pretrained_mode
from contraflow.rl.ppo import (
    PPOSettings,
    PPOState,
    Samples,
    clipped,
    first_state,
    improve,
    ratio_metrics,
    weighted_mean,
)

CUT = 3.0
Weight = Literal["noise", "velocity", "elbo"]
Ratio = Literal["mean", "sum"]
Trust = Literal["clip", "aspo"]


class Draw(eqx.Module):
    """Data kept from acting: the end of the flow, the pairs and their losses."""

    end: Float[Array, "*batch a"]
    t: Float[Array, "*batch M"]
    noise: Float[Array, "*batch M a"]
    loss: Float[Array, "*batch M"]


class MatchedFlow(eqx.Module):
    """A flow that records the matching losses of its actions."""

    flow: Flow
    pairs: int = eqx.field(static=True)
    weight: Weight = eqx.field(static=True)
    ratio: Ratio = eqx.field(static=True)
    cap: float | None = eqx.field(static=True, default=None)
    zero_start: bool = eqx.field(static=True, default=False)

    def losses(
        self, obs: Obs, end: Float[Array, " a"], t: Float[Array, " M"], noise: Float[Array, "M a"]
    ) -> Float[Array, " M"]:
        """Returns the losses l_j [M] of the pairs (t_j, noise_j)."""
        size = 1 if self.ratio == "mean" else end.shape[0]

        def one(t, x0):
            weight = {"noise": t**2, "velocity": 1.0, "elbo": t / (1.0 - t)}[self.weight]
            error = jnp.mean(matching_error(self.flow, obs, x0, end, t) ** 2)
            return weight * size * (error if self.cap is None else jnp.minimum(error, self.cap))

        return jax.vmap(one)(t, noise)

    def sample(self, obs: Obs, key: PRNGKey) -> tuple[Float[Array, " a"], Draw]:
        """Returns an action [a], and pairs with their losses."""
        k_solve, k_t, k_noise = jr.split(key, 3)
        end = self.flow.sample(self.flow.noise(k_solve), obs, jr.fold_in(k_solve, 1))
        t = jr.uniform(k_t, (self.pairs,), minval=EDGE, maxval=1.0 - EDGE)
        noise = self.flow.noise(k_noise, self.pairs)
        return self.flow.action(end), Draw(end, t, noise, self.losses(obs, end, t, noise))

    def __call__(self, obs: Obs, key: PRNGKey, greedy: bool = True) -> Float[Array, " a"]:
        if greedy and self.zero_start:
            return FlowPolicy(self.flow).from_noise(obs, jnp.zeros(self.flow.dim), key)
        return FlowPolicy(self.flow)(obs, key)

    @property
    def cost(self) -> Cost:
        return FlowPolicy(self.flow).cost


@dataclass(frozen=True)
class FPO:
    """PPO with matching losses in place of log-densities (2507.21053, 2602.02481).

    Cost: the flow's evaluations + `pairs` per action, and `pairs` with gradients per row of a minibatch. Raises
    ValueError for values that are not positive and for a flow that is not a velocity on the linear path.
    """

    flow: FlowSpec = FlowSpec()
    """The flow to improve; a pretrained policy replaces it."""
    pairs: int = 8
    weight: Weight = "noise"
    """w(t): t^2, the error of the predicted noise (as released); 1; or t / (1 - t), a bound on the log-density."""
    ratio: Ratio = "mean"
    """Averages squared errors over coordinates (`mean`, as released) or sums them (`sum`, a true bound)."""
    per_pair: bool = False
    """One ratio for each pair (2602.02481, eq. 10), not one of the mean loss."""
    trust: Trust = "clip"
    """PPO's clip, or `aspo`, which penalises (rho - 1)^2 where the advantage is negative (2602.02481, eq. 12)."""
    cap: float | None = None
    """Largest squared error per coordinate; a pair beyond it has no gradient."""
    zero_start: bool = False
    """Evaluates and deploys from x_0 = 0 (zero-sampling); a deterministic policy."""
    clip: float = 0.05
    ppo: PPOSettings = PPOSettings(gamma=0.995)

    def __post_init__(self):
        check_positive(self, "pairs", "clip", *(["cap"] if self.cap is not None else []))
        spec = self.flow
        if spec.averaged or spec.predict != "velocity" or not isinstance(spec.path, Linear):
            raise ValueError("FPO needs a flow that predicts the velocity of the linear path: use FlowSpec()")

    @property
    def gamma(self) -> float:
        return self.ppo.gamma

    def init(self, key: PRNGKey, spec: EnvSpec) -> PPOState:
        """Returns fresh networks; `adopt` inserts a pretrained flow."""
        k_flow, k_critic = jr.split(key)
        flow = self.flow.init(k_flow, spec.action_dim, spec.observation, spec.horizon)
        actor = MatchedFlow(flow, self.pairs, self.weight, self.ratio, self.cap, self.zero_start)
        return first_state(self.ppo, actor, spec, k_critic)

    def policy(self, state: PPOState) -> Policy:
        """Returns the end of the ODE from a random x_0, or from 0 in evaluation with `zero_start`."""
        return normalised(state.stats, state.actor)

    def update(self, state: PPOState, rollout: Rollout, key: PRNGKey) -> tuple[PPOState, Metrics]:
        """Makes the passes over one rollout [T, N]."""
        return improve(self.ppo, state, rollout, key, self._surrogate)

    def starting_from(self, policy: Policy) -> "FPO":
        """Returns the settings with the flow of a pretrained policy."""
        flow, stats = flow_of(policy, self)
        mode = pretrained_mode(self.ppo.normalise_obs, stats)
        return replace(self, flow=flow.spec, ppo=replace(self.ppo, normalise_obs=mode))

    def adopt(self, state: PPOState, policy: Policy) -> PPOState:
        """Returns the state with the networks of a pretrained policy."""
        flow, stats = adopted(self.flow, policy, self)
        return replace(state, actor=replace(state.actor, flow=flow), stats=state.stats if stats is None else stats)

    def _surrogate(self, actor: MatchedFlow, batch: Samples, key: PRNGKey) -> tuple[Float[Array, ""], Metrics]:
        draw = batch.extras
        new = jax.vmap(actor.losses)(batch.obs, draw.end, draw.t, draw.noise)
        fall = draw.loss - new if self.per_pair else draw.loss.mean(1, keepdims=True) - new.mean(1, keepdims=True)
        log_ratio = jnp.clip(fall, -CUT, CUT)
        advantage = jnp.broadcast_to(batch.advantage[:, None], log_ratio.shape)
        losses = (aspo if self.trust == "aspo" else clipped)(log_ratio, advantage, self.clip)
        loss = weighted_mean(losses.mean(1), batch.weight)
        metrics = {"actor_loss": loss, "matching_loss": new.mean()}
        return loss, metrics | ratio_metrics(log_ratio, self.clip, batch.weight)


def aspo(log_ratio: Float[Array, "*s"], advantage: Float[Array, "*s"], clip: float) -> Float[Array, "*s"]:
    """Returns the asymmetric surrogate to minimise (2602.02481, eq. 12), rho = exp(log_ratio).

    It is PPO's for A >= 0. For A < 0 it is SPO's, |A| [rho + (rho - 1)^2 / (2 clip)], least at rho = 1 - clip: an
    action that became less likely than that is pulled back.
    """
    ratio = jnp.exp(log_ratio)
    spo = jnp.abs(advantage) * (ratio + (ratio - 1.0) ** 2 / (2.0 * clip))
    return jnp.where(advantage < 0, spo, clipped(log_ratio, advantage, clip))


PRESETS = (
    Preset("fpo", FPO(), "Flow matching policy gradients", "2507.21053", "PPO on matching losses", "rollout"),
    Preset(
        "fpo++",
        FPO(
            pairs=16,
            weight="velocity",
            ratio="sum",
            per_pair=True,
            trust="aspo",
            cap=5.0,
            zero_start=True,
            ppo=PPOSettings(
                epochs=16,
                minibatches=4,
                actor_optim=Optim(1e-4, max_grad_norm=10.0),
                critic_optim=Optim(1e-4, max_grad_norm=10.0),
            ),
        ),
        "FPO++",
        "2602.02481",
        "FPO with a trust region for each pair",
        "rollout",
    ),
)
