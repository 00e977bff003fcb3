"""DSRL (arXiv 2506.15799), noise-aliased: a frozen flow policy a = f(s, w) is improved by choosing its start noise w.

    Q(s, a)    y = r + discount [min_j Q'_j(s', f(s', w')) - alpha c(w' | s')], w' from the actor;
    Q_w(s, w)  regression on Q(s, f(s, w)) at random w: it knows the value of noise without a gradient of f;
    actor      alpha c(w | s) - Q_w(s, w), with c the log-density of w, over that of N(0, I) in the form `Prior`.

Q learns from actions, whoever took them, so recorded data and replays of other policies serve. f is never changed and
never differentiated. With `Prior` the optimum for one state is N(w; 0, I) exp(Q(s, f(s, w)) / alpha) / Z, and the first
policy is f itself.
"""

from dataclasses import dataclass, replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PyTree

from contraflow.agents.base import Preset, adopted, flow_of
from contraflow.agents.online.sac import SAC
from contraflow.core.optim import Optim, check_positive, gradient_step
from contraflow.core.types import Batch, EnvSpec, Metrics, PRNGKey
from contraflow.flow.model import Flow, FlowSpec
from contraflow.nets.critic import QEnsemble
from contraflow.nets.heads import Point
from contraflow.nets.mlp import MLP, MLPSpec
from contraflow.policy.base import Policy
from contraflow.policy.flow import FlowPolicy
from contraflow.policy.normalise import RunningMoments, normalised
from contraflow.policy.start_noise import Bounded, Form, Prior, Steered
from contraflow.rl.critics import Critics
from contraflow.rl.normalise import NormaliseObs, initial_moments, pretrained_mode, update_and_normalise


class DSRLState(eqx.Module):
    base: Flow  # frozen
    actor: MLP
    critic: QEnsemble
    target: QEnsemble
    noise_critic: QEnsemble
    log_alpha: Float[Array, ""]
    actor_opt: PyTree
    critic_opt: PyTree
    noise_opt: PyTree
    alpha_opt: PyTree
    step: Int[Array, ""]
    stats: RunningMoments | None = None  # of observations; None if they are not normalised


