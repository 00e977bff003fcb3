"""Temporal-difference learning of an ensemble of critics: what all off-policy agents share."""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from contraflow.core.optim import Optim, check_positive, gradient_step
from contraflow.core.types import Batch, EnvSpec, Metrics, PRNGKey
from contraflow.nets.critic import Block, Min, QEnsemble, Reduce, SubsetMin
from contraflow.nets.encoder import Pixels
from contraflow.nets.heads import Head, Point


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
        next_action: Float[Array, "B a"],
        key: PRNGKey,
        bonus: Float[Array, " B"] | float = 0.0,
    ) -> tuple[QEnsemble, QEnsemble, PyTree, Metrics]:
        """(critic, target, opt, metrics) after one step of every member on its own loss and one of the target.

        next_action: a' ~ policy(. | s'); bonus: what is added to the value of s', -lambda log pi(a' | s') in soft
        backups. Gradients are clipped member by member. `key` decides which members make the backup, if that is drawn.
        """
        targets, y = self.td_targets(target, batch, next_action, key, bonus)

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
        next_action: Float[Array, "B a"],
        key: PRNGKey,
        bonus: Float[Array, " B"] | float = 0.0,
    ) -> tuple[Float[Array, "B k"], Float[Array, " B"]]:
        """(what the head is to learn [B, k], its mean y [B]); arguments as in `learn`."""

        def one(row, action, bonus):
            """(target, its mean) of one row."""
            outs = target.outputs(row.next_obs, action)
            # What follows the end does not count, whatever it is: 0 times infinity would.
            ended, discount = row.discount == 0, row.discount
            outs, bonus = jnp.where(ended, 0.0, outs), jnp.where(ended, 0.0, bonus)
            q = jax.vmap(self.head.mean)(outs)
            weights, shift = self.backup(q, key)
            law = self.head.mix(outs, weights)
            y = row.reward + discount * (weights @ q + shift + bonus)
            return self.head.bellman(law, row.reward, discount, shift + bonus), y

        return jax.vmap(one)(batch, next_action, jnp.broadcast_to(bonus, batch.reward.shape))


def polyak(online: PyTree, target: PyTree, tau: float) -> PyTree:
    """target + tau (online - target), leaf by leaf."""
    return optax.incremental_update(online, target, tau)
