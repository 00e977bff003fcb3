"""Flow Q-learning, FQL (arXiv 2502.02538): a one-step policy between a cloned flow and the critic.

    flow      v(x_t, t, s) is matched to the actions of the data: behaviour cloning, without the critic;
    actor     mu(s, z), one evaluation: alpha |mu(s, z) - x_1(s, z)|^2 - Q(s, mu(s, z)), x_1 the end of the flow from z;
    critic    y = r + discount mean_j Q_j(s', mu(s', z')).

The actor is a proximal step in the Wasserstein sense, not an exponential tilt. With Q = g.a it is the flow shifted by
g / w, w = 2 alpha / d. The distillation is a mean over the d coordinates of an action or chunk and Q is not: the same
alpha pulls less for a larger d. Q is divided by the mean of |Q| in the batch, and alpha means the same for all rewards.
`fql-paper` uses Q as it is, as published.

Two newer methods change one part each. The anchor of FAN (2605.01663) is the flow's matching loss with mu(s, z) in
place of the action of the data, at one random t, which saves the steps of the teacher. GFP (2512.03973) clones the rows
with an action better than the actor's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PyTree

from contraflow.agents.base import Preset
from contraflow.core.optim import Optim, check_positive, gradient_step
from contraflow.core.types import Batch, EnvSpec, Metrics, Obs, PRNGKey
from contraflow.flow.matching import matching_error
from contraflow.flow.model import EDGE, Flow, FlowSpec
from contraflow.nets.critic import Mean, QEnsemble
from contraflow.nets.mlp import MLP, MLPSpec
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.base import Cost, Policy
from contraflow.policy.normalise import RunningMoments, normalised
from contraflow.rl.cloning import cloning_loss
from contraflow.rl.critics import Critics
from contraflow.rl.normalise import NormaliseObs, initial_moments, unit_scale, update_and_normalise

OPTIM = Optim(3e-4)


class OneStep(eqx.Module):
    """a = clip(mu(s, z), -1, 1), z ~ N(0, I)."""

    net: MLP

    @property
    def dim(self) -> int:
        return self.net.last.bias.shape[0]

    def mu(self, obs: Obs, z: Float[Array, " d"]) -> Float[Array, " d"]:
        """Returns the action before it is clipped."""
        return self.net(obs, z)

    def from_noise(self, obs: Obs, z: Float[Array, " d"], key: PRNGKey | None = None) -> Float[Array, " d"]:
        """Returns the action of z; needs no key."""
        return jnp.clip(self.mu(obs, z), -1.0, 1.0)

    def __call__(self, obs: Obs, key: PRNGKey, greedy: bool = True) -> Float[Array, " d"]:
        return self.from_noise(obs, jr.normal(key, (self.dim,)))

    @property
    def cost(self) -> Cost:
        return Cost(1, 1, 0)


Actions = Float[Array, "B d"]


def from_end(flow: Flow, obs: Obs, z: Actions, key: PRNGKey) -> Callable[[Actions], Actions]:
    """Returns the error mu -> mu - x_1(s, z), x_1 the end of the flow from z as an action."""
    teacher = flow.action(jax.vmap(flow.sample)(z, obs))
    return lambda mu: mu - teacher


def from_velocity(flow: Flow, obs: Obs, z: Actions, key: PRNGKey) -> Callable[[Actions], Actions]:
    """Returns the error mu -> (mu - z) - v(x_t, t, s), x_t = t mu + (1 - t) z, t ~ U(0, 1) (2605.01663).

    It is 0 for all t if the path from z to mu is one of the flow's. Gradients also flow through x_t. If the paths bend,
    the best mu is not the end of the flow. For data N(m, s^2) and the exact v it is m + (2 / pi) s z.
    """
    t = jr.uniform(key, (z.shape[0],), minval=EDGE, maxval=1 - EDGE)
    return lambda mu: jax.vmap(lambda *row: matching_error(flow, *row))(obs, z, flow.spec.support.latent(mu), t)


ANCHORS = {"end": from_end, "velocity": from_velocity}


class FQLState(eqx.Module):
    flow: Flow
    actor: OneStep
    critic: QEnsemble
    target: QEnsemble
    flow_opt: PyTree
    actor_opt: PyTree
    critic_opt: PyTree
    step: Int[Array, ""]
    stats: RunningMoments | None = None  # of observations; None if they are not normalised


@dataclass(frozen=True)
class FQL:
    """A one-step actor between a cloned flow and the critic.

    An update takes, per row, K + 3 evaluations of the flow, three of the actor and one of each critic and its target.
    The anchor "velocity" takes one evaluation with gradients in place of K, and raises ValueError if the flow predicts
    something else.
    """

    flow: FlowSpec = FlowSpec(network=ResidualMLP(512, 3))
    """The cloned flow. K steps (10) of its solver make the targets of the actor."""
    actor: MLPSpec = MLPSpec(512, 4, "gelu")
    alpha: float = 3.0
    """Weight of the distillation against Q of order one; the paper's authors advise .03 to 10. Without `normalise_q`
    it is 10 to 1000 on OGBench, by task."""
    normalise_q: bool = True
    """Divides Q by the mean of |Q| in the batch, and alpha means the same for all rewards. Off as published."""
    anchor: Literal["end", "velocity"] = "end"
    """Holds the actor to the end of the flow from the same noise, or to its velocity on the way there."""
    guidance: float | None = None
    """Temperature, in units of mean |Q|, of the weights sigmoid((Q'(s, a_data) - Q'(s, mu)) / temperature) of cloned
    rows. None gives all rows the same weight."""
    normalise_obs: NormaliseObs = "off"
    """"frozen" normalises by the moments of the data."""
    critic: Critics = Critics(reduce=Mean(), backup=Mean(), width=512, depth=4, block="normalised", optim=OPTIM)
    optim: Optim = OPTIM
    """Optimiser of the flow and of the actor, each with its own state."""

    def __post_init__(self):
        check_positive(self, "alpha", *(["guidance"] if self.guidance is not None else []))
        if self.anchor == "velocity" and self.flow.predict != "velocity":
            raise ValueError("the anchor 'velocity' needs a flow that predicts it: FlowSpec(predict='velocity')")

    @property
    def gamma(self) -> float:
        return self.critic.gamma

    def init(self, key: PRNGKey, spec: EnvSpec) -> FQLState:
        """Returns fresh networks for the sizes of `spec`; the target critic is a copy of the critic."""
        k_flow, k_actor, k_critic = jr.split(key, 3)
        flow = self.flow.init(k_flow, spec.action_dim, spec.observation, spec.horizon)
        actor = OneStep(self.actor.init(k_actor, spec.observation, spec.action_dim, more=spec.action_dim))
        critic, target, critic_opt = self.critic.init(k_critic, spec)
        opts = self.optim.init(flow), self.optim.init(actor), critic_opt
        stats = initial_moments(self.normalise_obs, spec)
        return FQLState(flow, actor, critic, target, *opts, jnp.zeros((), jnp.int32), stats)

    def policy(self, state: FQLState) -> Policy:
        """Returns the actor, which acts in one evaluation; the same while exploring."""
        return normalised(state.stats, state.actor)

    def update(self, state: FQLState, batch: Batch, key: PRNGKey) -> tuple[FQLState, Metrics]:
        """Makes one step of the critics, the flow and the actor on a batch [B] (2502.02538, algorithm 1)."""
        k_next, k_critic, k_flow, k_actor = jr.split(key, 4)
        n = batch.reward.shape[0]
        stats, batch = update_and_normalise(state.stats, batch, self.normalise_obs)

        # 1. Critic, with a' from the actor.
        action = jax.vmap(state.actor)(batch.next_obs, jr.split(k_next, n))
        critic, target, critic_opt, metrics = self.critic.learn(
            state.critic, state.target, state.critic_opt, batch, action, k_critic
        )

        # 2. Flow: behaviour cloning. Weights use the actor before this update, at the noise that it learns from.
        z, weight = state.flow.noise(k_actor, n), None
        if self.guidance is not None:
            ours = jax.vmap(target.value)(batch.obs, jax.vmap(state.actor.from_noise)(batch.obs, z))
            gap = unit_scale(ours) * (jax.vmap(target.value)(batch.obs, batch.action) - ours)
            weight = jax.lax.stop_gradient(jax.nn.sigmoid(gap / self.guidance))
        flow, flow_opt, matching, _ = gradient_step(
            self.optim.tx, lambda flow: cloning_loss(flow, batch, k_flow, weight), state.flow, state.flow_opt
        )

        # 3. Actor: towards the flow from the same noise, and up Q. The flow is that before this update.
        error = ANCHORS[self.anchor](state.flow, batch.obs, z, jr.fold_in(k_actor, 1))

        def actor_loss(actor):
            mu = jax.vmap(actor.mu)(batch.obs, z)
            q = jax.vmap(critic.value)(batch.obs, jnp.clip(mu, -1.0, 1.0))
            scale = unit_scale(q) if self.normalise_q else 1.0
            distillation = jnp.sum(batch.mask * error(mu) ** 2) / jnp.maximum(batch.mask.sum(), 1.0)
            return self.alpha * distillation - scale * q.mean()

        actor, actor_opt, loss, grad_norm = gradient_step(self.optim.tx, actor_loss, state.actor, state.actor_opt)
        metrics |= {"actor_loss": loss, "actor_grad_norm": grad_norm, "matching_loss": matching}
        opts = flow_opt, actor_opt, critic_opt
        return FQLState(flow, actor, critic, target, *opts, state.step + 1, stats), metrics


TITLE, PAPER = "Flow Q-learning", "2502.02538"
PUBLISHED = FQL(alpha=10.0, normalise_q=False)
GUIDED = FQL(guidance=1e-3)
PRESETS = (
    Preset("fql", FQL(), TITLE, PAPER, "a one-step policy beside a cloned flow", "dataset"),
    Preset("fql-paper", PUBLISHED, TITLE, PAPER, "as published: alpha in the unit of returns", "dataset"),
    Preset("gfp", GUIDED, "Guided flow policy", "2512.03973", "fql that clones the better rows", "dataset"),
)
