"""Diffusion-QL, DQL (arXiv 2208.06193): a diffusion policy of few steps that climbs Q through all of them.

    actor     |eps(s, x_t, t) - x_0|^2 - eta Q_i(s, a) / sg mean|Q_j(s, a)|,   a the end of the sampler, with gradients;
    critics   y = r + discount min_j Q_j(s', a'),   a' from a moving average of the actor;
    acting    one of 50 draws, with probability softmax(min_j Q_j) of the slow critics.

t is one of the K levels 0, 1/K, ..., (K - 1)/K of the sampler. i and j are two different critics, drawn for each
update. The division makes the gradient the same for all scales of Q. The choice among 50 is in the released code, not
in the paper. Its temperature is in units of Q, and for large values it is an argmax.
"""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, Key, PyTree

from contraflow.agents.base import Preset
from contraflow.core.optim import Optim, check_positive, gradient_step
from contraflow.core.types import Batch, EnvSpec, Metrics, PRNGKey
from contraflow.flow.matching import matching_error
from contraflow.flow.model import Ddpm, Flow, FlowSpec
from contraflow.flow.path import VP, Scalar
from contraflow.nets.critic import QEnsemble
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.base import Policy
from contraflow.policy.best_of import BestOf, Selector, Softmax
from contraflow.policy.flow import FlowPolicy
from contraflow.policy.normalise import RunningMoments, normalised
from contraflow.rl.critics import Critics, follow
from contraflow.rl.normalise import NormaliseObs, initial_moments, unit_scale, update_and_normalise

DIFFUSION = FlowSpec(
    path=VP(0.1, 10.0), predict="noise", solver=Ddpm(5), clip=1.0, network=ResidualMLP(256, 3, 32)
)  # fmt: skip


class DQLState(eqx.Module):
    actor: Flow
    average: Flow  # moving average of the actor, for targets
    critic: QEnsemble
    target: QEnsemble
    temperature: Float[Array, ""]  # of the choice among candidates
    actor_opt: PyTree
    critic_opt: PyTree
    step: Int[Array, ""]
    stats: RunningMoments | None = None  # of observations; None if they are not normalised


@dataclass(frozen=True)
class DQL:
    """A diffusion policy that is cloned and climbs Q through its K steps.

    An update takes, per row, `backup` K + 1 + K evaluations of the actor, 1 + K of them with gradients, and
    `backup` + 1 of each critic. Raises ValueError for a single critic and a negative eta.
    """

    flow: FlowSpec = DIFFUSION
    eta: float = 1.0
    """Weight of Q against cloning; .005 to 4.5 in the paper, by task."""
    backup: int = 1
    """Next actions of which each critic takes the best; 10 on most mazes in the paper."""
    choose: Selector = Softmax(50)
    """How one of several draws is taken, in evaluation and while exploring; `First()` is the paper's policy."""
    temperature: float = 1.0
    """Of that choice, in units of Q."""
    ema: float = 0.999
    """Decay of the actor's moving average."""
    normalise_obs: NormaliseObs = "off"
    """"frozen" normalises by the moments of the data."""
    critic: Critics = Critics(width=256, depth=3, optim=Optim(3e-4, max_grad_norm=10.0))
    optim: Optim = Optim(3e-4, max_grad_norm=10.0)
    """Optimiser of the actor."""

    def __post_init__(self):
        check_positive(self, "backup", "temperature")
        if self.critic.members < 2:
            raise ValueError("DQL divides one critic by another: use critic.members of at least 2")
        if self.eta < 0 or not 0 <= self.ema < 1:
            raise ValueError(f"DQL needs eta >= 0 and 0 <= ema < 1, got {self.eta} and {self.ema}")

    @property
    def gamma(self) -> float:
        return self.critic.gamma

    def init(self, key: PRNGKey, spec: EnvSpec) -> DQLState:
        """Returns fresh networks for the sizes of `spec`; target and average are copies."""
        k_actor, k_critic = jr.split(key)
        actor = self.flow.init(k_actor, spec.action_dim, spec.observation, spec.horizon)
        critic, target, critic_opt = self.critic.init(k_critic, spec)
        return DQLState(
            actor, jax.tree.map(jnp.copy, actor), critic, target, jnp.asarray(self.temperature, jnp.float32),
            self.optim.init(actor), critic_opt, jnp.zeros((), jnp.int32), initial_moments(self.normalise_obs, spec),
        )  # fmt: skip

    def policy(self, state: DQLState) -> Policy:
        """Returns the choice of one of several draws by the slow critics; the same while exploring."""
        choose = state.temperature, self.choose, self.choose
        return normalised(state.stats, BestOf(FlowPolicy(state.actor), state.target, *choose))

    def update(self, state: DQLState, batch: Batch, key: PRNGKey) -> tuple[DQLState, Metrics]:
        """Makes one step of the critics, the actor and its average on a batch [B] (2208.06193, algorithm 1)."""
        k_next, k_critic, k_noise, k_now, k_pair = jr.split(key, 5)
        n = batch.reward.shape[0]
        stats, batch = update_and_normalise(state.stats, batch, self.normalise_obs)

        # 1. Critics, with a' from the slow actor.
        slow = FlowPolicy(state.average)
        action = jax.vmap(lambda o, k: slow.particles(o, k, self.backup))(batch.next_obs, jr.split(k_next, n))
        critic, target, critic_opt, metrics = self.critic.learn(
            state.critic, state.target, state.critic_opt, batch, action, k_critic, over="max"
        )

        # 2. Actor: cloned, and maximising one critic in units of another.
        one, other = jr.permutation(k_pair, self.critic.members)[:2]

        def actor_loss(actor):
            """Returns the loss."""
            cloning = noise_loss(actor, batch, jr.split(k_noise, n))
            ends = jax.vmap(FlowPolicy(actor))(batch.obs, jr.split(k_now, n))
            q = jax.vmap(critic)(batch.obs, ends)
            return cloning - self.eta * unit_scale(q[:, other]) * jnp.mean(q[:, one])

        actor, actor_opt, loss, grad_norm = gradient_step(self.optim.tx, actor_loss, state.actor, state.actor_opt)
        average = follow(state.average, actor, state.step, self.ema)
        metrics |= {"actor_loss": loss, "actor_grad_norm": grad_norm}
        opts = actor_opt, critic_opt
        return DQLState(actor, average, critic, target, state.temperature, *opts, state.step + 1, stats), metrics


def level(flow: Flow, key: PRNGKey) -> Scalar:
    """Draws one of the times 0, 1/K, ..., (K - 1)/K at which the K steps of a flow's solver begin."""
    steps = flow.spec.solver.steps
    return jr.randint(key, (), 0, steps) / steps


def noise_loss(flow: Flow, batch: Batch, keys: Key[Array, " B"]) -> Float[Array, ""]:
    """Returns the mean square error of the prediction at a random level of each row, without masked coordinates."""

    def one(obs, action, key):
        k_noise, k_level = jr.split(key)
        return matching_error(flow, obs, flow.noise(k_noise), flow.spec.support.latent(action), level(flow, k_level))

    square = jax.vmap(one)(batch.obs, batch.action, keys) ** 2
    return jnp.sum(batch.mask * square) / jnp.maximum(batch.mask.sum(), 1.0)


PRESETS = (Preset("dql", DQL(), "Diffusion Q-learning", "2208.06193", "climbs Q through a cloned sampler", "dataset"),)
