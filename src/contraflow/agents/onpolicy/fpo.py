"""Flow matching policy gradients, FPO (arXiv 2507.21053): PPO for a flow policy without likelihoods.

In place of log pi(a | s) stands minus the flow-matching loss of the action taken, which bounds it from below:

    rho = exp(mean_j l_old,j - mean_j l_new,j),   l_j = w(t_j) |v(x_{t_j}, t_j, s) - (a - eps_j)|^2,

with pairs (t_j, eps_j) drawn when the action is taken and kept. Noise enters at x_0 only. log rho is cut at +-3: one
outlier among weighted losses would own the gradient, or overflow.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.core.types import EnvSpec, Metrics, PRNGKey, Rollout
from contraflow.flow.path import Linear
from contraflow.rl.flow_policy import FlowPolicy, Network
from contraflow.rl.normalise import RunningMoments
from contraflow.rl.ppo import PPOState, Samples, check_ppo, clipped, first_state, improve, ratio_metrics, weighted_mean

EDGE = 1e-3  # times are drawn from [EDGE, 1 - EDGE]
CUT = 3.0


class Draw(eqx.Module):
    """What acting remembers: the action before it was clipped, the pairs and their losses."""

    action: Float[Array, "*batch a"]
    t: Float[Array, "*batch M"]
    noise: Float[Array, "*batch M a"]
    loss: Float[Array, "*batch M"]


@dataclass(frozen=True)
class FPO:
    """Per action `policy.steps` + `pairs` evaluations; per row of a minibatch `pairs`, with gradients."""

    acting: ClassVar[tuple[str, ...]] = ("actor", "stats")

    policy: FlowPolicy = FlowPolicy()
    """The policy to improve: that of the pretrained artefact, where one is given."""
    pairs: int = 8
    weight: Literal["noise", "velocity", "elbo"] = "noise"
    """w(t): t^2, the error of the predicted noise (as released); 1; or t / (1 - t), a bound of the log-density."""
    ratio: Literal["mean", "sum"] = "mean"
    """Squared errors are averaged over coordinates (as released) or summed (a true bound)."""
    gamma: float = 0.995
    lam: float = 0.95
    clip: float = 0.05
    epochs: int = 5
    minibatches: int = 8
    target_kl: float | None = None
    normalise_obs: bool = False
    scale_reward: bool = True
    width: int = 256
    """Of the critic."""
    depth: int = 3
    actor_lr: float = 3e-4
    critic_lr: float = 3e-4
    decay_steps: int | None = None
    max_grad_norm: float | None = 10.0

    def __post_init__(self):
        check_ppo(self)
        if self.pairs < 1:
            raise ValueError(f"pairs must be at least 1, got {self.pairs}")
        if self.policy.averaged or self.policy.predict != "velocity" or not isinstance(self.policy.path, Linear):
            raise ValueError("FPO's loss is that of a velocity on the linear path: use such a policy")

    def init(self, key: PRNGKey, spec: EnvSpec) -> PPOState:
        """Fresh networks; `contraflow.train.pretrained` puts a trained one in."""
        k_net, k_critic = jr.split(key)
        net = self.policy.init(k_net, spec)
        return first_state(self, net, spec, k_critic)

    def act(self, state: PPOState, obs: Float[Array, " o"], key: PRNGKey, explore: bool) -> Float[Array, " a"]:
        """The end of the ODE from a random x_0, clipped; the same in training and evaluation."""
        return jnp.clip(self._solve(state, obs, key), -1.0, 1.0)

    def sample(self, state: PPOState, obs: Float[Array, " o"], key: PRNGKey) -> tuple[Float[Array, " a"], Draw]:
        """An action, and pairs with their losses."""
        k_solve, k_t, k_noise = jr.split(key, 3)
        x = self._solve(state, obs, k_solve)
        t = jr.uniform(k_t, (self.pairs,), minval=EDGE, maxval=1.0 - EDGE)
        noise = jr.normal(k_noise, (self.pairs, *x.shape))
        loss = self._losses(state.actor, state.stats(obs), x, t, noise)
        return jnp.clip(x, -1.0, 1.0), Draw(x, t, noise, loss)

    def update(self, state: PPOState, rollout: Rollout, key: PRNGKey) -> tuple[PPOState, Metrics]:
        """Passes over one rollout [T, N]."""
        return improve(self, state, rollout, key, self._surrogate)

    def network(self, state: PPOState) -> Network:
        """What others start from."""
        return state.actor

    def adopt(self, state: PPOState, net: Network, stats: RunningMoments) -> PPOState:
        """The state with a trained network in it."""
        return eqx.tree_at(lambda s: (s.actor, s.stats), state, (net, stats))

    def _surrogate(self, actor: Network, batch: Samples, key: PRNGKey) -> tuple[Float[Array, ""], Metrics]:
        draw = batch.extras
        new = jax.vmap(lambda *args: self._losses(actor, *args))(batch.obs, draw.action, draw.t, draw.noise)
        log_ratio = jnp.clip(draw.loss.mean(1) - new.mean(1), -CUT, CUT)
        loss = weighted_mean(clipped(log_ratio, batch.advantage, self.clip), batch.weight)
        metrics = {"actor_loss": loss, "matching_loss": new.mean()}
        return loss, metrics | ratio_metrics(log_ratio, self.clip)

    def _losses(
        self, net: Network, obs: Float[Array, " o"], x1: Float[Array, " a"], t: Float[Array, " M"], noise
    ) -> Float[Array, " M"]:
        reduce = jnp.mean if self.ratio == "mean" else jnp.sum

        def one(t, x0):
            x_t = self.policy.path.perturb(x0, x1, t)
            weight = {"noise": t**2, "velocity": 1.0, "elbo": t / (1.0 - t)}[self.weight]
            return weight * reduce((self.policy.output(net, x_t, t, t, obs) - (x1 - x0)) ** 2)

        return jax.vmap(one)(t, noise)

    def _solve(self, state: PPOState, obs: Float[Array, " o"], key: PRNGKey) -> Float[Array, " a"]:
        return self.policy(state.actor, jr.normal(key, (state.actor.dim,)), state.stats(obs))
