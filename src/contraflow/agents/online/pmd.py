"""Policy mirror descent: a flow or diffusion policy is matched to its own better actions, each weighted by its value.

With candidates a_i of a slow copy of the policy, the weights w_i and x_0 ~ N(0, I) the loss is

    mean_i w_i |f(x_t, t, s) - f*(a_i, x_0)|^2,      x_t = alpha_t a_i + beta_t x_0.

Its minimum is the law pi_old(a) w(a) / E[w]: with w ~ exp(Q / lambda) an iterate of mirror descent. DPMD (2502.00361),
FPMD (2507.23675) and QVPO (2405.16173) differ in the weights, the copy, and the noise: they are presets.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PyTree

from contraflow.core.optim import check_positive, clipped_adam, gradient_step, start
from contraflow.core.types import EnvSpec, Metrics, PRNGKey, Transition
from contraflow.flow.fewstep import Matching, Objective
from contraflow.flow.path import VP
from contraflow.nets.critic import QEnsemble
from contraflow.policy.select import Argmax, Selector, Softmax, pick
from contraflow.rl.critics import Critics, polyak
from contraflow.rl.flow_policy import FlowPolicy, Network
from contraflow.rl.normalise import RunningMoments, first_stats, look, seen
from contraflow.rl.temperature import Schedule, Tuned, current


class PMDState(eqx.Module):
    actor: Network
    slow: Network
    critic: QEnsemble
    target: QEnsemble
    actor_opt: PyTree
    critic_opt: PyTree
    step: Int[Array, ""]
    log_lam: Float[Array, ""] | None = None  # of a tuned temperature
    stats: RunningMoments | None = None  # of observations, where they are normalised


@dataclass(frozen=True)
class PMD:
    """Per update and sample: (n_backup + candidates) F actor calls, F the policy's steps, as many critic calls, and
    candidates + uniform evaluations with gradients."""

    acting: ClassVar[tuple[str, ...]] = ("actor", "critic", "step", "log_lam", "stats")

    policy: FlowPolicy = FlowPolicy(path=VP(), predict="noise", clip=1.0, steps=20)
    objective: Objective = Matching()
    """Other than `Matching` it needs, and gets, an averaged policy."""
    candidates: int = 64
    """Actions of the slow copy for each observation."""
    uniform: int = 0
    """Uniform ones beside them, which keep the policy wide."""
    uniform_share: float = 0.02
    """Their weight, in units of the largest weight of the others."""
    weight: Literal["boltzmann", "advantage"] = "boltzmann"
    """n softmax_i(Q_i / lambda) within a state; or max(Q_i - mean Q, 0) for the best alone."""
    temperature: Schedule | Tuned = Tuned(2.16, of="weights", start=1.0)
    """lambda; tuned to the entropy of the weights in nats, at most log(candidates): KL to the slow copy is the gap."""
    follow: float = 1e-3
    """Rate at which the slow copy follows."""
    noise: float = 0.2
    """Standard deviation of what is added to candidates, and to actions while exploring."""
    explore: Selector = Softmax(1)
    backup: Selector = Softmax(1)
    greedy: Selector = Argmax(32)
    normalise_obs: bool = False
    """Observations less their mean, divided by their deviation, of all replayed so far."""
    critic: Critics = Critics()
    actor_lr: float = 3e-4
    decay_steps: int | None = None
    """Updates over which the learning rate falls to a tenth; None keeps it constant."""
    max_grad_norm: float | None = 10.0

    def __post_init__(self):
        check_positive(self, "candidates", "follow", "actor_lr")
        if self.uniform < 0 or self.uniform_share < 0 or self.noise < 0:
            raise ValueError("uniform, uniform_share and noise must not be negative")
        if isinstance(self.temperature, Tuned) and self.temperature.of != "weights":
            raise ValueError("PMD tunes its temperature to its weights: use Tuned(entropy, of='weights')")
        if self.objective.power:
            raise ValueError(f"PMD weighs rows by their value alone: use {type(self.objective).__name__}(power=0)")
        if self.objective.averaged != self.policy.averaged:
            object.__setattr__(self, "policy", replace(self.policy, averaged=self.objective.averaged))

    def init(self, key: PRNGKey, spec: EnvSpec) -> PMDState:
        """Fresh networks for `spec`'s sizes; the slow copies are copies."""
        k_actor, k_critic = jr.split(key)
        actor = self.policy.init(k_actor, spec)
        critic, target, critic_opt = self.critic.init(k_critic, spec)
        log_lam = self.temperature.first() if isinstance(self.temperature, Tuned) else None
        slow, step = jax.tree.map(jnp.copy, actor), jnp.zeros((), jnp.int32)
        stats = first_stats(self.normalise_obs, spec)
        return PMDState(actor, slow, critic, target, start(self._tx, actor), critic_opt, step, log_lam, stats)

    def lam(self, state: PMDState) -> Float[Array, ""]:
        """The temperature at the state's update."""
        return current(self.temperature, state.step, state.log_lam)

    def act(self, state: PMDState, obs: Float[Array, " o"], key: PRNGKey, explore: bool) -> Float[Array, " a"]:
        """Of the particles of `explore` or `greedy` the one picked by Q(s, a), with noise while exploring."""
        k_pick, k_noise = jr.split(key)
        obs, selector = seen(state.stats, obs), self.explore if explore else self.greedy
        action = self._best(state.actor, state.critic, obs, k_pick, selector, state)
        return jnp.clip(action + explore * self.noise * jr.normal(k_noise, action.shape), -1.0, 1.0)

    def update(self, state: PMDState, batch: Transition, key: PRNGKey) -> tuple[PMDState, Metrics]:
        """One step of the critics, the actor and the slow copies on a batch [B]."""
        k_next, k_critic, k_candidates, k_uniform, k_match = jr.split(key, 5)
        n = batch.reward.shape[0]
        stats, batch = look(state.stats, batch)
        lam = self.lam(state)

        # 1. Critic, with a' of the slow copy.
        keys = jr.split(k_next, n)
        action = jax.vmap(lambda o, k: self._best(state.slow, state.target, o, k, self.backup, state))(
            batch.next_obs, keys
        )
        critic, target, critic_opt, metrics = self.critic.learn(
            state.critic, state.target, state.critic_opt, batch, action, k_critic
        )

        # 2. Candidates of the slow copy and their weights.
        def propose(obs, key):
            """(actions, weights, entropy of the softmax) of the candidates at one observation."""
            k_policy, k_noise = jr.split(key)
            a = self._draw(state.slow, obs, k_policy, self.candidates)
            a = jnp.clip(a + self.noise * jr.normal(k_noise, a.shape), -1.0, 1.0)
            q = jax.vmap(lambda a: critic.value(obs, a))(a)
            p = jax.nn.softmax(q / lam)
            w = self.candidates * p
            if self.weight == "advantage":
                best = jnp.argmax(q)
                a, w = a[best][None], jax.nn.relu(q[best] - q.mean())[None]
            return a, w, -jnp.sum(p * jnp.log(jnp.maximum(p, 1e-20)))

        actions, weights, entropy = jax.vmap(propose)(batch.obs, jr.split(k_candidates, n))
        if self.uniform:
            wide = jr.uniform(k_uniform, (n, self.uniform, actions.shape[-1]), minval=-1.0, maxval=1.0)
            share = self.uniform_share * jnp.max(weights, 1, keepdims=True)
            actions = jnp.concatenate([actions, wide], 1)
            weights = jnp.concatenate([weights, jnp.broadcast_to(share, wide.shape[:2])], 1)

        # 3. Actor: weighted matching; where steps are tied, all of the same rows again.
        def actor_loss(actor):
            """Mean over observations, actions and coordinates."""

            def one(obs, x1, w, key):
                k_x0, k_match, k_tie = jr.split(key, 3)
                x0 = jr.normal(k_x0, x1.shape)
                loss = jnp.mean(self.policy.match_error(actor, obs, x0, x1, k_match) ** 2)
                if self.objective.averaged:
                    tie = self.policy.consistency_error(self.objective, actor, state.slow, obs, x0, x1, k_tie)
                    loss = self.objective.share * loss + (1 - self.objective.share) * jnp.mean(tie**2)
                return w * loss

            keys = jr.split(k_match, weights.shape)
            return jnp.mean(jax.vmap(jax.vmap(one, (None, 0, 0, 0)))(batch.obs, actions, weights, keys))

        actor, actor_opt, loss, grad_norm = gradient_step(self._tx, actor_loss, state.actor, state.actor_opt)
        slow = polyak(actor, state.slow, self.follow)
        metrics |= {"actor_loss": loss, "actor_grad_norm": grad_norm, "temperature": lam, "entropy": entropy.mean()}
        log_lam = state.log_lam
        if isinstance(self.temperature, Tuned) and log_lam is not None:
            log_lam = self.temperature.move(log_lam, entropy.mean())
        return PMDState(actor, slow, critic, target, actor_opt, critic_opt, state.step + 1, log_lam, stats), metrics

    def _draw(self, actor: Network, obs: Float[Array, " o"], key: PRNGKey, n: int) -> Float[Array, "n a"]:
        x0 = jr.normal(key, (n, actor.dim))
        return jnp.clip(jax.vmap(lambda x: self.policy(actor, x, obs))(x0), -1.0, 1.0)

    def _best(
        self,
        actor: Network,
        critic: QEnsemble,
        obs: Float[Array, " o"],
        key: PRNGKey,
        selector: Selector,
        state: PMDState,
    ) -> Float[Array, " a"]:
        k_draw, k_pick = jr.split(key)
        actions = self._draw(actor, obs, k_draw, selector.particles)
        return actions[pick(selector, k_pick, critic, obs, actions, self.lam(state))]

    @property
    def _tx(self):
        return clipped_adam(self.actor_lr, self.max_grad_norm, self.decay_steps)
