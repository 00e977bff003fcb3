"""Reversal Q-learning, RQL (arXiv 2606.17551): each step of a flow is an action, valued by V(s, x_f, f).

V values an action that is half made. At f = 1 it is Q(s, a), at f = 0 the value of a state and a noise. An action of
the data is taken back along the flow to a random time f, which gives a state of this inner process. The return of the
action is a sample of its value. Nothing is bootstrapped along the flow, and no gradient runs along it:

    critics   V_j(s, x_f, f) -> the expectile of y = r + discount (mean_j V_j - rho std_j V_j)(s', z, 0),  z ~ N(0, I);
    actor     alpha |v(s, x_t, t) - (x_1 - x_0)|^2 - mean_j V_j(s, x_t + h v(s, x_t, t), t + h),  h = min(1/K, 1 - t).

K steps of Euler, each of length (1 - f) / K, lead back from x_1 = a to x_f. If V has the slope g in x, the velocity is
that of the data shifted by d h g / (2 alpha), because cloning is a mean over the d coordinates of an action.
"""

from dataclasses import dataclass, replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PyTree

from contraflow.agents.base import Preset
from contraflow.core.optim import Optim, check_positive, gradient_step
from contraflow.core.types import Batch, EnvSpec, Metrics, Obs, PRNGKey
from contraflow.flow.model import Ddim, Flow, FlowSpec
from contraflow.flow.path import Linear, Scalar, Vector
from contraflow.flow.support import Box
from contraflow.nets.critic import Mean, QEnsemble
from contraflow.nets.heads import Expectile
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.base import Policy
from contraflow.policy.flow import FlowPolicy
from contraflow.policy.normalise import RunningMoments, normalised
from contraflow.rl.critics import Critics, follow
from contraflow.rl.normalise import NormaliseObs, initial_moments, unit_scale, update_and_normalise

OPTIM = Optim(3e-4)


class RQLState(eqx.Module):
    flow: Flow
    average: Flow  # moving average of the flow, which acts
    critic: QEnsemble  # of x_f and f in place of an action
    target: QEnsemble
    flow_opt: PyTree
    critic_opt: PyTree
    step: Int[Array, ""]
    stats: RunningMoments | None = None  # of observations; None if they are not normalised


