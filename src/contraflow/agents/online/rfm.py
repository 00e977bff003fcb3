"""Reverse Flow Matching (arXiv 2601.08136): a flow policy for exp(Q / lambda), trained without samples of it.

The velocity v(x_t, t, s) is regressed on the posterior mean E[x1 | x_t] under pi(u) ~ exp(Q(s, a(u)) / lambda)
|da/du|, which an estimator computes without samples of pi. The default `RFM()` uses `Gibbs`, and `ModeJump` to find
modes that the policy lacks. The paper uses importance sampling with a Stein control variate (`Reverse`), and its
settings are the preset `rfm-paper`. With `Fixed(0)` or `Fixed(1)` as control it is a noise- or gradient-expectation
method; several of these are presets in separate files.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PyTree

from contraflow.agents.base import Preset, adopted, flow_of, takes_temperature
from contraflow.core.observation import rows
from contraflow.core.optim import Optim, check_positive, gradient_step
from contraflow.core.types import Batch, EnvSpec, Metrics, Obs, PRNGKey
from contraflow.flow.fewstep import Matching, MeanFlow, Objective
from contraflow.flow.likelihood import FlowDensity, Pushforward, action_log_prob
from contraflow.flow.matching import consistency_error, posterior_error, square, with_objective
from contraflow.flow.model import Ddim, Flow, FlowSpec
from contraflow.flow.posterior.control import MinVariance
from contraflow.flow.posterior.estimator import Estimator
from contraflow.flow.posterior.gibbs import Gibbs
from contraflow.flow.posterior.importance import Reverse
from contraflow.flow.posterior.jump import ModeJump
from contraflow.flow.posterior.local import Local
from contraflow.flow.posterior.markov import Markov
from contraflow.flow.posterior.proposal import Noise
from contraflow.flow.solver import Euler, EulerMaruyama, Midpoint
from contraflow.flow.support import Box, Real, Tanh
from contraflow.flow.targets import LogDensity
from contraflow.nets.critic import QEnsemble
from contraflow.nets.heads import Categorical
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.base import Policy
from contraflow.policy.best_of import Argmax, BestOf, First, Selector, Softmax, chooses, pick
from contraflow.policy.flow import FlowPolicy, condition
from contraflow.policy.normalise import RunningMoments, normalised
from contraflow.rl.critics import Critics, polyak
from contraflow.rl.diagnostics import target_quality, value_gap
from contraflow.rl.energy import boltzmann, boltzmann_in_box
from contraflow.rl.normalise import NormaliseObs, initial_moments, normalise, pretrained_mode, update_and_normalise
from contraflow.rl.temperature import Anneal, Constant, Temperature, Tuned, nearest_entropy

SMALL = FlowSpec(
    support=Tanh(),
    solver=Midpoint(3, power=1.5),
    margin=0.01,
    clock=1.0,
    network=ResidualMLP(width=64, depth=2, embedding=128),
)

ROWS, DRAWS = 4, 32  # for the entropy: two modes need many particles per state, the mean needs few states


@dataclass(frozen=True)
class PosteriorTarget:
    """The regression target of the flow. Raises ValueError for a query that breaks the estimator's invariance."""

    estimator: Estimator = Gibbs()
    endpoint: Literal["policy", "buffer"] = "policy"
    """The source of the x1 that is noised to the query point x_t."""
    query: Selector = First()
    """Selects the policy's endpoint to noise; its particles are the estimator's `support`, that endpoint first."""
    jump: ModeJump | None = None
    """Moves a share of the policy's endpoints between modes before they are noised."""
    jacobian_power: float = 1.0
    """kappa in log pi(u) = Q / lambda + kappa sum log sech^2 u, for tanh; 1 is exactly Boltzmann over actions."""

    def __post_init__(self):
        if self.estimator.invariant_start and (self.endpoint == "buffer" or chooses(self.query)):
            name = type(self.estimator).__name__
            raise ValueError(
                f"{name} starts its chains at the policy's own endpoint: use endpoint='policy' and query=First()"
            )
        if self.jump is not None and self.endpoint == "buffer":
            raise ValueError("a jump starts at the policy's own endpoint: use endpoint='policy', or jump=None")


