"""Proximal policy optimisation (1707.06347) for any policy: the part that PPO, ReinFlow, DPPO and FPO share.

An agent supplies `sample`, which acts and records, and a surrogate, which scores a new policy on the recorded data.
This file handles values, advantages, epochs and minibatches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, PyTree

from contraflow.core.optim import Optim, check_positive, gradient_step
from contraflow.core.types import EnvSpec, Metrics, PRNGKey, Rollout, UserError
from contraflow.nets.mlp import MLP, MLPSpec
from contraflow.policy.normalise import RunningMoments
from contraflow.rl.advantage import gae, normalise
from contraflow.rl.normalise import NormaliseObs, ReturnScale, initial_moments
from contraflow.rl.normalise import normalise as normalise_obs


@dataclass(frozen=True)
class PPOSettings:
    """Settings that all on-policy agents share. Raises ValueError that names the field outside its range."""

    gamma: float = 0.99
    lam: float = 0.95
    """Decay of generalised advantage estimation."""
    epochs: int = 5
    """Passes over a rollout."""
    minibatches: int = 8
    target_kl: float | None = None
    """Approximate KL(old, new) above which the rest of the passes is skipped; None never stops early."""
    normalise_obs: NormaliseObs = "off"
    """A pretrained policy comes with statistics, which stay "frozen" unless this is "running"."""
    warmup: int = 0
    """Rollouts from which only the critic learns, before the actor does."""
    scale_reward: bool = True
    """Rewards are divided by the standard deviation of the return."""
    critic: MLPSpec = MLPSpec(256, 3, "silu")
    actor_optim: Optim = Optim(max_grad_norm=10.0)
    critic_optim: Optim = Optim(max_grad_norm=10.0)

    def __post_init__(self):
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.warmup < 0:
            raise ValueError(f"warmup must not be negative, got {self.warmup}")
        check_positive(self, "epochs", "minibatches", *(["target_kl"] if self.target_kl is not None else []))


class PPOState(eqx.Module):
    """Everything that an on-policy agent learns, and the number of rollouts learned from."""

    actor: Any
    critic: MLP  # V(s) of normalised observations and scaled rewards
    actor_opt: PyTree
    critic_opt: PyTree
    stats: RunningMoments | None
    scale: ReturnScale
    step: Int[Array, ""]  # rollouts learned from
    reference: Any = None  # a frozen copy of the pretrained network, for agents that keep one


class Samples(eqx.Module):
    """Rows of a rollout with the data for learning: `obs` normalised, `weight` 0 for rows that do not count."""

    obs: PyTree[Array]  # leaves [*batch, ...]
    extras: Any
    advantage: Float[Array, "*batch"]
    target: Float[Array, "*batch"]
    weight: Float[Array, "*batch"]


Surrogate = Callable[[Any, Samples, PRNGKey], tuple[Float[Array, ""], Metrics]]


def first_state(settings: PPOSettings, actor: Any, spec: EnvSpec, key: PRNGKey, reference: Any = None) -> PPOState:
    """Returns the first state with this actor: a fresh value network and no statistics of observations or rewards."""
    critic = settings.critic.init(key, spec.observation, 1)
    opts = settings.actor_optim.init(actor), settings.critic_optim.init(critic)
    stats, scale = initial_moments(settings.normalise_obs, spec), ReturnScale.start(spec.num_envs)
    return PPOState(actor, critic, *opts, stats, scale, jnp.zeros((), jnp.int32), reference)


def improve(
    settings: PPOSettings, state: PPOState, rollout: Rollout, key: PRNGKey, surrogate: Surrogate
) -> tuple[PPOState, Metrics]:
    """Returns the state after `epochs` passes over the rollout [T, N] in `minibatches` each, and scalar metrics.

    `surrogate(actor, samples, key)` returns the loss of the actor and metrics, of which `kl` may stop the passes. The
    critic is regressed on A + V. Statistics of observations are updated last, so that the first minibatch sees the
    policy that acted.
    """
    done = rollout.terminated | rollout.truncated
    # The scale divides the rewards themselves, so it may already include them.
    scale, reward = state.scale, rollout.reward
    if settings.scale_reward:
        scale = scale.update(reward, done, rollout.valid, settings.gamma)
        reward = scale(reward)
    data = _samples(state, rollout, reward, settings.gamma, settings.lam)
    actor_tx, critic_tx = settings.actor_optim.tx, settings.critic_optim.tx

    def step(nets, batch, key):
        """One gradient step of both networks on a minibatch."""
        actor, critic, actor_opt, critic_opt = nets
        (_, metrics), grad = jax.value_and_grad(surrogate, has_aux=True)(actor, batch, key)
        updates, actor_opt = actor_tx.update(grad, actor_opt, actor)
        actor = eqx.apply_updates(actor, updates)

        def value_loss(critic):
            return 0.5 * weighted_mean((jax.vmap(critic)(batch.obs)[:, 0] - batch.target) ** 2, batch.weight)

        critic, critic_opt, loss, _ = gradient_step(critic_tx, value_loss, critic, critic_opt)
        more = {"critic_loss": loss, "actor_grad_norm": optax.tree.norm(grad)}
        return (actor, critic, actor_opt, critic_opt), metrics | more

    nets = (state.actor, state.critic, state.actor_opt, state.critic_opt)
    trained, metrics = passes(step, nets, data, key, settings.epochs, settings.minibatches, settings.target_kl)
    stats = state.stats
    if stats is not None and settings.normalise_obs == "running":
        flat = rollout.obs.reshape(-1, rollout.obs.shape[-1])
        stats = stats.update(flat, rollout.valid.reshape(-1))
    actor, critic, actor_opt, critic_opt = trained
    if settings.warmup:
        warm, held = state.step >= settings.warmup, (state.actor, state.actor_opt)
        actor, actor_opt = jax.tree.map(lambda new, old: jnp.where(warm, new, old), (actor, actor_opt), held)
    new = PPOState(actor, critic, actor_opt, critic_opt, stats, scale, state.step + 1, state.reference)
    return new, metrics | {"value": data.target.mean(), "explained_variance": _explained(state, data)}


def _samples(state: PPOState, rollout: Rollout, reward: Float[Array, "T N"], gamma: float, lam: float) -> Samples:
    """Returns the rows [T N] along one axis, with normalised advantages."""
    obs, next_obs = (
        jax.vmap(jax.vmap(partial(normalise_obs, state.stats)))(x) for x in (rollout.obs, rollout.next_obs)
    )
    critic = jax.vmap(state.critic)
    # The convolutions of a whole rollout at once would fill the memory.
    critic = jax.vmap(critic) if state.critic.encoder is None else partial(jax.lax.map, critic)
    value, next_value = (critic(x)[..., 0] for x in (obs, next_obs))
    advantage = gae(reward, value, next_value, rollout.terminated, rollout.truncated, gamma, lam)
    rows = Samples(obs, rollout.extras, advantage, advantage + value, rollout.valid.astype(reward.dtype))
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
    return eqx.tree_at(lambda s: s.advantage, flat, normalise(flat.advantage, flat.weight))


def _explained(state: PPOState, data: Samples) -> Float[Array, ""]:
    """Returns 1 - Var(A) / Var(A + V), the share of the targets' variance that the critic knew beforehand."""
    value = jax.vmap(state.critic)(data.obs)[:, 0]
    of = lambda x: weighted_mean((x - weighted_mean(x, data.weight)) ** 2, data.weight)
    return 1.0 - of(data.target - value) / jnp.maximum(of(data.target), 1e-8)


