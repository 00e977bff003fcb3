"""Batches to learn from, drawn from replay or a dataset: single steps, several steps, chunks of actions, mixtures.

A row's reward is sum_{i<k} gamma^i r_i over the k <= n steps that follow each other in its trajectory up to its end, a
terminated step or the newest row; its discount gamma^k, or 0 where the last of them terminated. So a trajectory that is
cut off is bootstrapped, however few steps are left (Q-chunking, 2507.07969, leaves those rows out).

`next_action` is what was done in the row after the last one, or in as many of them as an action has: `next_mask` is 0
where the trajectory has no such row, or the replay not yet.

A row of replay may be a chunk that was carried out, of s_i steps, fewer where its episode ended within it, and with a
reward that is discounted already. Then the weight of r_i is gamma^(s_0 + ... + s_(i-1)), the discount
gamma^(s_0 + ... + s_(k-1)).
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from contraflow.core.types import Batch, PRNGKey
from contraflow.data.augment import Shifted
from contraflow.data.rows import Rows


@dataclass(frozen=True)
class Uniform:
    """Single steps, uniform with replacement."""

    gamma: float

    def __post_init__(self):
        _check(self.gamma)

    def __call__(self, rows: Rows, key: PRNGKey, n: int) -> Batch:
        """n steps; the caller makes sure that there are rows."""
        at = rows.draw(key, n)
        after = self.gamma if rows.steps is None else jnp.asarray(self.gamma) ** rows.steps[at]
        discount = jnp.where(rows.terminated[at], 0.0, after)
        return _batch(rows, at, at, rows.action[at], None, rows.reward[at], discount)


@dataclass(frozen=True)
class NStep:
    """Up to `steps` steps each, uniform over the first; `action` is that of the first."""

    steps: int
    gamma: float

    def __post_init__(self):
        _check(self.gamma, steps=self.steps)

    def __call__(self, rows: Rows, key: PRNGKey, n: int) -> Batch:
        """n rows; the caller makes sure that there are any."""
        first = rows.draw(key, n)
        _, _, last, reward, discount = _follow(rows, first, self.steps, self.gamma)
        return _batch(rows, first, last, rows.action[first], None, reward, discount)


@dataclass(frozen=True)
class Chunk:
    """As `NStep`, with the `horizon` actions that follow each other as one flat action.

    Beyond the end of the trajectory its last action is repeated and `mask` is 0. Data may play on after a terminated
    step (OGBench): such actions belong to the chunk, their rewards to no value.
    """

    horizon: int
    gamma: float

    def __post_init__(self):
        _check(self.gamma, horizon=self.horizon)

    def __call__(self, rows: Rows, key: PRNGKey, n: int) -> Batch:
        """n rows; the caller makes sure that there are any."""
        first = rows.draw(key, n)
        places, inside, last, reward, discount = _follow(rows, first, self.horizon, self.gamma)
        return _batch(rows, first, last, *_actions(rows, places, inside), reward, discount, self.horizon)


@dataclass(frozen=True)
class Mixed:
    """A share `ratio` of each batch, rounded, by `offline` from the first of two sets of rows, the rest by `online`
    from the second (one half in RLPD, 2302.02948). Each part of the batch has the same mixture."""

    offline: Uniform | NStep | Chunk | Shifted
    online: Uniform | NStep | Chunk | Shifted
    ratio: float = 0.5

    def __post_init__(self):
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio is the share of offline rows, in [0, 1], got {self.ratio}")

    def __call__(self, rows: tuple[Rows, Rows], key: PRNGKey, n: int) -> Batch:
        """n rows; a set that is not drawn from (ratio 0 or 1) may be empty."""
        counts = round(self.ratio * n), n - round(self.ratio * n)
        draws = zip((self.offline, self.online), rows, jr.split(key), counts, strict=True)
        parts = [sampler(part, k, count) for sampler, part, k, count in draws if count]
        if any(part.human is not None for part in parts):  # of one set alone
            parts = [p if p.human is not None else replace(p, human=jnp.zeros_like(p.action)) for p in parts]
        even = np.argsort(np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts]), kind="stable")
        return jax.tree.map(lambda *x: jnp.concatenate(x)[even], *parts)


Sampler = Uniform | NStep | Chunk | Mixed | Shifted


def _check(gamma: float, **count: int) -> None:
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma is a discount in [0, 1], got {gamma}")
    for name, value in count.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _follow(
    rows: Rows, first: Int[Array, " n"], steps: int, gamma: float
) -> tuple[Int[Array, "n k"], Bool[Array, "n k"], Int[Array, " n"], Float[Array, " n"], Float[Array, " n"]]:
    """(places, inside, last, reward, discount): the k = `steps` rows from each row on, where those not `inside`, beyond
    its trajectory, repeat the one before; the last that its value counts, what they are worth, and the discount."""
    places, inside = _chain(rows, first, steps)
    ends = jnp.cumsum(rows.terminated[places], axis=1)
    counted = inside & (jnp.pad(ends[:, :-1], ((0, 0), (1, 0))) == 0)  # nothing counts after a terminated step
    span = jnp.sum(counted, axis=1)
    last = jnp.take_along_axis(places, span[:, None] - 1, axis=1)[:, 0]
    if rows.steps is None:
        powers, after = jnp.asarray(gamma ** np.arange(steps), jnp.float32)[None], gamma**span
    else:
        taken = jnp.cumsum(jnp.where(counted, rows.steps[places], 0), axis=1)
        powers = jnp.asarray(gamma) ** jnp.pad(taken[:, :-1], ((0, 0), (1, 0)))
        after = jnp.asarray(gamma) ** taken[:, -1]
    reward = jnp.sum(jnp.where(counted, powers * rows.reward[places], 0.0), axis=1)
    return places, inside, last, reward, jnp.where(rows.terminated[last], 0.0, after)


def _chain(rows: Rows, first: Int[Array, " n"], steps: int) -> tuple[Int[Array, "n k"], Bool[Array, "n k"]]:
    """`places` and `inside` of `_follow`."""
    if rows.last is not None:  # the same without links, which take three times as long for 50 steps
        ahead, last = first[:, None] + jnp.arange(steps)[None], rows.last[first][:, None]
        return jnp.minimum(ahead, last), ahead <= last
    at, inside = first, jnp.ones(first.shape, bool)
    chain = [(at, inside)]
    for _ in range(1, steps):
        following = rows.next[at]
        inside = inside & (following >= 0)
        at = jnp.where(inside, following, at)
        chain.append((at, inside))
    places, inside = (jnp.stack(column, axis=1) for column in zip(*chain, strict=True))
    return places, inside


def _actions(
    rows: Rows, places: Int[Array, "n k"], inside: Bool[Array, "n k"]
) -> tuple[Float[Array, "n d"], Float[Array, "n d"]]:
    """(actions, mask) of k rows each, one after the other in d = k a numbers."""
    n, mask = places.shape[0], jnp.repeat(inside, rows.action.shape[1], axis=1)
    return rows.action[places].reshape(n, -1), mask.astype(jnp.float32)


def _batch(
    rows: Rows,
    first: Int[Array, " n"],
    last: Int[Array, " n"],
    action: Float[Array, "n d"],
    mask: Float[Array, "n d"] | None,
    reward: Float[Array, " n"],
    discount: Float[Array, " n"],
    horizon: int = 1,
) -> Batch:
    obs, next_obs = jax.tree.map(lambda x: x[first], rows.obs), jax.tree.map(lambda x: x[last], rows.next_obs)
    after = rows.next[last]
    places, inside = _chain(rows, jnp.where(after < 0, last, after), horizon)
    following = _actions(rows, places, inside & (after >= 0)[:, None])
    human = None
    if rows.human is not None:
        human = jnp.repeat(rows.human[_chain(rows, first, horizon)[0]], rows.action.shape[1], 1).astype(jnp.float32)
    mask = jnp.ones_like(action) if mask is None else mask
    return Batch(obs, action, reward, discount, next_obs, mask, *following, human)
