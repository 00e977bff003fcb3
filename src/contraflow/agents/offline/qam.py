"""Q-learning with adjoint matching, QAM (arXiv 2601.14234): a cloned flow, tilted by exp(tau Q).

    base      v_b(x_t, t, s) is matched to the actions of the data; its slow copy is tilted;
    actor     v(x_t, t, s) is regressed on v_b - sigma_t^2 / 2 a~, a~ the lean adjoint of -tau grad Q(s, x_1) along
              paths of the actor itself (flow/adjoint.py): its fixed point is p_b(a | s) exp(tau Q(s, a)) / Z;
    critic    y = r + discount (mean_j Q'_j - rho std_j Q'_j)(s', a'), a' of the actor.

The gradient of Q is used only at the ends of paths, and no gradient passes through the solver. With `edit` (QAM-E) a
Gaussian moves the actor's actions uphill. With `budget` (TRQAM, 2605.27079) tau follows from the allowed relative
entropy to the base.
"""

from dataclasses import dataclass, replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PyTree

from contraflow.agents.base import Preset, adopted, flow_of
from contraflow.core.optim import Optim, check_positive, gradient_step
from contraflow.core.types import Batch, EnvSpec, Metrics, PRNGKey
from contraflow.flow.adjoint import lean_adjoint, path_kl, rollout
from contraflow.flow.model import Ddim, Flow, FlowSpec
from contraflow.flow.path import Linear
from contraflow.flow.solver import Euler
from contraflow.nets.critic import Mean, QEnsemble
from contraflow.nets.mlp import MLPSpec
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.base import Policy
from contraflow.policy.edit import Edited
from contraflow.policy.flow import FlowPolicy
from contraflow.policy.normalise import RunningMoments, normalised
from contraflow.rl.cloning import cloning_loss
from contraflow.rl.critics import Critics, polyak
from contraflow.rl.edits import Edits, EditState
from contraflow.rl.normalise import NormaliseObs, initial_moments, pretrained_mode, unit_scale, update_and_normalise

OPTIM = Optim(3e-4, max_grad_norm=1.0)


