"""Reverse Flow Matching (arXiv 2601.08136): a flow policy for exp(Q / lambda), trained without samples of it.

The velocity v(x_t, t, s) is regressed on the posterior mean E[x1 | x_t] under pi(u) ~ exp(Q(s, tanh u) / lambda) times
the tanh Jacobian, which an estimator finds without samples of pi. `RFM()` is our default, with `Gibbs`. The paper's
importance sampling with a Stein control variate is `Reverse`, its settings the preset `rfm-paper`; with `Fixed(0)` and
`Fixed(1)` as control it is a noise- or gradient-expectation method.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PyTree

from contraflow.core.optim import check_positive, clipped_adam, gradient_step, start
from contraflow.core.types import EnvSpec, Metrics, PRNGKey, Transition
from contraflow.flow.fewstep import Matching, Objective
from contraflow.flow.likelihood import PolicyDensity, Pushforward
from contraflow.flow.matching import Predict
from contraflow.flow.path import Linear, Path
from contraflow.flow.posterior.estimator import Estimator
from contraflow.flow.posterior.gibbs import Gibbs
from contraflow.flow.posterior.importance import Pooled, Reverse
from contraflow.flow.posterior.local import Local
from contraflow.flow.solver import EulerMaruyama, Midpoint, Solver
from contraflow.flow.targets import LogDensity
from contraflow.nets.critic import QEnsemble
from contraflow.nets.layers import time_embedding
from contraflow.nets.velocity import Velocity
from contraflow.policy.select import Argmax, First, Selector, Softmax, pick
from contraflow.rl.critics import Critics, polyak
from contraflow.rl.energy import boltzmann, boltzmann_in_box
from contraflow.rl.latent_flow import Bounds, LatentFlow
from contraflow.rl.normalise import RunningMoments, first_stats, look, seen
from contraflow.rl.temperature import Schedule, Tuned, current, nearest_entropy


class RFMState(eqx.Module):
    actor: Velocity
    critic: QEnsemble
    target: QEnsemble
    actor_opt: PyTree
    critic_opt: PyTree
    step: Int[Array, ""]
    log_lam: Float[Array, ""] | None = None  # of a tuned temperature, None of the others
    slow: Velocity | None = None  # teaches average velocities, None of the others
    stats: RunningMoments | None = None  # of observations, where they are normalised


@dataclass(frozen=True)
class RFM:
    """Per update and sample: (n_backup + n_query) F actor calls, F evaluations of the solver, n critic calls for each
    of these two that has a choice (n > 1, not `First`), and those of the estimator. Per action: n F actor calls; with
    a choice, n critic calls."""

    acting: ClassVar[tuple[str, ...]] = ("actor", "critic", "step", "log_lam", "stats")

    path: Path = Linear()
    estimator: Estimator = Gibbs()
    solver: Solver = Midpoint(steps=2)
    explore: Selector = Softmax(particles=32)
    """Acting during training: how one of n particles is picked by Q / behaviour temperature."""
    backup: Selector = Softmax(particles=4)
    """The action of the temporal-difference target."""
    query: Selector = First()
    """The policy's endpoint that is noised to x_t; its particles are the estimator's `support`, that one first."""
    greedy: Selector = Argmax(particles=32)
    """Acting in evaluation."""
    temperature: Schedule | Tuned = Tuned()
    """lambda of the target law and of `backup`, whose particles tell the entropy of actions where it is tuned."""
    behaviour: Schedule | None = None
    """Temperature of `explore`; None uses `temperature`."""
    bounds: Bounds = "tanh"
    """Actions are the tanh of the flow's end u, or u itself, clipped; then pi is exp(Q / lambda) on the box, exactly so
    for candidates that lie in it (`TruncatedNoise`). The box has no control variate."""
    base: float = 1.0
    """kappa in log pi(u) = Q / lambda + kappa sum log sech^2 u, for tanh; 1 is exactly Boltzmann over actions."""
    predict: Predict = "velocity"
    """What the actor returns; a step of the solver makes a velocity of it."""
    objective: Objective = Matching()
    """Others make the actor an average velocity u(x, t, r), matched at r = t and tied to itself elsewhere: then each
    step of `solver`, Euler(n), is a whole one, and Euler(1) acts in one evaluation."""
    follow: float = 0.005
    """Rate at which the slow copy follows that teaches average velocities."""
    density: PolicyDensity | None = None
    """How log pi is found for a soft backup, in which the value of s' has the bonus -lambda log pi(a' | s'), and for a
    tuned temperature; None leaves the backup hard."""
    endpoint: Literal["policy", "buffer"] = "policy"
    """Which x1 is noised to the query point x_t."""
    condition_on_temperature: bool = False
    t_min: float = 0.01
    """Times are drawn from, and the flow is solved over, [t_min, 1 - t_min]."""
    normalise_obs: bool = False
    """Observations less their mean, divided by their deviation, of all replayed so far."""
    critic: Critics = Critics()
    width: int = 64
    depth: int = 2
    embedding: int = 128
    actor_lr: float = 1e-3
    decay_steps: int | None = None
    """Updates over which the learning rate falls to a tenth; None keeps it constant."""
    max_grad_norm: float | None = 10.0

    def __post_init__(self):
        check_positive(self, "width", "depth", "actor_lr", "follow")
        _ = self.flow  # which refuses what does not fit together
        if isinstance(self.temperature, Tuned):
            if self.temperature.of == "weights" and isinstance(self.estimator, Local):
                raise ValueError("Local has no weights: tune the temperature to the entropy of actions")
            if self.temperature.of == "actions" and self.backup.particles < 4 and self.density is None:
                n = self.backup.particles
                raise ValueError(f"a tuned temperature needs `density` or at least 4 particles in `backup`, got {n}")
        parts = self.estimator.parts if isinstance(self.estimator, Pooled) else (self.estimator,)
        if self.bounds == "box" and not all(
            isinstance(e, Local) or (isinstance(e, Reverse) and not e.control.active) for e in parts
        ):
            raise ValueError(
                "bounds='box' needs the estimator Local, or Reverse (or Pooled of it) with control=Fixed(0)"
            )
        if isinstance(self.density, Pushforward) and isinstance(self.solver, EulerMaruyama):
            raise ValueError("the density Pushforward needs a solver without noise, not EulerMaruyama")

    @property
    def flow(self) -> LatentFlow:
        """The flow by itself."""
        sizes = self.width, self.depth, self.embedding
        return LatentFlow(self.path, self.solver, self.bounds, self.predict, self.objective, self.t_min, *sizes)

    def init(self, key: PRNGKey, spec: EnvSpec) -> RFMState:
        """Fresh networks for `spec`'s sizes; the target critic is a copy of the critic."""
        k_actor, k_critic = jr.split(key)
        cond = spec.obs_dim + self.embedding * self.condition_on_temperature
        actor = self.flow.init(k_actor, spec.action_dim, cond)
        critic, target, critic_opt = self.critic.init(k_critic, spec)
        log_lam = self.temperature.first() if isinstance(self.temperature, Tuned) else None
        step = jnp.zeros((), jnp.int32)
        slow = jax.tree.map(jnp.copy, actor) if self.objective.averaged else None
        stats = first_stats(self.normalise_obs, spec)
        return RFMState(actor, critic, target, start(self._tx, actor), critic_opt, step, log_lam, slow, stats)

    def lam(self, state: RFMState) -> Float[Array, ""]:
        """The temperature at the state's update."""
        return current(self.temperature, state.step, state.log_lam)

    def act(self, state: RFMState, obs: Float[Array, " o"], key: PRNGKey, explore: bool) -> Float[Array, " a"]:
        """An action in [-1, 1]^a: of the particles of `explore` or `greedy`, the one picked by Q(s, a)."""
        lam = self.lam(state) if self.behaviour is None else self.behaviour(state.step)
        obs, selector = seen(state.stats, obs), self.explore if explore else self.greedy
        _, u, best = self._particles(state, obs, key, selector, lam)
        return self.flow.action(u[best])

    def log_pi(self, critic: QEnsemble, obs: Float[Array, " o"], lam: Float[Array, ""]) -> LogDensity:
        """The target law of u at one observation, as networks get it."""
        q = lambda a: critic.value(obs, a)
        return boltzmann(q, lam, self.base) if self.bounds == "tanh" else boltzmann_in_box(q, lam)

    def update(self, state: RFMState, batch: Transition, key: PRNGKey) -> tuple[RFMState, Metrics]:
        """One step of the critics, the actor and the targets on a batch [B] (2601.08136)."""
        k_next, k_now, k_t, k_x0, k_posterior, k_critic, k_density, k_tie = jr.split(key, 8)
        n = batch.reward.shape[0]
        stats, batch = look(state.stats, batch)
        lam, flow = self.lam(state), self.flow

        # 1. Critic, with a' ~ pi(. | s'), hard unless log pi(a' | s') is asked for.
        def following(obs, key, key_density):
            x0, u, best = self._particles(state, obs, key, self.backup, lam)
            actions = flow.action(u)
            if self.density is None:
                return actions, best, nearest_entropy(actions) if u.shape[0] > 1 else jnp.zeros(())
            cond = self._condition(obs, lam)
            log_pi = flow.log_prob(self.density, state.actor, cond, x0[best], u[best], key_density)
            return actions, best, -log_pi / u.shape[-1]

        keys = jr.split(k_next, n), jr.split(k_density, n)
        actions, picks, entropy = jax.vmap(following)(batch.next_obs, *keys)
        action = jax.vmap(lambda a, best: a[best])(actions, picks)
        bonus = 0.0 if self.density is None else lam * entropy * action.shape[-1]
        critic, target, critic_opt, metrics = self.critic.learn(
            state.critic, state.target, state.critic_opt, batch, action, k_critic, bonus
        )

        # 2. Query points x_t: an endpoint of the policy (or the buffer), noised. Any law with full support is valid.
        t = jr.uniform(k_t, (n,), minval=self.t_min, maxval=1 - self.t_min)
        if self.endpoint == "policy":
            support = self.endpoints(state, batch.obs, k_now)
        else:
            support = flow.latent(batch.action)[:, None]
        x1 = support[:, 0]
        x_t = jax.vmap(self.path.perturb)(jr.normal(k_x0, x1.shape), x1, t)

        # 3. The posterior mean of x1 under the critic just updated.
        def posterior(key, x_t, t, obs, support):
            return self.estimator(key, self.path, self.log_pi(critic, obs, lam), x_t, t, support)

        post = jax.vmap(posterior)(jr.split(k_posterior, n), x_t, t, batch.obs, support)

        # 4. Actor: regression on the velocity, or noise, of that mean; longer steps are tied to shorter ones.
        def actor_loss(actor):
            cond = jax.vmap(lambda obs: self._condition(obs, lam))(batch.obs)
            loss = jnp.mean(jax.vmap(flow.match, (None, 0, 0, 0, 0))(actor, cond, post.mean, x_t, t))
            if state.slow is None:
                return loss
            tie = jax.vmap(flow.tie, (None, None, 0, 0, 0))(actor, state.slow, cond, x1, jr.split(k_tie, n))
            return self.objective.share * loss + (1 - self.objective.share) * jnp.mean(tie)

        actor, actor_opt, loss, grad_norm = gradient_step(self._tx, actor_loss, state.actor, state.actor_opt)
        slow = None if state.slow is None else polyak(actor, state.slow, self.follow)
        metrics |= {
            "actor_loss": loss,
            "actor_grad_norm": grad_norm,
            "ess": post.ess.mean(),
            "eta": post.eta.mean(),
            "temperature": lam,
        }
        log_lam = state.log_lam
        if isinstance(self.temperature, Tuned) and log_lam is not None:
            of_actions = self.temperature.of == "actions"
            metrics["entropy"] = entropy.mean() if of_actions else jnp.mean(jnp.log(post.ess))
            log_lam = self.temperature.move(log_lam, metrics["entropy"])
        return RFMState(actor, critic, target, actor_opt, critic_opt, state.step + 1, log_lam, slow, stats), metrics

    def endpoints(self, state: RFMState, obs: Float[Array, "B o"], key: PRNGKey) -> Float[Array, "B n a"]:
        """Latent particles of the policy for each observation, as networks get it; that picked by `query` first."""
        lam = self.lam(state)

        def one(obs, key):
            _, u, best = self._particles(state, obs, key, self.query, lam)
            return jnp.roll(u, -best, axis=0)

        return jax.vmap(one)(obs, jr.split(key, obs.shape[0]))

    def _condition(self, obs: Float[Array, " o"], lam: Float[Array, ""]) -> Float[Array, " c"]:
        return jnp.concatenate([obs, time_embedding(lam, self.embedding)]) if self.condition_on_temperature else obs

    def _particles(
        self, state: RFMState, obs: Float[Array, " o"], key: PRNGKey, selector: Selector, pick_lam: Float[Array, ""]
    ) -> tuple[Float[Array, "n a"], Float[Array, "n a"], Int[Array, ""]]:
        """n noises, the latent actions u that they end in, and the index the selector picks by Q(s, a) / pick_lam."""
        k_x0, k_pick = jr.split(key)
        cond = self._condition(obs, self.lam(state))
        x0, u = self.flow.draw(state.actor, cond, k_x0, selector.particles)
        return x0, u, pick(selector, k_pick, state.critic, obs, self.flow.action(u), pick_lam)

    @property
    def _tx(self):
        return clipped_adam(self.actor_lr, self.max_grad_norm, self.decay_steps)
