"""Policy mirror descent: a flow or diffusion policy is matched to its own better actions, each weighted by its value.

With candidates a_i of a slow copy of the policy, the weights w_i and x_0 ~ N(0, I) the loss is

    mean_i w_i |f(x_t, t, s) - f*(a_i, x_0)|^2,      x_t = alpha_t a_i + beta_t x_0.

Its minimum is the distribution pi_old(a) w(a) / E[w]: with w ~ exp(Q / lambda) an iterate of mirror descent. DPMD, FPMD
and QVPO differ in the weights, the copy, and the noise: they are settings of it, in files of their own beside this one.
"""

from dataclasses import dataclass, replace
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PyTree

from contraflow.agents.base import Preset, adopted, flow_of
from contraflow.core.optim import Optim, check_positive, gradient_step
from contraflow.core.types import Batch, EnvSpec, Metrics, PRNGKey
from contraflow.flow.fewstep import Matching, Objective
from contraflow.flow.matching import consistency_error, matching_error, square, with_objective
from contraflow.flow.model import EDGE, Ddim, Flow, FlowSpec
from contraflow.flow.path import VP
from contraflow.nets.critic import QEnsemble
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.base import Noisy, Policy
from contraflow.policy.best_of import Argmax, BestOf, Selector, Softmax
from contraflow.policy.flow import FlowPolicy
from contraflow.policy.normalise import RunningMoments, normalised
from contraflow.rl.critics import Critics, polyak
from contraflow.rl.normalise import NormaliseObs, initial_moments, pretrained_mode, update_and_normalise
from contraflow.rl.temperature import Temperature, Tuned

DIFFUSION = FlowSpec(path=VP(), predict="noise", clip=1.0, solver=Ddim(20), network=ResidualMLP(256, 3, 32))


@dataclass(frozen=True)
class Candidates:
    """What the flow is matched to. Raises ValueError for values out of range."""

    own: int = 64
    """Actions of the slow copy for each observation."""
    noise: float = 0.2
    """Standard deviation of what is added to them, and to actions while exploring."""
    uniform: int = 0
    """Uniform ones beside them, which keep the policy wide."""
    uniform_share: float = 0.02
    """Their weight, in units of the largest weight of the others."""
    weight: Literal["boltzmann", "advantage"] = "boltzmann"
    """n softmax_i(Q_i / lambda) within a state; or max(Q_i - mean Q, 0) for the best alone."""

    def __post_init__(self):
        check_positive(self, "own")
        if min(self.uniform, self.uniform_share, self.noise) < 0:
            raise ValueError("uniform, uniform_share and noise must not be negative")


@dataclass(frozen=True)
class Selection:
    """How one of n particles is picked by Q / lambda: in acting, in targets of the critic, and in evaluation."""

    explore: Selector = Softmax(1)
    backup: Selector = Softmax(1)
    greedy: Selector = Argmax(32)


class PMDState(eqx.Module):
    actor: Flow
    slow: Flow
    critic: QEnsemble
    target: QEnsemble
    actor_opt: PyTree
    critic_opt: PyTree
    temperature: Float[Array, ""]
    step: Int[Array, ""]
    stats: RunningMoments | None = None  # of observations, where they are normalised


