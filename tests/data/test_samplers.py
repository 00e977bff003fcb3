"""Batches against sums by hand: single steps, several steps, chunks, mixtures; ends of trajectories of every kind."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import stats

from contraflow import EnvSpec, Step
from contraflow.core.types import Batch
from contraflow.data.datasets.dataset import Dataset, build
from contraflow.data.replay import Buffer
from contraflow.data.rows import Rows
from contraflow.data.samplers import Chunk, Mixed, NStep, Uniform
from contraflow.envs.chunk import Chunked
from contraflow.envs.probe import PROBES

LENGTHS = (5, 1, 8, 3)
n = sum(LENGTHS)


def dataset(inside: bool = True) -> Dataset:
    """Row i has observation (i, -i), actions i and i + .5 (of 50), a random reward. Trajectories end truncated, by a
    terminated step, truncated, terminated; step 8 (of the third) also terminates, and the data play on after it."""
    i = np.arange(n, dtype=np.float32)
    terminated = np.isin(i, [5, 8, n - 1] if inside else [5, n - 1])
    arrays = {
        "obs": np.stack([i, -i], 1), "next_obs": np.stack([i + 0.25, -i], 1), "terminated": terminated,
        "action": np.stack([i, i + 0.5], 1), "end": np.isin(i, np.cumsum(LENGTHS) - 1),
        "reward": np.random.default_rng(0).standard_normal(n).astype(np.float32),
    }  # fmt: skip
    return build(arrays, name="known", low=-50, high=50)


def replay() -> Rows:
    """The same steps as they come from one environment; it resets where a step terminates."""
    data, buffer = dataset(), Buffer.empty(n + 4, EnvSpec(2, 2, 1, None, True))
    add = jax.jit(lambda buffer, row: buffer.add(*row))
    for i in range(n):
        after = jnp.asarray(data.next_obs[i : i + 1])
        cut = jnp.asarray([bool(data.end[i] & ~data.terminated[i])])
        reward, over = jnp.asarray(data.reward[i : i + 1]), jnp.asarray(data.terminated[i : i + 1])
        step = Step(after, after, reward, over, cut, jnp.ones(1, bool))
        buffer = add(buffer, (jnp.asarray(data.obs[i : i + 1]), jnp.asarray(data.action[i : i + 1]), step))
    return buffer.rows


SOURCES = {"dataset": lambda: Rows.of(dataset()), "replay": replay}
draw = jax.jit(lambda sampler, rows, key, n: sampler(rows, key, n), static_argnums=(0, 3))


def by_hand(first: int, steps: int, gamma: float, last: np.ndarray) -> tuple[list[int], list[int], float, float]:
    """(places of its chunk, places that its value counts, reward, discount) of a row."""
    data = dataset()
    inside = [i for i in range(first, first + steps) if i <= last[first]]
    counted = inside[:]
    for k, i in enumerate(inside):
        if data.terminated[i]:
            counted = inside[: k + 1]
            break
    reward = sum(gamma**k * float(data.reward[i]) for k, i in enumerate(counted))
    return inside, counted, reward, 0.0 if data.terminated[counted[-1]] else gamma ** len(counted)


def same(one: Batch, other: Batch) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("steps", "gamma"), [(3, 0.9), (20, 0.9), (3, 0.0)])
def test_every_row_by_hand(source: str, gamma: float, steps: int):
    """A chunk is cut by the end of its trajectory, its value also by a terminated step, and bootstrapped from there
    unless that terminated. gamma = 0 stays 0."""
    rows = SOURCES[source]()
    last = np.flatnonzero(np.asarray(rows.next[:n]) < 0)
    last = last[np.searchsorted(last, np.arange(n))]
    chunk = jax.tree.map(np.asarray, draw(Chunk(steps, gamma), rows, jr.key(1), 300))
    several = jax.tree.map(np.asarray, draw(NStep(steps, gamma), rows, jr.key(1), 300))
    firsts, where = np.unique(chunk.obs[:, 0].astype(int), return_index=True)
    assert firsts.tolist() == list(range(n))
    for first, i in zip(firsts, where, strict=True):
        inside, counted, reward, discount = by_hand(first, steps, gamma, last)
        actions = [*inside, *[inside[-1]] * (steps - len(inside))]
        wanted = np.array([[a, a + 0.5] for a in actions]).ravel() / 50
        np.testing.assert_allclose(chunk.action[i], wanted, rtol=1e-6)
        np.testing.assert_array_equal(chunk.mask[i], np.repeat(np.arange(steps) < len(inside), 2))
        np.testing.assert_allclose(several.action[i], wanted[:2], rtol=1e-6)
        assert (several.mask[i] == 1).all()
        for batch in (chunk, several):
            # Sums of up to eight float32 numbers of order one: some units in the last place.
            np.testing.assert_allclose(batch.reward[i], reward, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(batch.discount[i], discount, rtol=1e-6)
            np.testing.assert_array_equal(batch.next_obs[i], [counted[-1] + 0.25, -counted[-1]])


@pytest.mark.parametrize("source", SOURCES)
def test_one_step_is_the_same_by_every_name(source: str):
    rows = SOURCES[source]()
    uniform = draw(Uniform(0.9), rows, jr.key(2), 300)
    same(uniform, draw(NStep(1, 0.9), rows, jr.key(2), 300))
    same(uniform, draw(Chunk(1, 0.9), rows, jr.key(2), 300))


@pytest.mark.parametrize("gamma", [0.9, 0.0])
def test_chunks_of_replay_are_discounted_by_the_steps_taken(gamma: float):
    """Episodes of five steps with reward 1, cut by a time limit, in chunks of two: the third chunk is one step. What
    follows is bootstrapped with gamma^2, gamma^2 and gamma; of two chunks with gamma^4, gamma^3 and gamma."""
    env = Chunked(PROBES["truncation"](2), 2, 2, gamma)
    buffer = Buffer.empty(20, env.spec)
    state, obs = env.reset(jr.key(0))
    for _ in range(6):
        state, step = env.step(state, jnp.zeros((2, 2)))
        buffer, obs = buffer.add(obs, jnp.zeros((2, 2)), step), step.obs
    assert buffer.rows.steps is not None and buffer.rows.steps[:6].tolist() == [2, 2, 2, 2, 1, 1]
    for sampler, spans in ((Uniform(gamma), (2, 2, 1)), (NStep(2, gamma), (4, 3, 1))):
        batch = jax.tree.map(np.asarray, draw(sampler, buffer.rows, jr.key(1), 60))
        number = np.round(batch.obs[:, 0] * 5).astype(int) // 2  # of the chunk in its episode
        assert set(number) == {0, 1, 2}
        span = np.asarray(spans)[number]
        np.testing.assert_allclose(batch.discount, gamma**span, rtol=1e-5)
        worth = [sum(gamma**k for k in range(n)) for n in span]
        np.testing.assert_allclose(batch.reward, worth, rtol=1e-5)


@pytest.mark.parametrize("sampler", [Uniform(0.9), NStep(2, 0.9), Chunk(3, 0.9)])
def test_draws_are_uniform_over_the_filled_rows(sampler):
    """And the numbers that a run drew before there were samplers: one `randint` of the key, also as a column."""
    rows = replay()
    assert rows.reward.shape == (n + 4,)
    first = draw(sampler, rows, jr.key(3), 5000).obs[:, 0].astype(int)
    np.testing.assert_array_equal(first, jr.randint(jr.key(3), (5000,), 0, n))
    np.testing.assert_array_equal(first[:, None], jr.randint(jr.key(3), (5000, 1), 0, n))
    assert stats.chisquare(np.bincount(first, minlength=n)).pvalue > 1e-3


def test_a_truncated_step_is_bootstrapped_and_a_terminated_one_is_not():
    rows = Rows.of(dataset())
    batch = draw(Uniform(0.9), rows, jr.key(2), 300)
    over = np.isin(batch.obs[:, 0], [5, 8, n - 1])
    np.testing.assert_allclose(batch.discount, np.where(over, 0.0, 0.9), rtol=1e-6)
    assert (np.asarray(batch.obs[:, 0]) == 4).any(), "the first trajectory ends with row 4, which is truncated"


def test_a_mixture_holds_its_share_in_every_part():
    offline = Rows.of(dataset())
    online = eqx.tree_at(lambda rows: rows.obs, offline, offline.obs + 100)
    mixed = draw(Mixed(Chunk(2, 0.9), Chunk(2, 0.9), 0.25), (offline, online), jr.key(5), 64)
    old = np.asarray(mixed.obs[:, 0] < 50)
    assert old.sum() == 16 and {int(part.sum()) for part in old.reshape(4, 16)} == {4}
    k_old, k_new = jr.split(jr.key(5))
    part = draw(Chunk(2, 0.9), offline, k_old, 16)
    same(part, jax.tree.map(lambda x: x[np.flatnonzero(old)], mixed))
    same(draw(Chunk(2, 0.9), online, k_new, 48), jax.tree.map(lambda x: x[np.flatnonzero(~old)], mixed))


@pytest.mark.parametrize(("ratio", "share"), [(0.0, 0), (1.0, 10), (0.5, 5), (0.33, 3)])
def test_a_mixture_may_leave_one_side_alone(ratio: float, share: int):
    """Offline training reads no replay, which is empty then."""
    empty, full = Buffer.empty(5, EnvSpec(2, 2, 1, None, True)).rows, Rows.of(dataset())
    sides = (empty if ratio == 0 else full, empty if ratio == 1 else full)
    batch = draw(Mixed(Uniform(0.5), NStep(3, 0.5), ratio), sides, jr.key(6), 10)
    assert batch.reward.shape == (10,) and (np.asarray(batch.action) != 0).any(1).sum() >= 9
    k_old, _ = jr.split(jr.key(6))
    if 0 < share < 10:
        wanted = np.sort(draw(Uniform(0.5), full, k_old, share).reward)
        assert set(wanted.tolist()) <= set(np.asarray(batch.reward).tolist())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: Uniform(1.1), "gamma is a discount in"),
        (lambda: NStep(0, 0.9), "steps must be at least 1"),
        (lambda: Chunk(0, 0.9), "horizon must be at least 1"),
        (lambda: Chunk(2, float("nan")), "gamma is a discount in"),
        (lambda: Mixed(Uniform(1.0), Uniform(1.0), 1.5), "share of offline rows"),
    ],
)
def test_settings_that_make_no_sense(wrong, words: str):
    with pytest.raises(ValueError, match=words):
        wrong()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("sampler", [Uniform(0.9), NStep(3, 0.9), Chunk(3, 0.9)], ids=str)
def test_the_next_action_is_what_the_same_trajectory_did_next(source, sampler):
    """At the state that follows what a row counts, by as many rows as an action has; unknown beyond the trajectory."""
    rows = SOURCES[source]()
    batch = jax.tree.map(np.asarray, draw(sampler, rows, jr.key(4), 300))
    last = np.flatnonzero(np.asarray(rows.next[:n]) < 0)
    last = last[np.searchsorted(last, np.arange(n))]
    horizon = batch.action.shape[1] // 2
    known = np.zeros(n, bool)
    for i, first in enumerate(batch.obs[:, 0].astype(int)):
        after = by_hand(first, getattr(sampler, "steps", horizon), 0.9, last)[1][-1] + 1
        ahead = [after + k for k in range(horizon) if after + k <= last[first]]
        mask = np.repeat(np.arange(horizon) < len(ahead), 2)
        np.testing.assert_array_equal(batch.next_mask[i], mask)
        wanted = np.array([[a, a + 0.5] for a in ahead]).ravel() / 50
        np.testing.assert_allclose(batch.next_action[i][mask], wanted, rtol=1e-6)
        known[first] = bool(ahead)
    assert known.any() and not known[last].any()


def test_corrections_stay_with_their_actions():
    """Rows 6, 8 and 15 are a person's: their numbers in single steps and in chunks; none in replay mixed in."""
    data = dataset(inside=False)
    data = replace(data, human=np.isin(np.arange(n), [6, 8, 15]))
    rows = Rows.of(data)
    for sampler, width in ((Uniform(0.9), 1), (NStep(3, 0.9), 1), (Chunk(3, 0.9), 3)):
        batch = sampler(rows, jr.key(0), 64)
        i = np.round(50 * np.asarray(batch.action)[:, ::2]).astype(int)  # repeated beyond the end
        assert batch.human is not None and batch.human.shape == (64, 2 * width)
        np.testing.assert_array_equal(batch.human, np.repeat(np.isin(i, [6, 8, 15]), 2, 1))
    mixed = Mixed(Uniform(0.9), Uniform(0.9), 0.5)((rows, replay()), jr.key(1), 64)
    person = np.isin(np.round(50 * np.asarray(mixed.action)[:, 0]), [6, 8, 15])
    assert mixed.human is not None and 0 < float(mixed.human.sum()) <= 2 * person.sum()
    assert Uniform(0.9)(replay(), jr.key(0), 4).human is None
