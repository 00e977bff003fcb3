"""Temporal-difference learning of an ensemble of critics, shared by all off-policy agents."""

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
    """Settings of the critics: their networks and outputs, how several values become one, and how they learn.

    y = r + discount (Z'(s', a') + bonus), discount = gamma^span (1 - terminated). `backup` forms the distribution Z'
    from the target networks, which follow at rate tau. A truncated episode bootstraps like any other step. Raises
    ValueError for gamma outside [0, 1], tau outside (0, 1], a size that is not positive, or a subset of more members
    than there are.
    """

    members: int = 2
    head: Head = Point()
    reduce: Reduce = Min()
    """Reduction for the value that policies climb and select by."""
    backup: Reduce | SubsetMin = Min()
    """Reduction for the targets."""
    width: int = 64
    depth: int = 2
    block: Block = "plain"
    pixels: Pixels = Pixels()
    """The encoder of image observations."""
    gamma: float = 0.99
    """Discount per environment step; the batch sampler applies it."""
    tau: float = 0.005
    optim: Optim = Optim(1e-3, max_grad_norm=10.0)
    """Optimiser of each member; gradients are clipped member by member."""

    def __post_init__(self):
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma is a discount in [0, 1], got {self.gamma}")
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau is a target-update rate in (0, 1], got {self.tau}")
        check_positive(self, "members", "width", "depth")
        if isinstance(self.backup, SubsetMin) and self.backup.size > self.members:
            raise ValueError(f"backup takes {self.backup.size} of {self.members} critics; raise `members`")

    def init(self, key: PRNGKey, spec: EnvSpec) -> tuple[QEnsemble, QEnsemble, PyTree]:
        """Returns the critic, a copy of it as target, and one optimiser state per member."""
        sizes = self.members, spec.observation, spec.action_dim, self.width, self.depth
        critic = QEnsemble(*sizes, head=self.head, reduce=self.reduce, block=self.block, pixels=self.pixels, key=key)
        # A copy, because a donated state must not contain a buffer twice.
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
        """Returns (critic, target, opt, metrics) after one step of every member on its own loss and one of the target.

        next_action [B, a] or [B, n, a]: a' ~ policy(. | s'), or n of them, of which each member takes the mean or the
        best before `backup` makes one value of all members. bonus [B]: added to the value of s', which is
        -lambda log pi(a' | s') in soft backups. `key` draws the members of the backup where `backup` draws a subset.
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
        """Returns the targets of the head [B, k] and their means y [B]; arguments as in `learn`."""

        def one(row, action, bonus):
            """Returns the target of one row and its mean."""
            seen, several = target.encode(row.next_obs), action if action.ndim == 2 else action[None]
            n = len(several)
            # One action as it is: a batched product of one rounds in another way.
            q_of = partial(target.outputs, seen)
            outs = q_of(several[0])[None] if n == 1 else jax.vmap(q_of)(several)  # [n, m, k]
            # Outputs after the end are masked, not multiplied by 0: 0 times infinity is not 0.
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
    """Returns target + tau (online - target), leaf by leaf."""
    return optax.incremental_update(online, target, tau)
