"""Diffusion actor-critic, DAC (arXiv 2405.20555): noise regression, shifted by the slope of Q at the noisy action.

    actor     eta |eps(s, x_t, t) - x_0|^2 + beta_t G(s, x_t) . eps(s, x_t, t),   G = sg grad_a Q(s, x_t) / mean|Q|,

with the minimiser eps = E[x_0 | x_t] - beta_t G / (2 eta), a tilt of the data at the temperature 2 eta mean|Q|,

    critics   y = r + discount (mean_j V_j - rho std_j V_j),   V_j the mean or the best of Q_j over ten actions at s',
    dual      eta += rate clip(|eps - x_0|^2 - cloning, -1, 1): less of Q while the cloning error exceeds `cloning`.

Both terms of the actor's loss are means over the coordinates of an action. The shift is not exact: for data N(m, c^2)
and Q = g.a the exact tilt has the factor alpha_t c^2 / (alpha_t^2 c^2 + beta_t^2). Here it is 1, exact only at t = 1.
"""

from dataclasses import dataclass, replace
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PyTree

from contraflow.agents.base import Preset
from contraflow.agents.offline.dql import DIFFUSION, level
from contraflow.core.optim import Optim, check_positive, gradient_step
from contraflow.core.types import Batch, EnvSpec, Metrics, PRNGKey
from contraflow.flow.model import Ddpm, Flow, FlowSpec
from contraflow.flow.support import Box
from contraflow.nets.critic import Mean, QEnsemble
from contraflow.policy.base import Policy
from contraflow.policy.best_of import Argmax, BestOf
from contraflow.policy.flow import FlowPolicy
from contraflow.policy.normalise import RunningMoments, normalised
from contraflow.rl.critics import Critics, follow
from contraflow.rl.normalise import NormaliseObs, initial_moments, unit_scale, update_and_normalise

OPTIM = Optim(3e-4, max_grad_norm=1.0)
LOW, HIGH = 1e-3, 100.0  # bounds of eta


class DACState(eqx.Module):
    actor: Flow
    average: Flow  # moving average of the actor, for targets
    critic: QEnsemble
    target: QEnsemble
    eta: Float[Array, ""]
    actor_opt: PyTree
    critic_opt: PyTree
    step: Int[Array, ""]
    stats: RunningMoments | None = None  # of observations; None if they are not normalised


