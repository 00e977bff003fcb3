"""Q-chunking, QC (arXiv 2507.07969): the best of N chunks of a cloned flow acts and makes the target's next chunk.

    flow      cloned on chunks A = (a_t, ..., a_{t+h-1}) of the data;
    policy    argmax of mean_j Q_j(s, A) over N chunks of the flow, each at most N times as likely as in the clone;
    critic    y = sum_{i<h} gamma^i r_i + gamma^h mean_j Q'_j(s_{t+h}, A'), A' the policy's chunk there.

Q sees the whole chunk, and the sum of h rewards needs no correction. With single actions and rewards of n steps, Q
learns the value of what the behaviour did in steps 2 to n. The source of the data makes the chunks (`horizon`), and the
agent treats them as actions. With single actions and N = 4 this is the paper's BFN.
"""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Int, PyTree

from contraflow.agents.base import Preset
from contraflow.core.checks import check_count
from contraflow.core.optim import Optim, gradient_step
from contraflow.core.types import Batch, EnvSpec, Metrics, PRNGKey
from contraflow.flow.model import Flow, FlowSpec
from contraflow.nets.critic import Mean, QEnsemble
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.base import Policy
from contraflow.policy.best_of import Argmax, BestOf
from contraflow.policy.flow import FlowPolicy
from contraflow.policy.normalise import RunningMoments, normalised
from contraflow.rl.cloning import cloning_loss
from contraflow.rl.critics import Critics
from contraflow.rl.normalise import NormaliseObs, initial_moments, update_and_normalise

OPTIM = Optim(3e-4)


class QCState(eqx.Module):
    flow: Flow
    critic: QEnsemble
    target: QEnsemble
    flow_opt: PyTree
    critic_opt: PyTree
    step: Int[Array, ""]
    stats: RunningMoments | None = None  # of observations; None if they are not normalised


@dataclass(frozen=True)
class QC:
    """The best of N chunks of a cloned flow.

    An update takes, per row, N K evaluations of the flow and N of each critic for the next chunk, one of each target,
    and one of the flow and of each critic with gradients.
    """

    flow: FlowSpec = FlowSpec(network=ResidualMLP(512, 3))
    particles: int = 32
    """N. The divergence from the clone is at most log N - (N - 1) / N nats, 2.5 for 32."""
    normalise_obs: NormaliseObs = "off"
    """"frozen" normalises by the moments of the data."""
    critic: Critics = Critics(reduce=Mean(), backup=Mean(), width=512, depth=4, block="normalised", optim=OPTIM)
    optim: Optim = OPTIM

    def __post_init__(self):
        check_count(self, 1, "particles")

    @property
    def gamma(self) -> float:
        return self.critic.gamma

    def init(self, key: PRNGKey, spec: EnvSpec) -> QCState:
        """Returns fresh networks for the sizes of `spec`; the target critic is a copy of the critic."""
        k_flow, k_critic = jr.split(key)
        flow = self.flow.init(k_flow, spec.action_dim, spec.observation, spec.horizon)
        critic, target, critic_opt = self.critic.init(k_critic, spec)
        stats = initial_moments(self.normalise_obs, spec)
        return QCState(flow, critic, target, self.optim.init(flow), critic_opt, jnp.zeros((), jnp.int32), stats)

    def policy(self, state: QCState) -> Policy:
        """Returns the best of N chunks, in evaluation and while exploring."""
        return normalised(state.stats, self._best(state))

    def _best(self, state: QCState) -> BestOf:
        return BestOf(FlowPolicy(state.flow), state.critic, None, Argmax(self.particles), Argmax(self.particles))

    def update(self, state: QCState, batch: Batch, key: PRNGKey) -> tuple[QCState, Metrics]:
        """Makes one step of the critics and the flow on a batch [B] (2507.07969, algorithm 1)."""
        k_next, k_critic, k_flow = jr.split(key, 3)
        stats, batch = update_and_normalise(state.stats, batch, self.normalise_obs)

        # 1. Critic. The critics choose the next chunk and the targets value it.
        action = jax.vmap(self._best(state))(batch.next_obs, jr.split(k_next, batch.reward.shape[0]))
        critic, target, critic_opt, metrics = self.critic.learn(
            state.critic, state.target, state.critic_opt, batch, action, k_critic
        )

        # 2. Flow: behaviour cloning.
        flow, flow_opt, loss, grad_norm = gradient_step(
            self.optim.tx, lambda flow: cloning_loss(flow, batch, k_flow), state.flow, state.flow_opt
        )
        metrics |= {"actor_loss": loss, "actor_grad_norm": grad_norm}
        return QCState(flow, critic, target, flow_opt, critic_opt, state.step + 1, stats), metrics


PRESETS = (
    Preset(
        "qc", QC(), "Q-chunking", "2507.07969", "best of a cloned flow's chunks, whole chunks valued", "dataset",
        {"horizon": 5, "execute": 5},
    ),
)  # fmt: skip