@dataclass(frozen=True)
class PMD:
    """Per update and sample: (n_backup + own) F actor calls, F the policy's steps, as many critic calls, and
    own + uniform evaluations with gradients."""

    flow: FlowSpec = DIFFUSION
    objective: Objective = Matching()
    """Other than `Matching` it makes the flow an averaged one."""
    candidates: Candidates = Candidates()
    choose: Selection = Selection()
    temperature: Temperature = Tuned(2.16, of="weights", start=1.0)
    """lambda; tuned to the entropy of the weights in nats, at most log(own): KL to the slow copy is the gap."""
    tau: float = 1e-3
    """Rate at which the slow copy follows."""
    normalise_obs: NormaliseObs = "off"
    critic: Critics = Critics()
    optim: Optim = Optim(3e-4, max_grad_norm=10.0)

    def __post_init__(self):
        check_positive(self, "tau")
        if self.temperature.of == "actions":
            raise ValueError("PMD tunes its temperature to its weights: use Tuned(entropy, of='weights')")
        if self.objective.power:
            raise ValueError(f"PMD weighs rows by their value alone: use {type(self.objective).__name__}(power=0)")
        object.__setattr__(self, "flow", with_objective(self.flow, self.objective))

    @property
    def gamma(self) -> float:
        return self.critic.gamma

    def init(self, key: PRNGKey, spec: EnvSpec) -> PMDState:
        """Fresh networks for `spec`'s sizes; the slow copies are copies."""
        k_actor, k_critic = jr.split(key)
        actor = self.flow.init(k_actor, spec.action_dim, spec.observation, spec.horizon)
        critic, target, critic_opt = self.critic.init(k_critic, spec)
        return PMDState(
            actor, jax.tree.map(jnp.copy, actor), critic, target, self.optim.init(actor), critic_opt,
            self.temperature.first(), jnp.zeros((), jnp.int32), initial_moments(self.normalise_obs, spec),
        )  # fmt: skip

    def policy(self, state: PMDState) -> Policy:
        """Of the particles of `explore` or `greedy` the one picked by Q(s, a), with noise while exploring."""
        best = BestOf(FlowPolicy(state.actor), state.critic, state.temperature, self.choose.explore, self.choose.greedy)
        return normalised(state.stats, Noisy(best, None, self.candidates.noise))

    def update(self, state: PMDState, batch: Batch, key: PRNGKey) -> tuple[PMDState, Metrics]:
        """One step of the critics, the actor and the slow copies on a batch [B]."""
        k_next, k_critic, k_candidates, k_uniform, k_match = jr.split(key, 5)
        n, lam, settings = batch.reward.shape[0], state.temperature, self.candidates
        stats, batch = update_and_normalise(state.stats, batch, self.normalise_obs)

        # 1. Critic, with a' of the slow copy.
        slow = FlowPolicy(state.slow)
        backup = BestOf(slow, state.target, lam, self.choose.backup, self.choose.backup)
        action = jax.vmap(backup)(batch.next_obs, jr.split(k_next, n))
        critic, target, critic_opt, metrics = self.critic.learn(
            state.critic, state.target, state.critic_opt, batch, action, k_critic
        )

        # 2. Candidates of the slow copy and their weights.
        def propose(obs, key):
            """(actions, weights, entropy of the softmax) of the candidates at one observation."""
            k_policy, k_noise = jr.split(key)
            a = slow.particles(obs, k_policy, settings.own)
            a = jnp.clip(a + settings.noise * jr.normal(k_noise, a.shape), -1.0, 1.0)
            q = jax.vmap(lambda a: critic.value(obs, a))(a)
            p = jax.nn.softmax(q / lam)
            w = settings.own * p
            if settings.weight == "advantage":
                best = jnp.argmax(q)
                a, w = a[best][None], jax.nn.relu(q[best] - q.mean())[None]
            return a, w, -jnp.sum(p * jnp.log(jnp.maximum(p, 1e-20)))

        actions, weights, entropy = jax.vmap(propose)(batch.obs, jr.split(k_candidates, n))
        if settings.uniform:
            wide = jr.uniform(k_uniform, (n, settings.uniform, actions.shape[-1]), minval=-1.0, maxval=1.0)
            share = settings.uniform_share * jnp.max(weights, 1, keepdims=True)
            actions = jnp.concatenate([actions, wide], 1)
            weights = jnp.concatenate([weights, jnp.broadcast_to(share, wide.shape[:2])], 1)

        # 3. Actor: weighted matching; where steps are tied, all of the same rows again.
        def actor_loss(actor):
            """Mean over observations, actions and coordinates."""

            def one(obs, action, w, key):
                k_x0, k_match, k_tie = jr.split(key, 3)
                x1 = actor.spec.support.latent(action)
                x0 = actor.noise(k_x0)
                t = jr.uniform(k_match, minval=EDGE, maxval=1 - EDGE)
                loss = square(matching_error(actor, obs, x0, x1, t))
                if self.objective.averaged:
                    tie = consistency_error(
                        self.objective, actor, state.slow, obs, x0, x1, *jr.split(k_tie), velocity=x1 - x0
                    )
                    loss = self.objective.share * loss + (1 - self.objective.share) * square(tie)
                return w * loss

            keys = jr.split(k_match, weights.shape)
            return jnp.mean(jax.vmap(jax.vmap(one, (None, 0, 0, 0)))(batch.obs, actions, weights, keys))

        actor, actor_opt, loss, grad_norm = gradient_step(self.optim.tx, actor_loss, state.actor, state.actor_opt)
        metrics |= {"actor_loss": loss, "actor_grad_norm": grad_norm, "temperature": lam, "entropy": entropy.mean()}
        return PMDState(
            actor, polyak(actor, state.slow, self.tau), critic, target, actor_opt, critic_opt,
            self.temperature.following(lam, state.step + 1, entropy.mean()), state.step + 1, stats,
        ), metrics  # fmt: skip

    def starting_from(self, policy: Policy) -> "PMD":
        """The settings with the flow of a pretrained policy."""
        flow, stats = flow_of(policy, self)
        return replace(self, flow=flow.spec, normalise_obs=pretrained_mode(self.normalise_obs, stats))

    def adopt(self, state: PMDState, policy: Policy) -> PMDState:
        """The state with the networks of a pretrained policy."""
        actor, stats = adopted(self.flow, policy, self)
        slow = jax.tree.map(jnp.copy, actor)
        return replace(state, actor=actor, slow=slow, stats=state.stats if stats is None else stats)


PRESETS = (
    Preset("pmd", PMD(), "Policy mirror descent", "2502.00361", "candidates of the policy weighted by exp(Q / lambda)"),
)
