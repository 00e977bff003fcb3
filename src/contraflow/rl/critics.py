"""Temporal-difference learning of an ensemble of critics, shared by all off-policy agents."""

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
        next_action: Float[Array, "B a"],
        key: PRNGKey,
        bonus: Float[Array, " B"] | float = 0.0,
    ) -> tuple[QEnsemble, QEnsemble, PyTree, Metrics]:
        """Returns (critic, target, opt, metrics) after one step of every member on its own loss and one of the target.

        next_action [B, a]: a' ~ policy(. | s'). bonus [B]: added to the value of s', -lambda log pi(a' | s') in soft
        backups. `key` draws the members of the backup where `backup` draws a subset.
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
        """Returns the targets of the head [B, k] and their means y [B]; arguments as in `learn`."""

        def one(row, action, bonus):
            """Returns the target of one row and its mean."""
            outs = target.outputs(row.next_obs, action)
            # Outputs after the end are masked, not multiplied by 0: 0 times infinity is not 0.
            ended, discount = row.discount == 0, row.discount
            outs, bonus = jnp.where(ended, 0.0, outs), jnp.where(ended, 0.0, bonus)
            q = jax.vmap(self.head.mean)(outs)
            weights, shift = self.backup(q, key)
            law = self.head.mix(outs, weights)
            y = row.reward + discount * (weights @ q + shift + bonus)
            return self.head.bellman(law, row.reward, discount, shift + bonus), y

        return jax.vmap(one)(batch, next_action, jnp.broadcast_to(bonus, batch.reward.shape))


def polyak(online: PyTree, target: PyTree, tau: float) -> PyTree:
    """Returns target + tau (online - target), leaf by leaf."""
    return optax.incremental_update(online, target, tau)
