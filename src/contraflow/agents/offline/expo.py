"""EXPO (arXiv 2507.07986): a cloned flow, small edits of its actions, and the best of both, offline and online.

    base      a flow or diffusion policy, matched to the actions of the batch from any policy;
    edit      a + beta tanh(u) with u Gaussian given (s, a), learned as SAC's actor: alpha log pi - mean_j Q_j(s, .);
    policy    of N actions of the base and their N edits the one with the largest Q. It has no parameters and follows
              the critic at once, and no gradient of the critic reaches the base;
    critic    y = r + discount min over two drawn of ten Q'_j(s', a'), a' from that policy.

The best of n independent actions is log n - (n - 1) / n nats away from the base, if Q has no ties.
"""

from dataclasses import dataclass, replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Int, PyTree

from contraflow.agents.base import Preset, adopted, flow_of
from contraflow.core.optim import Optim, check_positive, gradient_step
from contraflow.core.types import Batch, EnvSpec, Metrics, PRNGKey
from contraflow.flow.model import Flow, FlowSpec
from contraflow.nets.critic import Mean, QEnsemble, SubsetMin
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.base import Policy
from contraflow.policy.best_of import Argmax, BestOf
from contraflow.policy.edit import AlsoEdited
from contraflow.policy.flow import FlowPolicy
from contraflow.policy.normalise import RunningMoments, normalised
from contraflow.rl.cloning import cloning_loss
from contraflow.rl.critics import Critics, polyak
from contraflow.rl.edits import Edits, EditState
from contraflow.rl.normalise import NormaliseObs, initial_moments, pretrained_mode, update_and_normalise

OPTIM = Optim(3e-4)


class EXPOState(eqx.Module):
    flow: Flow
    average: Flow  # moving average of the flow, which acts
    critic: QEnsemble
    target: QEnsemble
    flow_opt: PyTree
    critic_opt: PyTree
    step: Int[Array, ""]
    edit: EditState | None = None
    stats: RunningMoments | None = None  # of observations; None if they are not normalised


@dataclass(frozen=True)
class EXPO:
    """The best of N actions of a cloned flow and their N edits.

    An update takes, per row, N K evaluations of the flow and one with gradients, N + 1 of the edit, 2 N + 1 of each
    target and two of each critic. An action takes N K of the flow, N of the edit and 2 N of each target.
    """

    flow: FlowSpec = FlowSpec(network=ResidualMLP(256, 3))
    """The base, with K steps (10) of its solver. `path` VP() and `predict` "noise" make it a diffusion policy."""
    candidates: int = 8
    """N, the number of actions of the base; each has one edit."""
    edit: Edits | None = Edits(0.1)
    """None chooses among actions of the base alone. N = 1 then learns the critic of a cloned policy."""
    delay: int = 1
    """Updates of the critics for one of base and edit; as many as `updates` of the source in the released code."""
    ema: float = 0.999
    normalise_obs: NormaliseObs = "off"
    """"frozen" normalises by the moments of the data."""
    critic: Critics = Critics(
        members=10, reduce=Mean(), backup=SubsetMin(2), width=256, depth=3, block="normalised", optim=OPTIM
    )
    optim: Optim = OPTIM
    """Optimiser of the base."""

    def __post_init__(self):
        check_positive(self, "candidates", "delay")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in [0, 1), got {self.ema}")

    @property
    def gamma(self) -> float:
        return self.critic.gamma

    def init(self, key: PRNGKey, spec: EnvSpec) -> EXPOState:
        """Returns fresh networks for the sizes of `spec`; the average and the target critic are copies."""
        k_flow, k_critic, k_edit = jr.split(key, 3)
        flow = self.flow.init(k_flow, spec.action_dim, spec.observation, spec.horizon)
        critic, target, critic_opt = self.critic.init(k_critic, spec)
        edit = None if self.edit is None else self.edit.init(k_edit, spec)
        return EXPOState(
            flow, jax.tree.map(jnp.copy, flow), critic, target, self.optim.init(flow), critic_opt,
            jnp.zeros((), jnp.int32), edit, initial_moments(self.normalise_obs, spec),
        )  # fmt: skip

    def policy(self, state: EXPOState) -> Policy:
        """Returns the best candidate by the mean of the target critics; the same while exploring."""
        return normalised(state.stats, self._best(state))

    def _best(self, state: EXPOState) -> BestOf:
        base, n = FlowPolicy(state.average), self.candidates
        if state.edit is not None:
            base, n = AlsoEdited(base, state.edit.edit), 2 * n
        return BestOf(base, state.target, None, Argmax(n), Argmax(n))

    def update(self, state: EXPOState, batch: Batch, key: PRNGKey) -> tuple[EXPOState, Metrics]:
        """Makes one step of the critics, the base and the edit on a batch [B] (2507.07986, algorithm 1)."""
        k_next, k_critic, k_flow, k_edit = jr.split(key, 4)
        n = batch.reward.shape[0]
        stats, batch = update_and_normalise(state.stats, batch, self.normalise_obs)

        # 1. Critic, with the best candidate by the target as a'.
        action = jax.vmap(self._best(state))(batch.next_obs, jr.split(k_next, n))
        critic, target, critic_opt, metrics = self.critic.learn(
            state.critic, state.target, state.critic_opt, batch, action, k_critic
        )

        # 2. Base: behaviour cloning of the batch.
        clone = lambda flow: cloning_loss(flow, batch, k_flow)
        flow, flow_opt, loss, grad_norm = gradient_step(self.optim.tx, clone, state.flow, state.flow_opt)
        moved = flow, flow_opt, polyak(flow, state.average, 1 - self.ema)
        metrics |= {"matching_loss": loss, "actor_grad_norm": grad_norm}

        # 3. Edit of the actions of the batch.
        edit = state.edit
        if self.edit is not None and edit is not None:
            edit, more = self.edit.learn(edit, critic.value, batch.obs, batch.action, k_edit)
            metrics |= more
        due = state.step % self.delay == self.delay - 1
        old = (state.flow, state.flow_opt, state.average), state.edit
        moved, edit = jax.tree.map(lambda new, old: jnp.where(due, new, old), (moved, edit), old)
        flow, flow_opt, average = moved
        return EXPOState(flow, average, critic, target, flow_opt, critic_opt, state.step + 1, edit, stats), metrics

    def starting_from(self, policy: Policy) -> "EXPO":
        """Returns the settings with the flow and the normalisation of a pretrained policy."""
        flow, stats = flow_of(policy, self)
        return replace(self, flow=flow.spec, normalise_obs=pretrained_mode(self.normalise_obs, stats))

    def adopt(self, state: EXPOState, policy: Policy) -> EXPOState:
        """Returns the state with a pretrained policy as the base."""
        flow, stats = adopted(self.flow, policy, self)
        average = jax.tree.map(jnp.copy, flow)
        return replace(state, flow=flow, average=average, stats=state.stats if stats is None else stats)


PRESETS = (
    Preset(
        "expo", EXPO(), "EXPO", "2507.07986", "the best of a cloned flow's actions and small edits of them", "dataset"
    ),
)
