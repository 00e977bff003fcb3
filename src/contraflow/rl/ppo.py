"""Proximal policy optimisation (1707.06347) around any policy: what PPO, ReinFlow, DPPO and FPO have in common.

An agent brings `sample`, which acts and remembers, and a surrogate, which says how much better a new policy is on what
was remembered. Values, advantages, epochs and minibatches are here.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, PyTree

from contraflow.core.optim import clipped_adam, gradient_step, start
from contraflow.core.types import EnvSpec, Metrics, PRNGKey, Rollout
from contraflow.nets.layers import Activation
from contraflow.nets.mlp import MLP
from contraflow.rl.advantage import gae, normalise
from contraflow.rl.normalise import ReturnScale, RunningMoments


class PPOState(eqx.Module):
    actor: Any
    critic: MLP  # V(s) of normalised observations and scaled rewards
    actor_opt: PyTree
    critic_opt: PyTree
    stats: RunningMoments
    scale: ReturnScale
    step: Int[Array, ""]  # rollouts learned from
    reference: Any = None  # a network that stays as it was pretrained, where an agent keeps one


class Samples(eqx.Module):
    """Rows of a rollout with what learning needs; `obs` normalised, `weight` 0 for rows that do not count."""

    obs: Float[Array, "*batch o"]
    extras: Any
    advantage: Float[Array, "*batch"]
    target: Float[Array, "*batch"]
    weight: Float[Array, "*batch"]


Surrogate = Callable[[Any, Samples, PRNGKey], tuple[Float[Array, ""], Metrics]]


def first_state(
    agent: Any, actor: Any, spec: EnvSpec, key: PRNGKey, activation: Activation = "silu", reference: Any = None
) -> PPOState:
    """The state of an agent with this actor: a fresh value network, and nothing seen of observations and rewards."""
    critic = MLP(spec.obs_dim, 1, agent.width, agent.depth, activation=activation, key=key)
    actor_tx, critic_tx = _optimisers(agent)
    stats, scale = RunningMoments.start(spec.obs_dim), ReturnScale.start(spec.num_envs)
    opts = start(actor_tx, actor), start(critic_tx, critic)
    return PPOState(actor, critic, *opts, stats, scale, jnp.zeros((), jnp.int32), reference)


def _optimisers(agent: Any) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    rates = agent.actor_lr, agent.critic_lr
    actor_tx, critic_tx = (clipped_adam(rate, agent.max_grad_norm, agent.decay_steps) for rate in rates)
    return actor_tx, critic_tx


def improve(agent: Any, state: PPOState, rollout: Rollout, key: PRNGKey, surrogate: Surrogate) -> tuple[Any, Metrics]:
    """The state after `epochs` passes over the rollout [T, N], in `minibatches` each; metrics are scalars.

    `agent` has the settings of `PPO`. `surrogate(actor, samples, key)` is the loss of the actor with metrics, of which
    `kl` may stop the passes; the critic is regressed on A + V. Statistics of observations move afterwards, so that the
    first minibatch sees the policy that acted.
    """
    done = rollout.terminated | rollout.truncated
    # The scale is that of the rewards themselves, so it may already know them.
    scale = state.scale.update(rollout.reward, done, rollout.valid, agent.gamma) if agent.scale_reward else state.scale
    reward = scale(rollout.reward) if agent.scale_reward else rollout.reward
    data = _samples(state, rollout, reward, agent.gamma, agent.lam)
    actor_tx, critic_tx = _optimisers(agent)

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
    trained, metrics = passes(step, nets, data, key, agent.epochs, agent.minibatches, agent.target_kl)
    stats = state.stats
    if agent.normalise_obs:
        flat = rollout.obs.reshape(-1, rollout.obs.shape[-1])
        stats = stats.update(flat, rollout.valid.reshape(-1))
    actor, critic, actor_opt, critic_opt = trained
    new = PPOState(actor, critic, actor_opt, critic_opt, stats, scale, state.step + 1, state.reference)
    return new, metrics | {"value": data.target.mean()}


def _samples(state: PPOState, rollout: Rollout, reward: Float[Array, "T N"], gamma: float, lam: float) -> Samples:
    """Rows [T N] in one, with normalised advantages."""
    obs, next_obs = (jax.vmap(jax.vmap(state.stats))(x) for x in (rollout.obs, rollout.next_obs))
    value, next_value = (jax.vmap(jax.vmap(state.critic))(x)[..., 0] for x in (obs, next_obs))
    advantage = gae(reward, value, next_value, rollout.terminated, rollout.truncated, gamma, lam)
    rows = Samples(obs, rollout.extras, advantage, advantage + value, rollout.valid.astype(reward.dtype))
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
    return eqx.tree_at(lambda s: s.advantage, flat, normalise(flat.advantage, flat.weight))


def passes(
    step: Callable[[Any, PyTree, PRNGKey], tuple[Any, Metrics]],
    nets: Any,
    data: PyTree,
    key: PRNGKey,
    count: int,
    minibatches: int,
    target_kl: float | None = None,
) -> tuple[Any, Metrics]:
    """`count` passes over the rows [B] of `data`, each in a new order and in equal minibatches (a rest is left out).

    `step(nets, minibatch, key)` is one gradient step. Once the `kl` of one exceeds `target_kl`, nothing moves any more.
    Metrics are means over the steps taken; `updates` is their number.
    """
    rows = jax.tree.leaves(data)[0].shape[0]
    size = rows // minibatches
    names = jax.eval_shape(step, nets, jax.tree.map(lambda x: x[:size], data), key)[1]

    def one(carry, inputs):
        """One minibatch, unless the passes were stopped."""
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
    """max(-A rho, -A clip(rho, 1 - clip, 1 + clip)), rho = exp(log_ratio) (1707.06347, eq. 7): to be minimised."""
    ratio = jnp.exp(log_ratio)
    return jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 1.0 - clip, 1.0 + clip))


def ratio_metrics(log_ratio: Float[Array, "*s"], clip: Float[Array, "*s"] | float) -> Metrics:
    """`kl` E[rho - 1 - log rho] >= 0, an estimate of KL(old, new); `clip_share` of ratios outside of the interval."""
    ratio = jnp.exp(log_ratio)
    return {"kl": jnp.mean(ratio - 1.0 - log_ratio), "clip_share": jnp.mean(jnp.abs(ratio - 1.0) > clip)}


def weighted_mean(x: Float[Array, " B"], weight: Float[Array, " B"]) -> Float[Array, ""]:
    """sum_i w_i x_i / sum_i w_i for weights of 0 and 1; 0 if all are 0."""
    return jnp.sum(weight * x) / jnp.maximum(weight.sum(), 1.0)


def check_ppo(agent: Any) -> None:
    """Refuse settings outside their range with one message that names the field."""
    for name in ("gamma", "lam"):
        if not 0 <= getattr(agent, name) <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {getattr(agent, name)}")
    for name in ("clip", "epochs", "minibatches", "actor_lr", "critic_lr", "width"):
        if not getattr(agent, name) > 0:
            raise ValueError(f"{name} must be positive, got {getattr(agent, name)}")
