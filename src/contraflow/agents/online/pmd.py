"""Policy mirror descent: regress a flow or diffusion policy on its own actions, each weighted by its value.

With candidates a_i of a slow copy of the policy, weights w_i and x_0 ~ N(0, I), the loss is

    mean_i w_i |f(x_t, t, s) - f*(a_i, x_0)|^2,      x_t = alpha_t a_i + beta_t x_0.

Its minimiser is the distribution pi_old(a) w(a) / E[w]. With w ~ exp(Q / lambda) this is one iterate of mirror descent.
DPMD, FPMD and QVPO are presets, in separate files, with other weights, copies and noise.
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
    """The actions that the flow is matched to. Raises ValueError for values out of range."""

    own: int = 64
    """Actions of the slow copy per observation."""
    noise: float = 0.2
    """Standard deviation of the noise added to them, and to actions while exploring."""
    uniform: int = 0
    """Number of uniform actions added to the candidates, which keep the policy wide."""
    uniform_share: float = 0.02
    """Their weight, in units of the largest weight of the other candidates."""
    weight: Literal["boltzmann", "advantage"] = "boltzmann"
    """`boltzmann`: n softmax_i(Q_i / lambda) within a state; `advantage`: max(Q_i - mean Q, 0) for the best action."""

    def __post_init__(self):
        check_positive(self, "own")
        if min(self.uniform, self.uniform_share, self.noise) < 0:
            raise ValueError("uniform, uniform_share and noise must not be negative")


@dataclass(frozen=True)
class Selection:
    """Rules to pick one of n particles by Q / lambda: while exploring, in the critic's targets, and in evaluation."""

    explore: Selector = Softmax(1)
    backup: Selector = Softmax(1)
    greedy: Selector = Argmax(32)


class PMDState(eqx.Module):
    """Everything that PMD learns: actor, critics, slow copies, temperature, optimisers and statistics."""

    actor: Flow
    slow: Flow
    critic: QEnsemble
    target: QEnsemble
    actor_opt: PyTree
    critic_opt: PyTree
    temperature: Float[Array, ""]
    step: Int[Array, ""]
    stats: RunningMoments | None = None  # of observations; None if they are not normalised


@dataclass(frozen=True)
class PMD:
    """Policy mirror descent.

    Cost per update and sample, with F solver steps of the policy: (n_backup + own) F actor evaluations, as many critic
    evaluations, and own + uniform actor evaluations with gradients. Raises ValueError for tau <= 0, a temperature tuned
    to actions, or an objective with a power.
    """

    flow: FlowSpec = DIFFUSION
    objective: Objective = Matching()
    """Any objective but `Matching` makes the flow an average velocity."""
    candidates: Candidates = Candidates()
    choose: Selection = Selection()
    temperature: Temperature = Tuned(2.16, of="weights", start=1.0)
    """lambda, tuned to the entropy of the weights in nats, at most log(own); log(own) minus it is the KL to the slow
    copy."""
    tau: float = 1e-3
    """Rate of the slow copy."""
    normalise_obs: NormaliseObs = "off"
    critic: Critics = Critics()
    optim: Optim = Optim(3e-4, max_grad_norm=10.0)

    def __post_init__(self):
        check_positive(self, "tau")
        if self.temperature.of == "actions":
            raise ValueError("PMD tunes its temperature to its weights: use Tuned(entropy, of='weights')")
        if self.objective.power:
            raise ValueError(f"PMD weights rows by their value only: use {type(self.objective).__name__}(power=0)")
        object.__setattr__(self, "flow", with_objective(self.flow, self.objective))

    @property
    def gamma(self) -> float:
        return self.critic.gamma

    def init(self, key: PRNGKey, spec: EnvSpec) -> PMDState:
        """Returns fresh networks for the sizes of `spec`; the slow copies are copies of them."""
        k_actor, k_critic = jr.split(key)
        actor = self.flow.init(k_actor, spec.action_dim, spec.observation, spec.horizon)
        critic, target, critic_opt = self.critic.init(k_critic, spec)
        return PMDState(
            actor, jax.tree.map(jnp.copy, actor), critic, target, self.optim.init(actor), critic_opt,
            self.temperature.first(), jnp.zeros((), jnp.int32), initial_moments(self.normalise_obs, spec),
        )  # fmt: skip

    def policy(self, state: PMDState) -> Policy:
        """Returns the policy that picks a particle by Q(s, a) and adds noise while exploring."""
        best = BestOf(FlowPolicy(state.actor), state.critic, state.temperature, self.choose.explore, self.choose.greedy)
        return normalised(state.stats, Noisy(best, None, self.candidates.noise))

    def update(self, state: PMDState, batch: Batch, key: PRNGKey) -> tuple[PMDState, Metrics]:
        """Makes one step of the critics, the actor and the slow copies on a batch [B]."""
        k_next, k_critic, k_candidates, k_uniform, k_match = jr.split(key, 5)
        n, lam, settings = batch.reward.shape[0], state.temperature, self.candidates
        stats, batch = update_and_normalise(state.stats, batch, self.normalise_obs)

        # 1. Critic, with a' from the slow copy.
        slow = FlowPolicy(state.slow)
        backup = BestOf(slow, state.target, lam, self.choose.backup, self.choose.backup)
        action = jax.vmap(backup)(batch.next_obs, jr.split(k_next, n))
        critic, target, critic_opt, metrics = self.critic.learn(
            state.critic, state.target, state.critic_opt, batch, action, k_critic
        )

        # 2. Candidates from the slow copy and their weights.
        def propose(obs, key):
            """Returns (actions, weights, entropy of the softmax) of the candidates at one observation."""
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

        # 3. Actor: weighted matching, plus the consistency of larger steps on the same rows for average velocities.
        def actor_loss(actor):
            """Mean over observations, actions and coordinates."""

            def one(obs, action, w, key):
                """Returns the weighted loss of one candidate [d]."""
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
        """Returns the settings with the flow of a pretrained policy."""
        flow, stats = flow_of(policy, self)
        return replace(self, flow=flow.spec, normalise_obs=pretrained_mode(self.normalise_obs, stats))

    def adopt(self, state: PMDState, policy: Policy) -> PMDState:
        """Returns the state with the networks of a pretrained policy."""
        actor, stats = adopted(self.flow, policy, self)
        slow = jax.tree.map(jnp.copy, actor)
        return replace(state, actor=actor, slow=slow, stats=state.stats if stats is None else stats)


PRESETS = (
    Preset("pmd", PMD(), "Policy mirror descent", "2502.00361", "candidates of the policy weighted by exp(Q / lambda)"),
)