@dataclass(frozen=True)
class Budget:
    """Tunes 1 / tau until the actor's paths have a relative entropy of `nats` to those of the base.

    log(1 / tau) += rate (KL / nats - 1). KL is a moving average over batches, each clipped at 2 `nats`.
    """

    nats: float = 0.2
    """Per coordinate of an action or chunk: 1 for each action of five coordinates, as released."""
    rate: float = 0.01
    smooth: float = 0.1
    """Weight of the newest batch in the average."""
    low: float = 1e-4
    high: float = 1e4
    """Bounds of 1 / tau."""

    def __post_init__(self):
        check_positive(self, "nats", "rate", "smooth", "low")
        if not (self.low < self.high and self.smooth <= 1):
            raise ValueError(f"{self}: needs low < high and smooth <= 1")

    def following(
        self, lam: Float[Array, ""], average: Float[Array, ""], kl: Float[Array, ""]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Returns (1 / tau, the average) after a batch with the relative entropy `kl`."""
        average = average + self.smooth * (jnp.minimum(kl, 2 * self.nats) - average)
        return jnp.clip(lam * jnp.exp(self.rate * (average / self.nats - 1)), self.low, self.high), average


class QAMState(eqx.Module):
    flow: Flow
    average: Flow  # of the cloned flow: the base
    actor: Flow
    critic: QEnsemble
    target: QEnsemble
    flow_opt: PyTree
    actor_opt: PyTree
    critic_opt: PyTree
    lam: Float[Array, ""]  # 1 / tau
    kl: Float[Array, ""]  # moving average; unused without a budget
    step: Int[Array, ""]
    edit: EditState | None = None
    stats: RunningMoments | None = None  # of observations; None if they are not normalised


@dataclass(frozen=True)
class QAM:
    """A cloned flow tilted by exp(tau Q), learned by adjoint matching.

    An update takes, per row and with K steps: 2 K evaluations of the actor (a' and paths, K in sequence for each) and K
    with gradients in parallel; K of the base with gradients in sequence and one more; one of the cloned flow with
    gradients; one of each critic and two of its target. An action takes K evaluations.
    """

    flow: FlowSpec = FlowSpec(network=ResidualMLP(512, 3))
    """Base and actor, velocities on the linear path. The K steps (10) of the solver are also those of paths."""
    tau: float = 10.0
    """Inverse temperature; without `normalise_q` .1 to 30 in the paper, by task. With a `budget` it is the initial
    value."""
    normalise_q: bool = True
    """Divides Q by the mean of |Q| at the ends of the paths, and tau means the same for all rewards. Off as
    published."""
    budget: Budget | None = None
    """Tunes tau, as in TRQAM."""
    edit: Edits | None = None
    """Moves the actor's actions uphill, as in QAM-E."""
    rate: float = 0.005
    """Rate at which the base follows the cloned flow."""
    normalise_obs: NormaliseObs = "off"
    """"frozen" normalises by the moments of the data."""
    critic: Critics = Critics(
        members=10, reduce=Mean(), backup=Mean(0.5), width=512, depth=4, block="normalised", optim=OPTIM
    )
    optim: Optim = OPTIM
    """Optimiser of the base and of the actor, each with its own state."""

    def __post_init__(self):
        check_positive(self, "tau", "rate")
        flow = self.flow
        if not isinstance(flow.path, Linear) or flow.predict != "velocity" or flow.averaged or flow.clip is not None:
            raise ValueError("adjoint matching needs velocities on the linear path: flow.path Linear(), no clip")
        if not isinstance(flow.solver, Ddim | Euler) or flow.margin or getattr(flow.solver, "power", 1) != 1:
            raise ValueError("paths of adjoint matching have equal steps over [0, 1]: flow.solver Ddim(n), no margin")

    @property
    def gamma(self) -> float:
        return self.critic.gamma

    def init(self, key: PRNGKey, spec: EnvSpec) -> QAMState:
        """Returns fresh networks for the sizes of `spec`. Base and actor begin as copies of the cloned flow, the target
        as a copy of the critic."""
        k_flow, k_critic, k_edit = jr.split(key, 3)
        flow = self.flow.init(k_flow, spec.action_dim, spec.observation, spec.horizon)
        average, actor = (jax.tree.map(jnp.copy, flow) for _ in range(2))
        critic, target, critic_opt = self.critic.init(k_critic, spec)
        lam, zero = jnp.asarray(1.0 / self.tau, jnp.float32), jnp.zeros((), jnp.float32)
        edit = None if self.edit is None else self.edit.init(k_edit, spec)
        return QAMState(
            flow, average, actor, critic, target, self.optim.init(flow), self.optim.init(actor), critic_opt,
            lam, zero, jnp.zeros((), jnp.int32), edit, initial_moments(self.normalise_obs, spec),
        )  # fmt: skip

    def policy(self, state: QAMState) -> Policy:
        """Returns the end of the actor from random noise, with the edit if there is one; the same while exploring."""
        return normalised(state.stats, self._acting(state))

    def _acting(self, state: QAMState) -> FlowPolicy | Edited:
        flow = FlowPolicy(state.actor)
        return flow if state.edit is None else Edited(flow, state.edit.edit)

    def update(self, state: QAMState, batch: Batch, key: PRNGKey) -> tuple[QAMState, Metrics]:
        """Makes one step of the critics, the base, the actor and the edit on a batch [B] (2601.14234, algorithm 1)."""
        k_next, k_critic, k_flow, k_start, k_path, k_draw, k_edit = jr.split(key, 7)
        n, steps = batch.reward.shape[0], self.flow.solver.nfe
        stats, batch = update_and_normalise(state.stats, batch, self.normalise_obs)

        # 1. Critic, with a' from the policy.
        action = jax.vmap(self._acting(state))(batch.next_obs, jr.split(k_next, n))
        critic, target, critic_opt, metrics = self.critic.learn(
            state.critic, state.target, state.critic_opt, batch, action, k_critic
        )

        # 2. Base: behaviour cloning, without the critic.
        clone = lambda flow: cloning_loss(flow, batch, k_flow)
        flow, flow_opt, matching, _ = gradient_step(self.optim.tx, clone, state.flow, state.flow_opt)

        # 3. Paths of the actor, and grad Q at their ends. Outside the box neither the action nor Q changes.
        field = lambda flow, cond: lambda x, t: flow.velocity(x, t, cond)
        fine, base = (jax.vmap(f.encode)(batch.obs) for f in (state.actor, state.average))

        def path(fine, base, x0, key):
            return rollout(field(state.actor, fine), field(state.average, base), x0, steps, key)

        xs = jax.vmap(path)(fine, base, state.flow.noise(k_start, n), jr.split(k_path, n))
        q = lambda obs, x: target.value(obs, self.flow.support.action(x))
        values, slope = jax.vmap(jax.value_and_grad(q, 1))(batch.obs, xs[:, -1])
        slope = -(unit_scale(values) if self.normalise_q else 1.0) / state.lam * slope
        targets = jax.vmap(lambda cond, xs, slope: lean_adjoint(field(state.average, cond), xs, slope))(base, xs, slope)

        # 4. Actor: adjoint matching, mean over rows, steps and coordinates.
        def actor_loss(actor):
            """Returns (loss, relative entropy of paths per coordinate)."""

            def one(obs, targets):
                control = targets.control(field(actor, actor.encode(obs)))
                return jnp.mean(targets.error(control) ** 2), path_kl(control) / actor.dim

            return jax.tree.map(jnp.mean, jax.vmap(one)(batch.obs, targets))

        (loss, kl), grad = jax.value_and_grad(actor_loss, has_aux=True)(state.actor)
        updates, actor_opt = self.optim.tx.update(grad, state.actor_opt, state.actor)  # pyright: ignore[reportArgumentType]
        actor = eqx.apply_updates(state.actor, updates)
        metrics |= {"actor_loss": loss, "matching_loss": matching, "path_kl": kl, "tau": 1.0 / state.lam}

        # 5. The temperature for the budget, and the edit of the actor's actions.
        lam, average_kl = state.lam, state.kl
        if self.budget is not None:
            lam, average_kl = self.budget.following(lam, average_kl, kl)
        edit = state.edit
        if self.edit is not None and edit is not None:
            own = jax.vmap(FlowPolicy(state.actor))(batch.obs, jr.split(k_draw, n))
            edit, more = self.edit.learn(edit, critic.value, batch.obs, own, k_edit)
            metrics |= more
        nets = flow, polyak(flow, state.average, self.rate), actor, critic, target
        opts = flow_opt, actor_opt, critic_opt
        return QAMState(*nets, *opts, lam, average_kl, state.step + 1, edit, stats), metrics

    def starting_from(self, policy: Policy) -> "QAM":
        """Returns the settings with the flow and the normalisation of a pretrained policy."""
        flow, stats = flow_of(policy, self)
        return replace(self, flow=flow.spec, normalise_obs=pretrained_mode(self.normalise_obs, stats))

    def adopt(self, state: QAMState, policy: Policy) -> QAMState:
        """Returns the state with a pretrained policy as the cloned flow, the base and the actor."""
        flow, stats = adopted(self.flow, policy, self)
        average, actor = (jax.tree.map(jnp.copy, flow) for _ in range(2))
        return replace(state, flow=flow, average=average, actor=actor, stats=state.stats if stats is None else stats)


_preset = partial(Preset, paper="2601.14234", needs="dataset", run={"horizon": 5, "execute": 5})
PRESETS = (
    _preset("qam", QAM(), "Q-learning with adjoint matching", summary="a cloned flow tilted by exp(tau Q)"),
    _preset(
        "qam-e",
        QAM(edit=Edits(net=MLPSpec(512, 4, "gelu")), critic=replace(QAM().critic, members=2)),
        "QAM with edits",
        summary="a Gaussian moves the actions of QAM on",
    ),
    _preset(
        "trqam", QAM(budget=Budget()), "Trust-region QAM", paper="2605.27079", summary="tau follows from a budget of KL"
    ),
)
