"""PPO on the noisy steps of a flow policy: Flow-SDE (pi_RL, arXiv 2510.25889) and Flow-CPS (2509.05952).

While exploring, the flow takes K steps of which some are noisy (flow/plan.py), so that each has a density. PPO's ratio
is over these steps, with log-densities summed over the numbers of a chunk. Deployment solves the ODE in K steps.

Flow-SDE has one noisy step at a random place. An update then costs one evaluation instead of K. Its gradient sees the
parameters in that step alone, and is about 1 / K of the full one; Adam hides the factor. ReinFlow, whose noise is
learned, has an agent of its own.
"""

from dataclasses import dataclass, replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.agents.base import Preset, adopted, flow_of
from contraflow.core.optim import Optim, check_positive
from contraflow.core.types import EnvSpec, Metrics, Obs, PRNGKey, Rollout
from contraflow.flow.model import Flow, FlowSpec
from contraflow.flow.path import Linear
from contraflow.flow.plan import CPS, FlowSDE, Noisy, Plan, generate
from contraflow.policy.base import Cost, Policy
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


class PlannedFlow(eqx.Module):
    """A flow whose steps are noisy while exploring."""

    flow: Flow
    plan: Plan = eqx.field(static=True)

    def sample(self, obs: Obs, key: PRNGKey) -> tuple[Float[Array, " a"], Noisy]:
        """Returns an action [a] and the noisy steps that led to it."""
        k_start, k_x0, k_noise = jr.split(key, 3)
        cond = self.flow.encode(obs)
        field = lambda x, t: self.flow.velocity(x, t, cond)
        start = self.plan.start(jnp.zeros((), jnp.int32), k_start)
        end, steps = generate(self.plan, field, self.flow.noise(k_x0, 1), start, k_noise)
        return self.flow.action(end[0]), jax.tree.map(lambda x: x[0], steps)

    def log_ratio(self, obs: Obs, steps: Noisy) -> Float[Array, " w"]:
        """Returns log p(x_{k+1} | x_k) - log p_old(x_{k+1} | x_k) of the noisy steps."""
        cond = self.flow.encode(obs)
        field = lambda x, t: self.flow.velocity(x, t, cond)
        mean = jax.vmap(lambda x, k: self.plan.step(field, x, k)[0])(steps.x, steps.k)
        moved = jnp.sum((steps.new - steps.mean) ** 2 - (steps.new - mean) ** 2, -1)
        return moved / (2 * steps.std**2)

    def __call__(self, obs: Obs, key: PRNGKey, greedy: bool = True) -> Float[Array, " a"]:
        if not greedy:
            return self.sample(obs, key)[0]
        return self.flow.action(self.flow.sample(self.flow.noise(key), obs, steps=self.plan.steps))

    @property
    def cost(self) -> Cost:
        return Cost(1, self.plan.steps, 0)


@dataclass(frozen=True)
class FlowPPO:
    """PPO on the noisy steps of a flow (2510.25889).

    Cost: K evaluations per action, and one with gradients per noisy step and row of a minibatch. Raises ValueError for
    a flow that is not a velocity on the linear path, and for a plan with branches or a sweep, which belong to groups.
    """

    flow: FlowSpec = FlowSpec()
    """The flow to improve; a pretrained policy replaces it."""
    plan: Plan = Plan(4, FlowSDE(0.5), window=1, place="random")
    clip: float = 0.2
    ppo: PPOSettings = PPOSettings(
        epochs=4, actor_optim=Optim(4.5e-5, max_grad_norm=10.0), critic_optim=Optim(6.5e-4, max_grad_norm=10.0)
    )

    def __post_init__(self):
        check_positive(self, "clip")
        spec, plan = self.flow, self.plan
        if spec.averaged or spec.predict != "velocity" or not isinstance(spec.path, Linear) or spec.clip is not None:
            raise ValueError("FlowPPO needs a flow that predicts the velocity of the linear path: use FlowSpec()")
        if plan.branches or plan.shared or plan.compress is not None or plan.place == "sweep":
            raise ValueError(
                "FlowPPO has one sample for an observation: leave branches, shared, compress and sweep out"
            )

    @property
    def gamma(self) -> float:
        return self.ppo.gamma

    def init(self, key: PRNGKey, spec: EnvSpec) -> PPOState:
        """Returns fresh networks; `adopt` inserts a pretrained flow."""
        k_flow, k_critic = jr.split(key)
        flow = self.flow.init(k_flow, spec.action_dim, spec.observation, spec.horizon)
        return first_state(self.ppo, PlannedFlow(flow, self.plan), spec, k_critic)

    def policy(self, state: PPOState) -> Policy:
        """Returns the end of a noisy chain, or of the ODE in evaluation."""
        return normalised(state.stats, state.actor)

    def update(self, state: PPOState, rollout: Rollout, key: PRNGKey) -> tuple[PPOState, Metrics]:
        """Makes the passes over one rollout [T, N]."""
        return improve(self.ppo, state, rollout, key, self._surrogate)

    def starting_from(self, policy: Policy) -> "FlowPPO":
        """Returns the settings with the flow of a pretrained policy."""
        flow, stats = flow_of(policy, self)
        mode = pretrained_mode(self.ppo.normalise_obs, stats)
        return replace(self, flow=flow.spec, ppo=replace(self.ppo, normalise_obs=mode))

    def adopt(self, state: PPOState, policy: Policy) -> PPOState:
        """Returns the state with the networks of a pretrained policy."""
        flow, stats = adopted(self.flow, policy, self)
        return replace(state, actor=replace(state.actor, flow=flow), stats=state.stats if stats is None else stats)

    def _surrogate(self, actor: PlannedFlow, batch: Samples, key: PRNGKey) -> tuple[Float[Array, ""], Metrics]:
        log_ratio = jax.vmap(actor.log_ratio)(batch.obs, batch.extras)
        losses = clipped(log_ratio, jnp.broadcast_to(batch.advantage[:, None], log_ratio.shape), self.clip)
        loss = weighted_mean(losses.mean(1), batch.weight)
        return loss, {"actor_loss": loss} | ratio_metrics(log_ratio, self.clip, batch.weight)


PRESETS = (
    Preset("flow-sde", FlowPPO(), "Flow-SDE (pi_RL)", "2510.25889", "PPO on one noisy step of a flow", "rollout"),
    Preset(
        "flow-cps",
        FlowPPO(plan=Plan(4, CPS(0.5), window=1, place="random")),
        "Flow-CPS",
        "2509.05952",
        "PPO on one noisy step that preserves coefficients",
        "rollout",
    ),
)
