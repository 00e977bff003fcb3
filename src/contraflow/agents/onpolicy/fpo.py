"""Flow matching policy gradients, FPO (arXiv 2507.21053): PPO for a flow policy without likelihoods.

In place of log pi(a | s) stands minus the flow-matching loss of the action taken, which bounds it from below:

    rho = exp(mean_j l_old,j - mean_j l_new,j),   l_j = w(t_j) |v(x_{t_j}, t_j, s) - (a - eps_j)|^2,

with pairs (t_j, eps_j) drawn when the action is taken and kept. Noise enters at x_0 only. log rho is cut at +-3: one
outlier among weighted losses would own the gradient, or overflow.
"""

from dataclasses import dataclass, replace
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.agents.base import Preset, adopted, flow_of
from contraflow.core.optim import check_positive
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


class Draw(eqx.Module):
    """What acting remembers: the end of the flow, the pairs and their losses."""

    end: Float[Array, "*batch a"]
    t: Float[Array, "*batch M"]
    noise: Float[Array, "*batch M a"]
    loss: Float[Array, "*batch M"]


class MatchedFlow(eqx.Module):
    """A flow that keeps matching losses of its actions."""

    flow: Flow
    pairs: int = eqx.field(static=True)
    weight: Weight = eqx.field(static=True)
    ratio: Ratio = eqx.field(static=True)

    def losses(
        self, obs: Obs, end: Float[Array, " a"], t: Float[Array, " M"], noise: Float[Array, "M a"]
    ) -> Float[Array, " M"]:
        """l_j of the pairs (t_j, noise_j)."""
        reduce = jnp.mean if self.ratio == "mean" else jnp.sum

        def one(t, x0):
            weight = {"noise": t**2, "velocity": 1.0, "elbo": t / (1.0 - t)}[self.weight]
            return weight * reduce(matching_error(self.flow, obs, x0, end, t) ** 2)

        return jax.vmap(one)(t, noise)

    def sample(self, obs: Obs, key: PRNGKey) -> tuple[Float[Array, " a"], Draw]:
        """An action, and pairs with their losses."""
        k_solve, k_t, k_noise = jr.split(key, 3)
        end = self.flow.sample(self.flow.noise(k_solve), obs, jr.fold_in(k_solve, 1))
        t = jr.uniform(k_t, (self.pairs,), minval=EDGE, maxval=1.0 - EDGE)
        noise = self.flow.noise(k_noise, self.pairs)
        return self.flow.action(end), Draw(end, t, noise, self.losses(obs, end, t, noise))

    def __call__(self, obs: Obs, key: PRNGKey, greedy: bool = True) -> Float[Array, " a"]:
        return FlowPolicy(self.flow)(obs, key)

    @property
    def cost(self) -> Cost:
        return FlowPolicy(self.flow).cost


@dataclass(frozen=True)
class FPO:
    """Per action the flow's evaluations + `pairs`; per row of a minibatch `pairs`, with gradients."""

    flow: FlowSpec = FlowSpec()
    """The flow to improve: that of the pretrained policy, where one is given."""
    pairs: int = 8
    weight: Weight = "noise"
    """w(t): t^2, the error of the predicted noise (as released); 1; or t / (1 - t), a bound of the log-density."""
    ratio: Ratio = "mean"
    """Squared errors are averaged over coordinates (as released) or summed (a true bound)."""
    clip: float = 0.05
    ppo: PPOSettings = PPOSettings(gamma=0.995)

    def __post_init__(self):
        check_positive(self, "pairs", "clip")
        spec = self.flow
        if spec.averaged or spec.predict != "velocity" or not isinstance(spec.path, Linear):
            raise ValueError("FPO's loss is that of a velocity on the linear path: use such a flow")

    @property
    def gamma(self) -> float:
        return self.ppo.gamma

    def init(self, key: PRNGKey, spec: EnvSpec) -> PPOState:
        """Fresh networks; `adopt` puts a trained flow in."""
        k_flow, k_critic = jr.split(key)
        flow = self.flow.init(k_flow, spec.action_dim, spec.observation, spec.horizon)
        return first_state(self.ppo, MatchedFlow(flow, self.pairs, self.weight, self.ratio), spec, k_critic)

    def policy(self, state: PPOState) -> Policy:
        """The end of the ODE from a random x_0; the same in training and evaluation."""
        return normalised(state.stats, state.actor)

    def update(self, state: PPOState, rollout: Rollout, key: PRNGKey) -> tuple[PPOState, Metrics]:
        """Passes over one rollout [T, N]."""
        return improve(self.ppo, state, rollout, key, self._surrogate)

    def starting_from(self, policy: Policy) -> "FPO":
        """The settings with the flow of a pretrained policy."""
        flow, stats = flow_of(policy, self)
        mode = pretrained_mode(self.ppo.normalise_obs, stats)
        return replace(self, flow=flow.spec, ppo=replace(self.ppo, normalise_obs=mode))

    def adopt(self, state: PPOState, policy: Policy) -> PPOState:
        """The state with the networks of a pretrained policy."""
        flow, stats = adopted(self.flow, policy, self)
        return replace(state, actor=replace(state.actor, flow=flow), stats=state.stats if stats is None else stats)

    def _surrogate(self, actor: MatchedFlow, batch: Samples, key: PRNGKey) -> tuple[Float[Array, ""], Metrics]:
        draw = batch.extras
        new = jax.vmap(actor.losses)(batch.obs, draw.end, draw.t, draw.noise)
        log_ratio = jnp.clip(draw.loss.mean(1) - new.mean(1), -CUT, CUT)
        loss = weighted_mean(clipped(log_ratio, batch.advantage, self.clip), batch.weight)
        metrics = {"actor_loss": loss, "matching_loss": new.mean()}
        return loss, metrics | ratio_metrics(log_ratio, self.clip, batch.weight)


PRESETS = (Preset("fpo", FPO(), "Flow matching policy gradients", "2507.21053", "PPO on matching losses", "rollout"),)
