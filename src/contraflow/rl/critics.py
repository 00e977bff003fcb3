"""Temporal-difference learning of an ensemble of critics: what all off-policy agents share."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from contraflow.core.optim import Optim, check_positive, gradient_step
from contraflow.core.types import Batch, EnvSpec, Metrics, PRNGKey
from contraflow.nets.critic import Block, Min, QEnsemble, Reduce, SubsetMin
from contraflow.nets.encoder import Pixels
from contraflow.nets.heads import Head, Point

Over = Literal["mean", "max"]
"""What one member makes of several next actions."""


@dataclass(frozen=True)
class Critics:
    """Settings of the critics: networks, what they say, how several make one value, how they learn.

    y = r + discount (Z'(s', a') + bonus), discount = gamma^span (1 - terminated), Z' the distribution that `backup`
    makes of the target networks, which follow at the rate tau. A truncated episode is bootstrapped like any other step.
    """

    members: int = 2
    head: Head = Point()
    reduce: Reduce = Min()
    """What policies climb and choose by."""
    backup: Reduce | SubsetMin = Min()
    """What targets are made of."""
    width: int = 64
    depth: int = 2
    block: Block = "plain"
    pixels: Pixels = Pixels()
    """Of observations with images."""
    gamma: float = 0.99
    """Discount, which the sampler of batches applies."""
    tau: float = 0.005
    optim: Optim = Optim(1e-3, max_grad_norm=10.0)
    """Of each member by itself."""

    def __post_init__(self):
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma is a discount in [0, 1], got {self.gamma}")
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau is a target-update rate in (0, 1], got {self.tau}")
        check_positive(self, "members", "width", "depth")
        if isinstance(self.backup, SubsetMin) and self.backup.size > self.members:
            raise ValueError(f"backup takes {self.backup.size} of {self.members} critics; raise `members`")

    def init(self, key: PRNGKey, spec: EnvSpec) -> tuple[QEnsemble, QEnsemble, PyTree]:
        """(critic, its copy as target, one optimiser state per member)."""
        sizes = self.members, spec.observation, spec.action_dim, self.width, self.depth
        critic = QEnsemble(*sizes, head=self.head, reduce=self.reduce, block=self.block, pixels=self.pixels, key=key)
        # A copy, because a donated state must not hold one buffer twice.
        target = jax.tree.map(jnp.copy, critic)
        return critic, target, jax.vmap(self.optim.init)(critic.members)

    def learn(
        self,
        critic: QEnsemble,
        target: QEnsemble,
        opt: PyTree,
        batch: Batch,
        next_action: Float[Array, "B a"] | Float[Array, "B n a"],
        key: PRNGKey,
        bonus: Float[Array, " B"] | float = 0.0,
        over: Over = "mean",
    ) -> tuple[QEnsemble, QEnsemble, PyTree, Metrics]:
        """(critic, target, opt, metrics) after one step of every member on its own loss and one of the target.

        next_action: a' ~ policy(. | s'), or n of them, of which each member takes the mean or the best before `backup`
        makes one value of all members; bonus: what is added to the value of s', -lambda log pi(a' | s') in soft
        backups. Gradients are clipped member by member. `key` decides which members make the backup, if that is drawn.
        """
        targets, y = self.td_targets(target, batch, next_action, key, bonus, over)

        def step(member, opt):
            def loss(q):
                return jnp.mean(jax.vmap(self.head.loss)(jax.vmap(q)(batch.obs, batch.action), targets))

            return gradient_step(self.optim.tx, loss, member, opt)

        members, opt, loss, _ = jax.vmap(step)(critic.members, opt)
        critic = eqx.tree_at(lambda q: q.members, critic, members)
        metrics = {"critic_loss": loss.mean(), "q": y.mean()}
        if self.head.bounds is not None:
            low, high = self.head.bounds
            metrics["targets_out_of_range"] = jnp.mean((y < low) | (y > high))
        return critic, polyak(critic, target, self.tau), opt, metrics

    def td_targets(
        self,
        target: QEnsemble,
        batch: Batch,
        next_action: Float[Array, "B a"] | Float[Array, "B n a"],
        key: PRNGKey,
        bonus: Float[Array, " B"] | float = 0.0,
        over: Over = "mean",
    ) -> tuple[Float[Array, "B k"], Float[Array, " B"]]:
        """(what the head is to learn [B, k], its mean y [B]); arguments as in `learn`."""

        def one(row, action, bonus):
            """(target, its mean) of one row."""
            seen, several = target.encode(row.next_obs), action if action.ndim == 2 else action[None]
            n = len(several)
            # One action as it is: a batched product of one rounds in another way.
            q_of = partial(target.outputs, seen)
            outs = q_of(several[0])[None] if n == 1 else jax.vmap(q_of)(several)  # [n, m, k]
            # What follows the end does not count, whatever it is: 0 times infinity would.
            ended, discount = row.discount == 0, row.discount
            outs, bonus = jnp.where(ended, 0.0, outs), jnp.where(ended, 0.0, bonus)
            q = jax.vmap(jax.vmap(self.head.mean))(outs)  # [n, m]
            share = jax.nn.one_hot(jnp.argmax(q, 0), n, axis=0) if over == "max" else jnp.full_like(q, 1.0 / n)
            weights, shift = self.backup(jnp.sum(share * q, 0), key)
            weights = (share * weights[None]).reshape(-1)
            law = self.head.mix(outs.reshape(-1, outs.shape[-1]), weights)
            y = row.reward + discount * (weights @ q.reshape(-1) + shift + bonus)
            return self.head.bellman(law, row.reward, discount, shift + bonus), y

        return jax.vmap(one)(batch, next_action, jnp.broadcast_to(bonus, batch.reward.shape))


def follow(average: PyTree, net: PyTree, step: Int[Array, ""], decay: float) -> PyTree:
    """A moving average of a network, after its update number `step` (from 0): rate average + (1 - rate) net, leaf by
    leaf, with rate = min(decay, (1 + step) / (10 + step)), so that it catches up quickly at first."""
    rate = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda a, b: rate * a + (1 - rate) * b, average, net)


def polyak(online: PyTree, target: PyTree, tau: float) -> PyTree:
    """target + tau (online - target), leaf by leaf."""
    return optax.incremental_update(online, target, tau)