def passes(
    step: Callable[[Any, PyTree, PRNGKey], tuple[Any, Metrics]],
    nets: Any,
    data: PyTree,
    key: PRNGKey,
    count: int,
    minibatches: int,
    target_kl: float | None = None,
) -> tuple[Any, Metrics]:
    """Makes `count` passes over the rows [B] of `data`, each in a new order and in equal minibatches.

    Leftover rows of a pass are skipped. `step(nets, minibatch, key)` is one gradient step. Once its `kl` exceeds
    `target_kl`, all further steps are skipped. Metrics are means over the steps taken, and `updates` is their number.
    Raises UserError for fewer rows than minibatches.
    """
    rows = jax.tree.leaves(data)[0].shape[0]
    size = rows // minibatches
    if not size:
        raise UserError(
            f"a rollout of {rows} rows cannot be cut into {minibatches} minibatches: lower --agent.ppo.minibatches, or "
            "raise --unroll or --num-envs"
        )
    names = jax.eval_shape(step, nets, jax.tree.map(lambda x: x[:size], data), key)[1]

    def one(carry, inputs):
        """One minibatch, skipped once the passes have stopped."""
        nets, stopped, sums, taken = carry
        index, key = inputs

        def go(nets, sums):
            new, metrics = step(nets, jax.tree.map(lambda x: x[index], data), key)
            return new, jax.tree.map(jnp.add, sums, metrics), metrics["kl"]

        nets, sums, kl = jax.lax.cond(stopped, lambda nets, sums: (nets, sums, jnp.zeros(())), go, nets, sums)
        taken += jnp.where(stopped, 0, 1)
        return (nets, stopped | (kl > (jnp.inf if target_kl is None else target_kl)), sums, taken), None

    def order(key):
        return jr.permutation(key, rows)[: size * minibatches].reshape(minibatches, size)

    k_order, k_step = jr.split(key)
    index = jax.vmap(order)(jr.split(k_order, count)).reshape(count * minibatches, size)
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), names)
    start = (nets, jnp.zeros((), bool), sums, jnp.zeros((), jnp.int32))
    (nets, _, sums, taken), _ = jax.lax.scan(one, start, (index, jr.split(k_step, count * minibatches)))
    return nets, jax.tree.map(lambda x: x / taken, sums) | {"updates": taken.astype(jnp.float32)}


def clipped(
    log_ratio: Float[Array, "*s"], advantage: Float[Array, "*s"], clip: Float[Array, "*s"] | float
) -> Float[Array, "*s"]:
    """Returns max(-A rho, -A clip(rho, 1 - clip, 1 + clip)), rho = exp(log_ratio), to minimise (1707.06347, eq. 7)."""
    ratio = jnp.exp(log_ratio)
    return jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 1.0 - clip, 1.0 + clip))


def ratio_metrics(log_ratio: Float[Array, "B ..."], clip: float, weight: Float[Array, " B"]) -> Metrics:
    """Returns `kl`, E[rho - 1 - log rho] >= 0, which estimates KL(old, new), and `clip_share`, the clipped fraction."""
    ratio = jnp.exp(log_ratio)
    mean = lambda x: weighted_mean(x.reshape(x.shape[0], -1).mean(1), weight)
    return {"kl": mean(ratio - 1.0 - log_ratio), "clip_share": mean(jnp.abs(ratio - 1.0) > clip)}


def weighted_mean(x: Float[Array, " B"], weight: Float[Array, " B"]) -> Float[Array, ""]:
    """Returns sum_i w_i x_i / sum_i w_i [] for weights of 0 and 1; 0 if all are 0."""
    return jnp.sum(weight * x) / jnp.maximum(weight.sum(), 1.0)