@dataclass(frozen=True)
class DSRL:
    """SAC over the start noise of a frozen flow.

    An update takes, per row, 1 + `distil` actions of the frozen flow, the critics at each, and one evaluation of the
    actor with gradients. Raises ValueError for values out of range.
    """

    flow: FlowSpec = FlowSpec()
    """The frozen flow; it comes from the pretrained policy (`--pretrained`), without one it is random."""
    form: Form = Prior()
    target: float | None = None
    """To which alpha is tuned, in nats for each number of w: the relative entropy to N(0, I) of `Prior`, .5 if None, or
    the entropy of `Bounded`, 0 if None."""
    init_alpha: float = 1.0
    repeat: bool = False
    """One noise for all actions of a chunk: fewer numbers to choose, and fewer actions within reach."""
    distil: int = 4
    """Steps of Q_w in each update, at one w for each row (10 in the released code)."""
    own: float = 0.5
    """Share of these w that the actor draws; the others are N(0, I) (all of them in the released code)."""
    normalise_obs: NormaliseObs = "off"
    critic: Critics = Critics(width=256, optim=Optim(3e-4))
    """Both critics have these settings."""
    actor: MLPSpec = MLPSpec(256, 2)
    optim: Optim = Optim(3e-4)

    def __post_init__(self):
        check_positive(self, "init_alpha", "distil")
        if not 0 <= self.own <= 1:
            raise ValueError(f"own must lie in [0, 1], got {self.own}")

    @property
    def gamma(self) -> float:
        return self.critic.gamma

    @property
    def goal(self) -> float:
        """The mean cost per number of w to which alpha is tuned."""
        if isinstance(self.form, Bounded):
            return 0.0 if self.target is None else -self.target
        return 0.5 if self.target is None else self.target

    def init(self, key: PRNGKey, spec: EnvSpec) -> DSRLState:
        """Returns fresh networks; `adopt` inserts the frozen flow."""
        k_flow, k_actor, k_critic, k_noise = jr.split(key, 4)
        base = self.flow.init(k_flow, spec.action_dim, spec.observation, spec.horizon)
        size = spec.action_dim // spec.horizon if self.repeat else spec.action_dim
        actor = self.actor.init(k_actor, spec.observation, 2 * size)
        actor = eqx.tree_at(lambda net: net.last.weight, actor, 0.01 * actor.last.weight)
        critic, target, critic_opt = self.critic.init(k_critic, spec)
        of_noise = replace(spec, action_dim=size, horizon=1, execute=1)
        noise_critic, _, noise_opt = replace(self.critic, head=Point()).init(k_noise, of_noise)
        log_alpha = jnp.log(jnp.asarray(self.init_alpha, jnp.float32))
        return DSRLState(
            base, actor, critic, target, noise_critic, log_alpha, self.optim.init(actor), critic_opt, noise_opt,
            self.optim.init(log_alpha), jnp.zeros((), jnp.int32), initial_moments(self.normalise_obs, spec),
        )  # fmt: skip

    def policy(self, state: DSRLState) -> Policy:
        """Returns the frozen flow from chosen noise."""
        return normalised(state.stats, self._steered(state.base, state.actor))

    def _steered(self, base: Flow, actor: MLP) -> Steered:
        size = actor.last.bias.shape[0] // 2
        return Steered(FlowPolicy(base), actor, self.form, base.dim // size)

    def update(self, state: DSRLState, batch: Batch, key: PRNGKey) -> tuple[DSRLState, Metrics]:
        """Makes one step of the critic, `distil` of the noise critic and one of the actor on a batch [B]."""
        k_next, k_critic, k_distil, k_actor = jr.split(key, 4)
        n, alpha = batch.reward.shape[0], jnp.exp(state.log_alpha)
        stats, batch = update_and_normalise(state.stats, batch, self.normalise_obs)
        steered = self._steered(jax.lax.stop_gradient(state.base), state.actor)

        # 1. Critic of actions; the next one starts from chosen noise.
        def following(obs, key):
            w, cost = steered.draw(obs, key)
            return steered.act(obs, w), cost

        action, cost = jax.vmap(following)(batch.next_obs, jr.split(k_next, n))
        critic, target, critic_opt, metrics = self.critic.learn(
            state.critic, state.target, state.critic_opt, batch, action, k_critic, -alpha * cost
        )

        # 2. Critic of noise, member by member the value of the action that the noise leads to.
        def distil(carry, key):
            members, opt = carry
            k_which, k_own, k_free = jr.split(key, 3)
            chosen = jax.vmap(lambda o, k: steered.draw(o, k)[0])(batch.obs, jr.split(k_own, n))
            own = jr.uniform(k_which, (n, 1)) < self.own
            w = jnp.where(own, chosen, jr.normal(k_free, chosen.shape))
            values = jax.lax.stop_gradient(jax.vmap(lambda o, w: critic(o, steered.act(o, w)))(batch.obs, w))

            def step(member, opt, value):
                loss = lambda q: jnp.mean((jax.vmap(q)(batch.obs, w)[:, 0] - value) ** 2)
                return gradient_step(self.critic.optim.tx, loss, member, opt)[:3]

            members, opt, loss = jax.vmap(step)(members, opt, values.T)
            return (members, opt), loss.mean()

        carry = state.noise_critic.members, state.noise_opt
        (members, noise_opt), distances = jax.lax.scan(distil, carry, jr.split(k_distil, self.distil))
        noise_critic = eqx.tree_at(lambda q: q.members, state.noise_critic, members)

        # 3. Actor of noise, and the weight of its cost.
        def loss_fn(actor):
            def one(obs, key):
                w, cost = replace(steered, net=actor).draw(obs, key)
                return alpha * cost - noise_critic.value(obs, w), cost

            losses, costs = jax.vmap(one)(batch.obs, jr.split(k_actor, n))
            return losses.mean(), costs.mean() / (actor.last.bias.shape[0] // 2)

        (loss, cost), grad = jax.value_and_grad(loss_fn, has_aux=True)(state.actor)
        updates, actor_opt = self.optim.tx.update(grad, state.actor_opt, state.actor)  # pyright: ignore[reportArgumentType]
        actor = eqx.apply_updates(state.actor, updates)
        log_alpha, alpha_opt, _, _ = gradient_step(
            self.optim.tx, lambda x: x * (self.goal - cost), state.log_alpha, state.alpha_opt
        )
        metrics |= {"actor_loss": loss, "noise_cost": cost, "temperature": alpha, "distillation": distances.mean()}
        return DSRLState(
            state.base, actor, critic, target, noise_critic, log_alpha, actor_opt, critic_opt, noise_opt, alpha_opt,
            state.step + 1, stats,
        ), metrics  # fmt: skip

    def starting_from(self, policy: Policy) -> "DSRL":
        """Returns the settings with the flow and the normalisation of a pretrained policy."""
        flow, stats = flow_of(policy, self)
        return replace(self, flow=flow.spec, normalise_obs=pretrained_mode(self.normalise_obs, stats))

    def adopt(self, state: DSRLState, policy: Policy) -> DSRLState:
        """Returns the state with a pretrained policy as the frozen one."""
        base, stats = adopted(self.flow, policy, self)
        return replace(state, base=base, stats=state.stats if stats is None else stats)


PLAIN = SAC(target_entropy=0.0, critic=Critics(width=256, optim=Optim(3e-4)))
"""The plain form: noises are the actions of an environment in which the frozen policy acts (`base` of the source)."""
PRESETS = (
    Preset(
        "dsrl", DSRL(), "DSRL, noise-aliased", "2506.15799", "SAC over the start noise of a frozen policy",
        run={"warm_up": "policy"},
    ),
    Preset(
        "dsrl-sac", PLAIN, "DSRL, plain", "2506.15799", "SAC over the start noise of a frozen policy, local or served",
        run={"base": ""},
    ),
)  # fmt: skip
