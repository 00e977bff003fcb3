"""The replay ring: wrap-around, masks, odd capacities, links, nested observations, donation."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import stats

from contraflow.core.types import EnvSpec, Step
from contraflow.data.replay import Buffer
from contraflow.data.samplers import NStep, Uniform

N = 3
SPEC = EnvSpec(2, 1, N, None, True)


ALL = jnp.ones(N, bool)


def rows(first, valid=ALL):
    """What `add` takes of N steps labelled first, first + 1, ...: every field tells which one it belongs to."""
    x = jnp.arange(first, first + N, dtype=jnp.float32)
    state, after = jnp.stack([x, -x], -1), jnp.stack([x + 1, -x], -1)
    return state, 0.5 * x[:, None], Step(after, after, x, x % 2 == 0, x % 3 == 0, valid)


add = jax.jit(lambda buffer, rows: buffer.add(*rows), donate_argnums=0)
sample = jax.jit(lambda buffer, key, n: Uniform(0.5)(buffer.rows, key, n), static_argnums=2)


def stored(buffer):
    return np.asarray(buffer.rows.reward[: int(buffer.size)]).tolist()


@pytest.mark.parametrize("capacity", [3, 6, 7])
def test_ring_keeps_the_newest(capacity):
    buffer, seen = Buffer.empty(capacity, SPEC), []
    assert int(buffer.size) == int(buffer.index) == 0
    for first in range(0, 8 * N, N):
        buffer = add(buffer, rows(first))
        seen += range(first, first + N)
        assert sorted(stored(buffer)) == seen[-capacity:]
        assert int(buffer.size) == min(len(seen), capacity) and int(buffer.index) == len(seen) % capacity
    # Whole transitions travel together.
    data = jax.tree.map(np.asarray, buffer.rows)
    np.testing.assert_array_equal(data.obs, np.stack([data.reward, -data.reward], -1))
    np.testing.assert_array_equal(data.next_obs[:, 0], data.reward + 1)
    np.testing.assert_array_equal(data.action[:, 0], 0.5 * data.reward)
    np.testing.assert_array_equal(data.terminated, data.reward % 2 == 0)
    assert not (data.next[(data.reward % 2 == 0) | (data.reward % 3 == 0)] >= 0).any()


def test_invalid_rows_are_not_stored():
    buffer = Buffer.empty(5, SPEC)
    masks = [[True, False, True], [False, False, False], [False, True, False], [True, True, True]]
    want = []
    for i, mask in enumerate(masks):
        buffer = add(buffer, rows(10 * i, jnp.asarray(mask)))
        want += [10 * i + j for j in range(N) if mask[j]]
        assert sorted(stored(buffer)) == want[-5:]
    assert int(buffer.size) == 5 and int(buffer.index) == 1


def test_sampling_is_uniform_over_what_is_filled():
    buffer = Buffer.empty(20, SPEC)
    for first in range(0, 12, N):
        buffer = add(buffer, rows(first))
    batch = sample(buffer, jr.key(0), 6000)
    counts = np.bincount(np.asarray(batch.reward, int), minlength=20)
    assert counts[12:].sum() == 0
    assert stats.chisquare(counts[:12]).pvalue > 1e-3
    np.testing.assert_array_equal(batch.obs[:, 0], batch.reward)
    np.testing.assert_array_equal(batch.discount, np.where(batch.reward % 2 == 0, 0, 0.5))
    again, other = sample(buffer, jr.key(0), 6000), sample(buffer, jr.key(1), 6000)
    np.testing.assert_array_equal(batch.reward, again.reward)
    assert not np.array_equal(batch.reward, other.reward)


@pytest.mark.parametrize("capacity", [7, 20, 100])
def test_several_steps_join_rows_of_one_episode(capacity):
    """Against a list: environments that skip rows, ends of both kinds, a cut, the ring full or not."""
    rng, buffer, episodes, follows, last = np.random.default_rng(0), Buffer.empty(capacity, SPEC), {}, {}, [None] * N
    order = []
    for i in range(12):
        if i == 6:
            buffer, last = buffer.cut(), [None] * N
        valid, ends = rng.random(N) < 0.8, rng.integers(0, 12, N)
        obs, action, step = rows(N * i + 1, jnp.asarray(valid))
        over = jnp.asarray(ends == 0), jnp.asarray(ends == 1)
        buffer = add(buffer, (obs, action, eqx.tree_at(lambda r: (r.terminated, r.truncated), step, over)))
        for j in np.flatnonzero(valid):
            label = N * i + 1 + j
            order.append(label)
            episodes[label] = (ends[j] == 0, ends[j] == 1)
            if last[j] is not None:
                follows[last[j]] = label
            last[j] = None if ends[j] < 2 else label
    batch = jax.jit(lambda b: NStep(4, 0.5)(b.rows, jr.key(0), 400))(buffer)
    batch = jax.tree.map(np.asarray, batch)
    assert set(batch.obs[:, 0]) == set(order[-capacity:])
    spans = set()
    for i, first in enumerate(batch.obs[:, 0].astype(int)):
        chain = [first]
        while chain[-1] in follows and len(chain) < 4:
            chain.append(follows[chain[-1]])
        spans.add(len(chain))
        assert batch.reward[i] == pytest.approx(sum(0.5**k * label for k, label in enumerate(chain)))
        assert batch.next_obs[i, 0] == chain[-1] + 1 and batch.action[i, 0] == 0.5 * first
        assert batch.discount[i] == (0.0 if episodes[chain[-1]][0] else 0.5 ** len(chain))
    assert spans == ({1, 2} if capacity == 7 else {1, 2, 3, 4})


def test_nested_observations_keep_their_shapes_and_types():
    like = {"image": jax.ShapeDtypeStruct((4, 4, 3), jnp.uint8), "state": jax.ShapeDtypeStruct((2,), jnp.float32)}
    buffer = Buffer.empty(7, SPEC, like)
    state, action, step = rows(5)
    picture = jnp.full((N, 4, 4, 3), 200, jnp.uint8) + jnp.arange(N, dtype=jnp.uint8)[:, None, None, None]
    seen = {"image": picture, "state": state}
    after = {"image": picture + 20, "state": step.next_obs}
    buffer = add(buffer, (seen, action, eqx.tree_at(lambda s: s.next_obs, step, after)))
    batch = sample(buffer, jr.key(0), 50)
    assert batch.obs["image"].dtype == jnp.uint8 and batch.next_obs["image"].shape == (50, 4, 4, 3)
    np.testing.assert_array_equal(batch.obs["image"][:, 0, 0, 0], 195 + batch.reward)
    np.testing.assert_array_equal(batch.next_obs["image"][:, 3, 3, 2], 215 + batch.reward)
    np.testing.assert_array_equal(batch.next_obs["state"][:, 0], batch.reward + 1)


def test_add_inside_a_donated_scan_happens_in_place():
    @partial(jax.jit, donate_argnums=0)
    def fill(buffer):
        return jax.lax.scan(lambda b, i: (b.add(*rows(0)), None), buffer, jnp.arange(5))[0]

    buffer = Buffer.empty(7, SPEC)
    old = buffer.rows.obs
    new = fill(buffer)
    assert old.is_deleted()  # donated, not copied
    assert int(new.size) == 7 and int(new.index) == 15 % 7