@dataclass(frozen=True)
class RQL:
    """A flow that takes greedy steps on the value of half-made actions, held to the data by cloning.

    An update takes, per row, K + 1 evaluations of the flow, K the steps of its solver, one of them with gradients, and
    three of each critic. Raises ValueError for a flow that is not a velocity on the linear path.
    """

    flow: FlowSpec = FlowSpec(network=ResidualMLP(512, 3))
    alpha: float = 1.0
    """Weight of cloning; .1 to 10 in the paper, by task, without `normalise_q`."""
    normalise_q: bool = True
    """Divides V by the mean of |V| in the batch, and alpha means the same for all rewards. Off as released."""
    ema: float = 0.999
    """Decay of the moving average that acts."""
    normalise_obs: NormaliseObs = "off"
    """"frozen" normalises by the moments of the data."""
    critic: Critics = Critics(
        10, head=Expectile(0.7), reduce=Mean(), backup=Mean(0.5), width=512, depth=4, block="normalised", optim=OPTIM
    )
    """The paper's expectiles are .5, .7 and .9, by task; .5 is the mean."""
    optim: Optim = OPTIM
    """Optimiser of the flow."""

    def __post_init__(self):
        check_positive(self, "alpha")
        spec = self.flow
        plain = spec.predict == "velocity" and not spec.averaged and isinstance(spec.path, Linear)
        if not (plain and isinstance(spec.solver, Ddim) and isinstance(spec.support, Box)):
            raise ValueError(
                "RQL takes steps of a velocity back and forth: use FlowSpec(solver=Ddim(n)) on Linear(), Box()"
            )
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in [0, 1), got {self.ema}")

    @property
    def gamma(self) -> float:
        return self.critic.gamma

    def init(self, key: PRNGKey, spec: EnvSpec) -> RQLState:
        """Returns fresh networks for the sizes of `spec`; target and average are copies."""
        k_flow, k_critic = jr.split(key)
        flow = self.flow.init(k_flow, spec.action_dim, spec.observation, spec.horizon)
        critic, target, critic_opt = self.critic.init(k_critic, replace(spec, action_dim=spec.action_dim + 1))
        opts = self.optim.init(flow), critic_opt
        stats = initial_moments(self.normalise_obs, spec)
        return RQLState(flow, jax.tree.map(jnp.copy, flow), critic, target, *opts, jnp.zeros((), jnp.int32), stats)

    def policy(self, state: RQLState) -> Policy:
        """Returns the end of the averaged flow from a random x_0; the same while exploring."""
        return normalised(state.stats, FlowPolicy(state.average))

    def update(self, state: RQLState, batch: Batch, key: PRNGKey) -> tuple[RQLState, Metrics]:
        """Makes one step of the critics, the flow and its average on a batch [B]."""
        k_back, k_next, k_critic, k_flow = jr.split(key, 4)
        n, count, steps = batch.reward.shape[0], jnp.maximum(batch.mask.sum(), 1.0), self.flow.solver.nfe
        stats, batch = update_and_normalise(state.stats, batch, self.normalise_obs)

        # 1. Critics, at actions taken back along the flow: half to any time, half to the times of the solver.
        k_any, k_grid = jr.split(k_back)
        grid = jr.randint(k_grid, (n,), 0, steps + 1) / steps
        way = jnp.where(jnp.arange(n) < n // 2, jr.uniform(k_any, (n,)), grid)
        x_f = jax.vmap(lambda obs, action, d: reversed_flow(state.flow, obs, action, d))(batch.obs, batch.action, way)
        at = jax.vmap(place)(jax.lax.stop_gradient(x_f), 1.0 - way)
        half_made = replace(batch, action=at, mask=jnp.ones_like(at), next_action=None, next_mask=None)
        following = jax.vmap(place)(state.flow.noise(k_next, n), jnp.zeros(n))
        critic, target, critic_opt, metrics = self.critic.learn(
            state.critic, state.target, state.critic_opt, half_made, following, k_critic
        )

        # 2. Flow: cloned, and maximising V after one step of the solver.
        def flow_loss(flow):
            """Returns alpha |v - (x1 - x0)|^2 - V after the step, a mean over the batch."""

            def one(obs, action, key):
                """Returns (error of the velocity, V after the step)."""
                k_noise, k_t = jr.split(key)
                x0, t = flow.noise(k_noise), jr.uniform(k_t)
                x, cond = self.flow.path.perturb(x0, action, t), flow.encode(obs)
                v = flow.velocity(x, t, cond)
                h = jnp.minimum(1.0 / steps, 1.0 - t)
                return v - (action - x0), critic.value(obs, place(x + h * v, t + h))

            error, value = jax.vmap(one)(batch.obs, batch.action, jr.split(k_flow, n))
            scale = unit_scale(value) if self.normalise_q else 1.0
            return self.alpha * jnp.sum(batch.mask * error**2) / count - scale * value.mean()

        flow, flow_opt, loss, grad_norm = gradient_step(self.optim.tx, flow_loss, state.flow, state.flow_opt)
        average = follow(state.average, flow, state.step, self.ema)
        metrics |= {"actor_loss": loss, "actor_grad_norm": grad_norm}
        return RQLState(flow, average, critic, target, flow_opt, critic_opt, state.step + 1, stats), metrics


def place(x: Vector, f: Scalar) -> Float[Array, " d_plus_1"]:
    """Returns x_f and f in one vector, the input of the critics in place of an action."""
    return jnp.append(x, f)


def reversed_flow(flow: Flow, obs: Obs, action: Vector, way: Scalar) -> Vector:
    """Returns x_f, f = 1 - way: from x_1 = a back by the solver's number of Euler steps, each of length way / steps."""
    steps, cond = flow.spec.solver.nfe, flow.encode(obs)
    h = way / steps

    def step(x, k):
        return x - h * flow.velocity(x, 1.0 - k * h, cond), None

    return jax.lax.scan(step, action, jnp.arange(steps, dtype=action.dtype))[0]


PRESETS = (Preset("rql", RQL(), "Reversal Q-learning", "2606.17551", "steps of a flow as actions", "dataset"),)