@dataclass(frozen=True)
class DAC:
    """A diffusion policy by noise regression with a shift along the slope of Q.

    An update takes, per row, `candidates` K + 2 evaluations of the actor, K the steps of its solver, one of them with
    gradients, and `candidates` + 2 of each critic and one gradient of it. Raises ValueError for a flow that does not
    predict the noise of actions themselves, and an eta outside [.001, 100].
    """

    flow: FlowSpec = replace(DIFFUSION, solver=Ddpm(5, wide=True))
    eta: float = 1.0
    """Weight of cloning at the start, within [.001, 100]; lambda = 2 eta mean|Q|."""
    eta_rate: float = 1e-3
    """Rate of the dual; 0 keeps eta, as on the mazes of the paper (at .1)."""
    cloning: float = 1.0
    """Target error of the noise; a constant prediction has 1, the paper .05 to .1 on expert data."""
    candidates: int = 10
    """Next actions for each target."""
    over: Literal["mean", "max"] = "mean"
    """Each critic takes their mean or their best; "max" on mazes in the paper."""
    particles: int = 10
    """Draws of which the best acts, in evaluation and while exploring."""
    normalise_q: bool = True
    """Divides Q by the mean of |Q| at the actions of the batch, as released; without it lambda is 2 eta."""
    ema: float = 0.999
    """Decay of the actor's moving average."""
    normalise_obs: NormaliseObs = "off"
    """"frozen" normalises by the moments of the data."""
    critic: Critics = Critics(10, reduce=Mean(), backup=Mean(1.0), width=256, depth=3, optim=OPTIM)
    optim: Optim = OPTIM
    """Optimiser of the actor."""

    def __post_init__(self):
        check_positive(self, "candidates", "particles")
        if self.flow.predict != "noise" or not isinstance(self.flow.support, Box):
            raise ValueError("DAC regresses the noise of actions: use flow.predict 'noise' and flow.support Box()")
        if not (LOW <= self.eta <= HIGH and self.eta_rate >= 0 and 0 <= self.ema < 1):
            raise ValueError(
                f"DAC needs {LOW} <= eta <= {HIGH}, eta_rate >= 0 and 0 <= ema < 1, got {self.eta}, {self.eta_rate} "
                f"and {self.ema}"
            )

    @property
    def gamma(self) -> float:
        return self.critic.gamma

    def init(self, key: PRNGKey, spec: EnvSpec) -> DACState:
        """Returns fresh networks for the sizes of `spec`; target and average are copies."""
        k_actor, k_critic = jr.split(key)
        actor = self.flow.init(k_actor, spec.action_dim, spec.observation, spec.horizon)
        critic, target, critic_opt = self.critic.init(k_critic, spec)
        return DACState(
            actor, jax.tree.map(jnp.copy, actor), critic, target, jnp.asarray(self.eta, jnp.float32),
            self.optim.init(actor), critic_opt, jnp.zeros((), jnp.int32), initial_moments(self.normalise_obs, spec),
        )  # fmt: skip

    def policy(self, state: DACState) -> Policy:
        """Returns the best of several draws of the actor by the slow critics; the same while exploring."""
        best = BestOf(FlowPolicy(state.actor), state.target, None, Argmax(self.particles), Argmax(self.particles))
        return normalised(state.stats, best)

    def update(self, state: DACState, batch: Batch, key: PRNGKey) -> tuple[DACState, Metrics]:
        """Makes one step of the critics, the actor, its average and eta on a batch [B] (2405.20555, algorithm 1)."""
        k_next, k_critic, k_noise = jr.split(key, 3)
        n = batch.reward.shape[0]
        stats, batch = update_and_normalise(state.stats, batch, self.normalise_obs)
        count = jnp.maximum(batch.mask.sum(), 1.0)

        # 1. Critics, with several a' from the slow actor.
        slow = FlowPolicy(state.average)
        action = jax.vmap(lambda o, k: slow.particles(o, k, self.candidates))(batch.next_obs, jr.split(k_next, n))
        critic, target, critic_opt, metrics = self.critic.learn(
            state.critic, state.target, state.critic_opt, batch, action, k_critic, over=self.over
        )

        # 2. Actor. The parts that do not depend on it come first: times, noise, and the slope of Q at x_t.
        def noisy(obs, action, key):
            k_x0, k_level = jr.split(key)
            x0, t = state.actor.noise(k_x0), level(state.actor, k_level)
            x = self.flow.path.perturb(x0, self.flow.support.latent(action), t)
            return x, t, x0, self.flow.path.beta(t) * jax.grad(target.value, argnums=1)(obs, x)

        x, t, x0, push = jax.vmap(noisy)(batch.obs, batch.action, jr.split(k_noise, n))
        if self.normalise_q:
            push = unit_scale(jax.vmap(target.value)(batch.obs, batch.action)) * push

        def cloning(actor):
            """Returns (mean square error of the noise, the noise)."""
            noise = jax.vmap(actor.output)(x, t, batch.obs)
            return jnp.sum(batch.mask * (noise - x0) ** 2) / count, noise

        def actor_loss(actor):
            error, noise = cloning(actor)
            return state.eta * error + jnp.sum(batch.mask * push * noise) / count

        actor, actor_opt, loss, grad_norm = gradient_step(self.optim.tx, actor_loss, state.actor, state.actor_opt)
        average = follow(state.average, actor, state.step, self.ema)

        # 3. The dual, from the actor after its step, at the same times and noise.
        error = cloning(actor)[0]
        eta = jnp.clip(state.eta + self.eta_rate * jnp.clip(error - self.cloning, -1.0, 1.0), LOW, HIGH)
        metrics |= {"actor_loss": loss, "actor_grad_norm": grad_norm, "matching_loss": error, "eta": state.eta}
        return DACState(actor, average, critic, target, eta, actor_opt, critic_opt, state.step + 1, stats), metrics


PRESETS = (Preset("dac", DAC(), "Diffusion actor-critic", "2405.20555", "noise regression shifted by Q", "dataset"),)