@dataclass(frozen=True)
class Choice:
    """Rules to pick one of n particles by Q / lambda: while exploring, in the critic's targets, and in evaluation."""

    explore: Selector = Softmax(particles=32)
    backup: Selector = Softmax(particles=4)
    greedy: Selector = Argmax(particles=32)


class RFMState(eqx.Module):
    """Everything that RFM learns: actor, critics, temperature, optimisers and statistics."""

    actor: Flow
    critic: QEnsemble
    target: QEnsemble
    actor_opt: PyTree
    critic_opt: PyTree
    temperature: Float[Array, ""]
    step: Int[Array, ""]
    slow: Flow | None = None  # provides targets of average velocities; None for other flows
    stats: RunningMoments | None = None  # of observations; None if they are not normalised


@dataclass(frozen=True)
class RFM:
    """Reverse Flow Matching (2601.08136).

    Let the solver take F evaluations. Cost per update and sample: (n_backup + n_query) F actor evaluations, n critic
    evaluations for each of these two selectors that uses scores (n > 1, not `First`), and those of the estimator and
    the jump. Cost per action: n F actor evaluations, and n critic evaluations if the selector uses scores. Raises
    ValueError for settings that do not fit together.
    """

    flow: FlowSpec = SMALL
    target: PosteriorTarget = PosteriorTarget(jump=ModeJump())
    choose: Choice = Choice()
    temperature: Temperature = Tuned()
    """lambda of the target distribution and of the selectors. If it is tuned to the entropy of actions, that entropy is
    estimated from 32 particles at each of 4 observations, or by `density`."""
    density: FlowDensity | None = None
    """Estimates log pi for a tuned temperature and for a soft backup, where the value of s' has the bonus
    -lambda log pi(a' | s'). None makes the backup hard."""
    objective: Objective = Matching()
    """Any objective but `Matching` makes the flow an average velocity u(x, t, r), matched at r = t and made consistent
    elsewhere. Each step of `Ddim(n)` is then exact, and one evaluation is enough."""
    tau: float = 0.005
    """Rate of the slow copy that provides targets of average velocities."""
    condition_on_temperature: bool = False
    normalise_obs: NormaliseObs = "off"
    critic: Critics = Critics()
    optim: Optim = Optim(1e-3, max_grad_norm=10.0)

    def __post_init__(self):
        check_positive(self, "tau")
        object.__setattr__(self, "flow", with_objective(self.flow, self.objective))
        if not self.flow.margin > 0:
            raise ValueError("posterior means are estimated within (0, 1): set flow.margin above 0")
        support = self.flow.support.name
        if not self.target.estimator.suits(support):
            raise ValueError(f"the estimator {self.target.estimator} does not suit actions bounded by {support}")
        if self.target.jump is not None and isinstance(self.flow.support, Real):
            raise ValueError("a jump starts from uniform actions: use flow.support Tanh() or Box(), or jump=None")
        if self.temperature.of == "weights" and isinstance(self.target.estimator, Local):
            raise ValueError("Local has no weights: tune the temperature to the entropy of actions")
        if isinstance(self.density, Pushforward) and isinstance(self.flow.solver, EulerMaruyama):
            raise ValueError("the density Pushforward needs a solver without noise, not EulerMaruyama")

    @property
    def gamma(self) -> float:
        return self.critic.gamma

    def init(self, key: PRNGKey, spec: EnvSpec) -> RFMState:
        """Returns fresh networks for the sizes of `spec`; the target critic is a copy of the critic."""
        k_actor, k_critic = jr.split(key)
        told = self.flow.network.embedding * self.condition_on_temperature
        actor = self.flow.init(k_actor, spec.action_dim, spec.observation, spec.horizon, told)
        critic, target, critic_opt = self.critic.init(k_critic, spec)
        slow = jax.tree.map(jnp.copy, actor) if self.objective.averaged else None
        return RFMState(
            actor, critic, target, self.optim.init(actor), critic_opt, self.temperature.first(),
            jnp.zeros((), jnp.int32), slow, initial_moments(self.normalise_obs, spec),
        )  # fmt: skip

    def policy(self, state: RFMState) -> Policy:
        """Returns the policy that picks a particle by Q(s, a)."""
        flow = FlowPolicy(state.actor, self._told(state))
        best = BestOf(flow, state.critic, state.temperature, self.choose.explore, self.choose.greedy)
        return normalised(state.stats, best)

    def update(self, state: RFMState, batch: Batch, key: PRNGKey) -> tuple[RFMState, Metrics]:
        """Makes one step of the critics, the actor and the targets on a batch [B] (2601.08136)."""
        k_next, k_now, k_t, k_x0, k_posterior, k_critic, k_density, k_tie = jr.split(key, 8)
        k_jump, k_entropy = jr.fold_in(k_now, 1), jr.fold_in(k_density, 1)
        n, lam, path = batch.reward.shape[0], state.temperature, self.flow.path
        stats, batch = update_and_normalise(state.stats, batch, self.normalise_obs)

        # 1. Critic, with a' ~ pi(. | s'); the backup is soft if `density` is set.
        def following(obs, key, key_density):
            """Returns a', and -log pi(a' | s') per dimension (0 without a density)."""
            x0, u, best = self._particles(state, obs, key, self.choose.backup)
            action = state.actor.action(u[best])
            if self.density is None:
                return action, jnp.zeros(())
            cond = condition(state.actor, obs, self._told(state))
            log_pi = action_log_prob(self.density, state.actor, cond, x0[best], u[best], key_density)
            return action, -log_pi / u.shape[-1]

        action, surprise = jax.vmap(following)(batch.next_obs, jr.split(k_next, n), jr.split(k_density, n))
        bonus = 0.0 if self.density is None else lam * surprise * action.shape[-1]
        critic, target, critic_opt, metrics = self.critic.learn(
            state.critic, state.target, state.critic_opt, batch, action, k_critic, bonus
        )

        # 2. Query points x_t: a noised endpoint of the policy or the buffer. Any distribution with full support works.
        t = jr.uniform(k_t, (n,), minval=self.flow.margin, maxval=1 - self.flow.margin)
        if self.target.endpoint == "policy":
            support = self.endpoints(state, batch.obs, k_now)
        else:
            support = self.flow.support.latent(batch.action)[:, None]
        if (jump := self.target.jump) is not None:
            few, bounds = math.ceil(jump.share * n), self.flow.support
            assert not isinstance(bounds, Real)
            move = lambda key, obs, u: jump(key, self.log_pi(critic, obs, lam), u, bounds)
            keys, some = jr.split(k_jump, few), jax.tree.map(lambda x: x[:few], batch.obs)
            moved, jumped = jax.vmap(move)(keys, some, support[:few, 0])
            support = support.at[:few, 0].set(moved)
            metrics["jumps"] = jumped.mean()
        x1 = support[:, 0]
        x_t = jax.vmap(path.perturb)(jr.normal(k_x0, x1.shape), x1, t)

        # 3. The posterior mean of x1 under the updated critic.
        def posterior(key, x_t, t, obs, support):
            return self.target.estimator(key, path, self.log_pi(critic, obs, lam), x_t, t, support)

        post = jax.vmap(posterior)(jr.split(k_posterior, n), x_t, t, batch.obs, support)

        # 4. Actor: regression on the velocity or noise of that mean, plus the consistency of larger steps.
        slow = state.slow

        def actor_loss(actor):
            """Mean over observations and coordinates."""
            cond = jax.vmap(lambda obs: condition(actor, obs, self._told(state)))(batch.obs)
            loss = jnp.mean(jax.vmap(lambda *row: square(posterior_error(actor, *row)))(cond, post.mean, x_t, t))
            if slow is None:
                return loss
            teacher: Flow = slow

            def tie(obs, cond, x1, key):
                k_interval, k_x0, k_target = jr.split(key, 3)
                x0, slow_cond = jr.normal(k_x0, x1.shape), condition(teacher, obs, self._told(state))
                ends = cond, x0, x1, k_interval, k_target
                return square(consistency_error(self.objective, actor, teacher, *ends, slow_cond=slow_cond))

            tied = jnp.mean(jax.vmap(tie)(batch.obs, cond, x1, jr.split(k_tie, n)))
            return self.objective.share * loss + (1 - self.objective.share) * tied

        actor, actor_opt, loss, grad_norm = gradient_step(self.optim.tx, actor_loss, state.actor, state.actor_opt)
        slow = None if slow is None else polyak(actor, slow, self.tau)
        metrics |= {
            "actor_loss": loss,
            "actor_grad_norm": grad_norm,
            "ess": post.ess.mean(),
            "eta": post.eta.mean(),
            "temperature": lam,
        }
        if self.temperature.of is not None:
            if self.temperature.of == "weights":
                entropy = jnp.mean(jnp.log(post.ess))
            else:
                entropy = self._entropy(state, batch.obs, k_entropy) if self.density is None else surprise.mean()
            metrics["entropy"] = entropy
            lam = self.temperature.following(lam, state.step + 1, entropy)
        return RFMState(actor, critic, target, actor_opt, critic_opt, lam, state.step + 1, slow, stats), metrics

    def log_pi(self, critic: QEnsemble, obs: Obs, lam: Float[Array, ""]) -> LogDensity:
        """Returns the log-density of the target over u at one observation, given as the networks take it."""
        seen = critic.encode(obs)
        q = lambda a: critic.value(seen, a)
        if isinstance(self.flow.support, Box):
            return boltzmann_in_box(q, lam)
        return boltzmann(q, lam, self.target.jacobian_power)

    def endpoints(self, state: RFMState, obs: Obs, key: PRNGKey) -> Float[Array, "B n a"]:
        """Returns latent particles of the policy [B, n, a], the one picked by `query` first; `obs` is normalised."""

        def one(obs, key):
            _, u, best = self._particles(state, obs, key, self.target.query)
            return jnp.roll(u, -best, axis=0)

        return jax.vmap(one)(obs, jr.split(key, rows(obs)))

    def diagnostics(self, state: RFMState, obs: Obs, key: PRNGKey) -> dict[str, Float[Array, ""]]:
        """Returns diagnostics of the regression targets at these observations (rl/diagnostics.py)."""
        k_particles, k_target, k_gap = jr.split(key, 3)
        obs, lam = jax.vmap(lambda o: normalise(state.stats, o))(obs), state.temperature
        log_pi = lambda obs: self.log_pi(state.critic, obs, lam)
        support = self.endpoints(state, obs, k_particles)
        gap = value_gap(state.critic.value, lam, obs, support.shape[-1], k_gap)
        quality = target_quality(self.target.estimator, self.flow.path, log_pi, obs, support, k_target)
        return quality | {"q_gap": gap}

    def starting_from(self, policy: Policy) -> "RFM":
        """Returns the settings with the flow of a pretrained policy, and an estimator for its support."""
        flow, stats = flow_of(policy, self)
        spec = replace(flow.spec, margin=flow.spec.margin or self.flow.margin)
        target = self.target
        if isinstance(spec.support, Box) and isinstance(target.estimator, Gibbs):
            target = replace(target, estimator=replace(target.estimator, bound=1.0))
        if isinstance(spec.support, Real):
            target = replace(target, jump=None)  # it starts from uniform actions
        return replace(
            self,
            flow=spec,
            target=target,
            condition_on_temperature=takes_temperature(policy),
            normalise_obs=pretrained_mode(self.normalise_obs, stats),
        )

    def adopt(self, state: RFMState, policy: Policy) -> RFMState:
        """Returns the state with the networks of a pretrained policy."""
        actor, stats = adopted(self.flow, policy, self)
        slow = jax.tree.map(jnp.copy, actor) if self.objective.averaged else None
        return replace(state, actor=actor, slow=slow, stats=state.stats if stats is None else stats)

    def _told(self, state: RFMState) -> Float[Array, ""] | None:
        return state.temperature if self.condition_on_temperature else None

    def _entropy(self, state: RFMState, obs: Obs, key: PRNGKey) -> Float[Array, ""]:
        """Returns the entropy of the policy per dimension, averaged over a few rows with many particles each."""

        def one(obs, key):
            _, u = state.actor.particles(condition(state.actor, obs, self._told(state)), key, DRAWS)
            return nearest_entropy(state.actor.action(u))

        few = jax.tree.map(lambda x: x[:ROWS], obs)
        return jnp.mean(jax.vmap(one)(few, jr.split(key, rows(few))))

    def _particles(
        self, state: RFMState, obs: Obs, key: PRNGKey, selector: Selector
    ) -> tuple[Float[Array, "n a"], Float[Array, "n a"], Int[Array, ""]]:
        """Returns n noises, their latent actions u, and the index that the selector picks by Q(s, a) / lambda."""
        k_x0, k_pick = jr.split(key)
        x0, u = state.actor.particles(condition(state.actor, obs, self._told(state)), k_x0, selector.particles)
        return x0, u, pick(selector, k_pick, state.critic, obs, state.actor.action(u), state.temperature)


