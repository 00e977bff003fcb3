"""Temporal-difference learning of an ensemble of critics."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from contraflow.nets.critic import QEnsemble
from contraflow.rl.optim import descend, start
from contraflow.types import Transition


def td_target(batch: Transition, next_value: Float[Array, " B"], gamma: float) -> Float[Array, " B"]:
    """y = r + gamma^span (1 - terminated) V(s'). A truncated episode is bootstrapped like any other step."""
    return batch.reward + gamma**batch.span * jnp.where(batch.terminated, 0.0, next_value)


def start_critic(tx: optax.GradientTransformation, critic: QEnsemble) -> PyTree:
    """One optimiser state per member."""
    return jax.vmap(lambda member: start(tx, member))(critic.members)


def fit_critic(
    tx: optax.GradientTransformation, critic: QEnsemble, opt_state: PyTree, batch: Transition, y: Float[Array, " B"]
) -> tuple[QEnsemble, PyTree, Float[Array, ""], Float[Array, ""]]:
    """One step on mean_b (Q_i(s_b, a_b) - y_b)^2 for every member i on its own: gradients are clipped member by member.

    `opt_state` comes from `start_critic`. Returns (critic, opt_state, mean loss, mean gradient norm).
    """

    def step(member, opt_state):
        def loss(q):
            return jnp.mean((jax.vmap(q)(batch.obs, batch.action) - y) ** 2)

        return descend(tx, loss, member, opt_state)

    members, opt_state, loss, norm = jax.vmap(step)(critic.members, opt_state)
    return eqx.tree_at(lambda q: q.members, critic, members), opt_state, loss.mean(), norm.mean()


def polyak(online: PyTree, target: PyTree, tau: float) -> PyTree:
    """target + tau (online - target), leaf by leaf."""
    return optax.incremental_update(online, target, tau)
