"""Temporal-difference learning of an ensemble of critics: what all off-policy agents share."""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from contraflow.core.optim import check_positive, clipped_adam, gradient_step, start
from contraflow.core.types import EnvSpec, Metrics, PRNGKey, Transition
from contraflow.nets.critic import Block, Min, QEnsemble, Reduce, SubsetMin
from contraflow.nets.heads import Head, Point


@dataclass(frozen=True)
class Critics:
    """Settings of the critics: networks, what they say, how several make one value, how they learn.

    y = r + gamma^span (1 - terminated) (Z'(s', a') + bonus), Z' the law that `backup` makes of the target networks,
    which follow at the rate tau. A truncated episode is bootstrapped like any other step.
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
    gamma: float = 0.99
    tau: float = 0.005
    lr: float = 1e-3
    decay_steps: int | None = None
    """Updates over which the learning rate falls to a tenth; None keeps it constant."""
    max_grad_norm: float | None = 10.0
    """Gradients of each member are clipped to this norm; None does not clip."""

    def __post_init__(self):
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma is a discount in [0, 1], got {self.gamma}")
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau is a target-update rate in (0, 1], got {self.tau}")
        check_positive(self, "members", "width", "depth", "lr")
        if isinstance(self.backup, SubsetMin) and self.backup.size > self.members:
            raise ValueError(f"backup takes {self.backup.size} of {self.members} critics; raise `members`")

    def init(self, key: PRNGKey, spec: EnvSpec) -> tuple[QEnsemble, QEnsemble, PyTree]:
        """(critic, its copy as target, one optimiser state per member)."""
        sizes = self.members, spec.obs_dim, spec.action_dim, self.width, self.depth
        critic = QEnsemble(*sizes, head=self.head, reduce=self.reduce, block=self.block, key=key)
        # A copy, because a donated state must not hold one buffer twice.
        target = jax.tree.map(jnp.copy, critic)
        return critic, target, jax.vmap(lambda member: start(self._tx, member))(critic.members)

    def learn(
        self,
        critic: QEnsemble,
        target: QEnsemble,
        opt: PyTree,
        batch: Transition,
        next_action: Float[Array, "B a"],
        key: PRNGKey,
        bonus: Float[Array, " B"] | float = 0.0,
    ) -> tuple[QEnsemble, QEnsemble, PyTree, Metrics]:
        """(critic, target, opt, metrics) after one step of every member on its own loss and one of the target.

        next_action: a' ~ policy(. | s'); bonus: what is added to the value of s', -lambda log pi(a' | s') in soft
        backups. Gradients are clipped member by member. `key` decides which members make the backup, if that is drawn.
        """
        goals, y = self.goals(target, batch, next_action, key, bonus)

        def step(member, opt):
            def loss(q):
                return jnp.mean(jax.vmap(self.head.loss)(jax.vmap(q)(batch.obs, batch.action), goals))

            return gradient_step(self._tx, loss, member, opt)

        members, opt, loss, _ = jax.vmap(step)(critic.members, opt)
        critic = eqx.tree_at(lambda q: q.members, critic, members)
        return critic, polyak(critic, target, self.tau), opt, {"critic_loss": loss.mean(), "q": y.mean()}

    def goals(
        self,
        target: QEnsemble,
        batch: Transition,
        next_action: Float[Array, "B a"],
        key: PRNGKey,
        bonus: Float[Array, " B"] | float = 0.0,
    ) -> tuple[Float[Array, "B k"], Float[Array, " B"]]:
        """(what the head is to learn [B, k], its mean y [B]); arguments as in `learn`."""

        def one(row, action, bonus):
            """(target, its mean) of one row."""
            outs = target.outputs(row.next_obs, action)
            # What follows the end does not count, whatever it is: 0 times infinity would.
            outs, bonus = jnp.where(row.terminated, 0.0, outs), jnp.where(row.terminated, 0.0, bonus)
            discount = jnp.where(row.terminated, 0.0, self.gamma**row.span)
            q = jax.vmap(self.head.mean)(outs)
            weights, shift = self.backup(q, key)
            law = self.head.mix(outs, weights)
            y = row.reward + discount * (weights @ q + shift + bonus)
            return self.head.bellman(law, row.reward, discount, shift + bonus), y

        return jax.vmap(one)(batch, next_action, jnp.broadcast_to(bonus, batch.reward.shape))

    @property
    def _tx(self):
        return clipped_adam(self.lr, self.max_grad_norm, self.decay_steps)


def polyak(online: PyTree, target: PyTree, tau: float) -> PyTree:
    """target + tau (online - target), leaf by leaf."""
    return optax.incremental_update(online, target, tau)