# The critics of the strongest published results: residual blocks with layer norm (SimBa, BRO), categorical values, two
# updates per step, normalised observations. Rewards in [0, 1] with gamma = .99 stay within the range of the head.
STRONG = Critics(
    width=256, head=Categorical(target="hl-gauss"), block="residual", optim=Optim(3e-4, max_grad_norm=10.0)
)
OFFICIAL = RFM(
    flow=replace(SMALL, solver=Euler(10), network=ResidualMLP(256, 2, 128)),
    target=PosteriorTarget(Reverse(100, Noise(), MinVariance()), query=Softmax(32)),
    choose=Choice(Softmax(32), Softmax(32), Argmax(32)),
    temperature=Constant(0.02),
    condition_on_temperature=True,
    critic=Critics(members=2, width=256, depth=2, gamma=0.99, tau=0.005, optim=Optim(1e-3, max_grad_norm=10.0)),
    optim=Optim(3e-4, max_grad_norm=10.0),
)
CARTPOLE = RFM(
    flow=replace(SMALL, solver=Midpoint(3), network=ResidualMLP(64, 2, 32)),
    target=PosteriorTarget(Markov()),
    choose=Choice(First(), First(), Argmax(32)),
    temperature=Anneal(0.2, 0.02, steps=50_000),
    critic=Critics(tau=0.02, optim=Optim(1e-3, decay_steps=58_000, max_grad_norm=10.0)),
    optim=Optim(3e-4, decay_steps=58_000, max_grad_norm=10.0),
)
WALKER = RFM(
    flow=replace(SMALL, solver=Midpoint(2), network=ResidualMLP(64, 2, 32)),
    target=PosteriorTarget(Gibbs(3)),
    choose=Choice(explore=First()),
    temperature=Tuned(0.0),
    critic=Critics(tau=0.02),
)
ARM = RFM(
    choose=Choice(explore=First()),  # explores with the policy as learned, because a choice by Q would sharpen it
    temperature=Tuned(0.0),
    critic=Critics(gamma=0.95, tau=0.02),
)
TITLE, PAPER = "Reverse Flow Matching", "2601.08136"
PRESETS = (
    Preset("rfm", RFM(), TITLE, PAPER, "our default: Gibbs steps, jumps between modes, tuned temperature"),
    Preset(
        "rfm-paper", OFFICIAL, TITLE, PAPER, "the official settings",
        run={
            "env": "envpool:CheetahRun-v1", "steps": 250_000, "collect": 10_000, "buffer_size": 250_000,
            "eval_episodes": 25,
        },
    ),
    Preset(
        "rfm-one", RFM(flow=replace(SMALL, solver=Ddim(1)), objective=MeanFlow()), TITLE, PAPER,
        "the default in one evaluation of the network",
    ),
    Preset(
        "rfm-max", RFM(critic=STRONG, normalise_obs="running"), TITLE, PAPER,
        "with residual, categorical critics and normalised observations", run={"updates": 2},
    ),
    Preset(
        "rfm-arm", ARM, TITLE, PAPER, "an arm of eight joints learns both ways to its target",
        run={
            "env": "jax:two-way-arm", "steps": 12_000, "collect": 1_000, "num_envs": 8, "updates": 4, "n_step": 3,
            "buffer_size": 12_000, "eval_every": 3_000, "eval_episodes": 16, "log_every": 1_000,
        },
    ),
    Preset(
        "rfm-walker", WALKER, TITLE, PAPER, "the main job of `make train`: a walker learns to walk",
        run={
            "env": "envpool:WalkerWalk-v1", "steps": 70_000, "collect": 4_000, "num_envs": 8, "updates": 4,
            "batch_size": 128, "n_step": 3, "buffer_size": 70_000, "eval_every": 10_000, "log_every": 2_000,
        },
    ),
    Preset(
        "rfm-cartpole", CARTPOLE, TITLE, PAPER, "the swing-up, with chains of Markov steps",
        run={
            "env": "envpool:CartpoleSwingup-v1", "steps": 120_000, "collect": 4_000, "num_envs": 8, "updates": 4,
            "n_step": 5, "buffer_size": 120_000, "eval_every": 10_000, "log_every": 2_000,
        },
    ),
)  # fmt: skip
