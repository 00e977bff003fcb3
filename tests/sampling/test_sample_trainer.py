from dataclasses import replace
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.closeness import assert_close

from contraflow.flow.path import VE, Cosine, Linear, Path
from contraflow.flow.posterior.control import Fixed, MinVariance
from contraflow.flow.posterior.importance import Reverse
from contraflow.flow.posterior.proposal import Noise
from contraflow.flow.solver import Euler
from contraflow.flow.targets import Gaussian, eight_gaussians, forty_gaussians, two_moons
from contraflow.sampling.compare import equal_calls, floor, interval, judge
from contraflow.sampling.fab import Fab
from contraflow.sampling.methods import METHODS
from contraflow.sampling.targets import find_target, mixture_log_density
from contraflow.sampling.trainer import Estimated, FlowState, Trainer, draw, field, start, train

GAUSSIAN = Gaussian(jnp.array([0.8, -0.5]), 0.7)


def change(trainer: Trainer, **fields: Any) -> Trainer:
    """The trainer with other settings, of its own or of its method."""
    mine = {name: fields.pop(name) for name in tuple(fields) if hasattr(trainer, name)}
    return replace(trainer, method=replace(trainer.method, **fields), **mine)


def small(method: str, samples: int) -> Trainer:
    """A quick version of a method."""
    quick = change(METHODS[method].with_samples(samples), steps=400, batch=16, width=32)
    return change(quick, endpoints=64, bounded=True) if isinstance(quick.method, Estimated) else quick


def fresh(trainer: Trainer) -> FlowState:
    """One flow, without the axis of seeds."""
    return jax.tree.map(lambda leaf: leaf[0], start(trainer, jr.split(jr.key(0), 1)))


def samples_of(trainer: Trainer, state, n: int = 2000) -> np.ndarray:
    net = jax.tree.map(lambda leaf: leaf[0], state.flow)
    return np.asarray(jax.jit(lambda k: draw(trainer, net, Euler(400), k, n))(jr.key(9)))


@pytest.mark.parametrize(
    ("method", "path", "tolerance"),
    [
        ("rfm", Linear(), 0.17),
        pytest.param("qne", Linear(), 0.28, marks=pytest.mark.slow),
        pytest.param("idem", Linear(), 0.36, marks=pytest.mark.slow),
        pytest.param("mixture", Cosine(), 0.17, marks=pytest.mark.slow),
        # Off by .17 with 400 updates: self-normalised weights are biased where the noise is wide, and the source is not
        # quite that of the path. The exact field is off by .01 in the spread and .14 in the mean.
        pytest.param("idem-ve", VE(0.01, 4.0), 0.36, marks=pytest.mark.slow),
        pytest.param("fab", Linear(), 0.17, marks=pytest.mark.slow),
    ],
)
def test_every_method_learns_a_gaussian(method: str, path: Path, tolerance: float):
    trainer = replace(small(method, 512), path=path)
    x = samples_of(trainer, train(trainer, GAUSSIAN, jr.split(jr.key(0), 1)))
    # In deviations of the target.
    assert_close(x.mean(0), [0.8, -0.5], tolerance, scale=0.7)
    assert_close(x.std(0), 0.7, tolerance)


def test_methods_are_what_their_names_say():
    assert METHODS["rfm"] == Trainer(Estimated(Reverse(control=MinVariance())))
    estimators = {name: m.method.estimator for name, m in METHODS.items() if isinstance(m.method, Estimated)}
    assert estimators["qne"].control == Fixed(0.0) and estimators["idem"].control == Fixed(1.0)
    assert estimators["rfm"].proposal == estimators["qne"].proposal == estimators["idem"].proposal == Noise()
    assert estimators["idem-ve"] == estimators["idem"] and isinstance(METHODS["idem-ve"].path, VE)
    with_k = METHODS["idem"].with_samples(7)
    assert with_k == change(METHODS["idem"], estimator=replace(estimators["idem"], samples=7))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "wanted"),
    [
        (change(METHODS["mixture"].with_samples(5), steps=4, every=3, batch=3, endpoints=4, particles=2), 4 * 3 * 5),
        (Trainer(Fab(samples=4, temperatures=3), steps=5, every=2, batch=2), 5 * 2 * 4),
    ],
    ids=["mixture", "fab"],
)
def test_density_calls_are_counted_truly(trainer: Trainer, wanted: int):
    calls = []

    def log_pi(x):
        jax.debug.callback(lambda x: calls.append(1), x)
        return GAUSSIAN(x)

    state = jax.block_until_ready(train(replace(trainer, width=8), log_pi, jr.split(jr.key(0), 1)))
    jax.effects_barrier()
    assert state.step.tolist() == [trainer.steps]
    assert len(calls) == trainer.critic_calls == wanted


def test_unequal_density_calls_are_refused():
    trainers = {m: METHODS[m].with_samples(16) for m in METHODS}
    assert equal_calls(trainers) == 16 * 64 * Trainer.steps
    with pytest.raises(ValueError, match="equal density calls"):
        equal_calls(trainers | {"qne": replace(trainers["qne"], steps=3000)})


@pytest.mark.slow
def test_lanes_are_independent():
    """Three flows side by side, the last two with one seed but other learning rates; the middle one also alone."""
    trainer = change(METHODS["qne"].with_samples(4), steps=6, every=3, batch=4, width=8, endpoints=8)
    keys = jr.split(jr.key(3), 2)
    seen = []
    lanes = jr.clone(keys)[jnp.array([0, 1, 1])]
    together = train(trainer, GAUSSIAN, lanes, jnp.array([1e-2, 1e-2, 1e-9]), progress=lambda n, _: seen.append(n))
    assert together.step.tolist() == [6, 6, 6] and seen == [3, 6]
    alone = train(trainer, GAUSSIAN, keys[1:2], jnp.array([1e-2]))
    weights, single = jax.tree.leaves(together.net), jax.tree.leaves(alone.net)
    for a, b in zip(weights, single, strict=True):
        if b.size:  # a network without a condition has an empty weight for it
            assert_close(a[1], b[0], 1e-4)  # six updates of rounding
    sizes = [np.abs(a).max() for a in weights if a.size]
    assert not any(
        np.abs(a[0] - a[1]).max() < 1e-3 * s for a, s in zip((a for a in weights if a.size), sizes, strict=True)
    )
    # The last one has hardly moved.
    assert any(np.abs(a[1] - a[2]).max() > 1e-2 * s for a, s in zip((a for a in weights if a.size), sizes, strict=True))


@pytest.mark.slow
def test_wild_estimates_are_projected_into_the_box():
    """Gradient-expectation at small t is off by orders of magnitude: the loss tells."""
    target = eight_gaussians()
    losses = {}
    for bounded in (False, True):
        trainer = change(METHODS["idem"].with_samples(8), steps=10, bounded=bounded, width=8, endpoints=16)
        _, losses[bounded] = trainer.method.round(trainer, target, 10, fresh(trainer), jr.key(1))
    # |v| <= (box + |x_t|) / (1 - t) on average over t
    assert losses[True] < 1e4 < losses[False]


def test_the_newest_rounds_are_kept():
    trainer = change(METHODS["qne"].with_samples(2), kept=3, endpoints=8, batch=2, every=1, width=8)
    state, first = fresh(trainer), None
    for i in range(3):
        before = state.memory
        state, _ = jax.jit(partial(trainer.method.round, trainer, GAUSSIAN, 1))(state, jr.key(i))
        first = state.memory[:8] if first is None else first
        np.testing.assert_array_equal(state.memory[8:], before[:16])
        assert state.memory.shape == (24, 2) and not np.allclose(state.memory[:8], before[:8])
    np.testing.assert_array_equal(state.memory[16:], first)


@pytest.mark.parametrize("path", [VE(0.01, 4.0), Cosine()])
def test_a_network_that_predicts_noise_moves_by_its_velocity(path: Path):
    """With the exact E[x0 | x_t] of a Gaussian for the network's output, as its last bias."""
    x, t = jnp.array([0.3, -1.2]), jnp.array(0.4)
    mean = GAUSSIAN.posterior_mean(path, x, t)
    method = replace(METHODS["idem-ve"], path=path, width=8)
    still = jax.tree.map(jnp.zeros_like, method.flow.init(jr.key(0), 2, 0))
    exact = eqx.tree_at(lambda flow: flow.net.last.bias, still, path.x0_from_x1(mean, x, t))
    np.testing.assert_allclose(field(exact)(x, t), path.velocity(mean, x, t), rtol=1e-4)
    if isinstance(path, VE):  # zero noise: nothing moves
        assert draw(method, still, Euler(3), jr.key(0), 4000).std() == pytest.approx(4.0, rel=0.05)


def test_a_diverged_flow_still_gives_queries_in_the_box():
    trainer = change(METHODS["qne"].with_samples(4), steps=2, width=8, endpoints=16, learning_rate=1e-9)
    state = fresh(trainer)
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, state.flow)
    for net in (broken, state.flow):
        pool = trainer.method.draw(trainer, net, jr.key(2))
        assert bool(jnp.all(jnp.abs(pool) <= trainer.box)) and pool.std() > 0.1


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batch": -1},
        {"width": 0},
        {"learning_rate": 0.0},
        {"box": -1.0},
        {"t_min": 0.5},
        {"uniform": 2.0},
    ],
)
def test_settings_out_of_range(wrong: dict):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        change(Trainer(), **wrong)


@pytest.mark.parametrize("mixture", [two_moons(points=16), eight_gaussians(), forty_gaussians()])
def test_the_fast_density_is_the_density(mixture):
    """Inner products of size |x|^2 / s^2, up to 2e4 for the narrowest modes, cancel: the two agree to double precision,
    and in single precision as far as it goes."""
    x = 3.0 * jr.normal(jr.key(0), (200, 2))
    x = jnp.concatenate([x, mixture.sample(jr.key(1), 200)])
    largest = float(jnp.max(jnp.sum(x**2, 1)) / jnp.min(mixture.std) ** 2)
    single = jax.vmap(mixture_log_density(mixture))(x), jax.vmap(mixture)(x)
    assert_close(*single, 1e-6, scale=largest)
    with jax.enable_x64(True):
        wide, points = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), (mixture, x))
        fast, exact = (jax.vmap(jax.value_and_grad(f))(points) for f in (mixture_log_density(wide), wide))
        for got, want in zip(fast, exact, strict=True):
            assert_close(got, want, 1e-12, scale=largest)


def test_floor_and_judge_agree_on_a_perfect_sampler():
    """A flow that stands still, on its own source N(0, I): judged as exact."""
    target = replace(find_target("two-moons", 4.0), sample=lambda key, n: jr.normal(key, (n, 2)))
    trainer = Trainer(width=8)
    state = start(trainer, jr.split(jr.key(0), 2))
    still = jax.tree.map(jnp.zeros_like, state)
    scores = judge(target, trainer, still, 5, 1000, jr.split(jr.key(1), 2))
    floors = floor(target, 1000, jr.key(2), pairs=2)
    assert scores[0] != scores[1]
    for row in (*scores, *floors):
        assert row["sliced_wasserstein"] < 0.12 and abs(row["mmd2"]) < 0.006 and row["sinkhorn"] < 0.12


def test_intervals():
    mean, low, high = interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and 1.0 < low < 2.0 and 3.0 < high < 4.0
    assert interval([0.3]) == (0.3, 0.3, 0.3)
    assert interval([1.0, float("inf")])[0] == float("inf")


@pytest.mark.learn
def test_two_moons_are_learned():
    target = find_target("two-moons", 4.0)
    trainer = change(METHODS["rfm"].with_samples(128), bounded=True)
    state = train(trainer, target.log_density, jr.split(jr.key(0), 1))
    score = judge(target, trainer, state, 20, 2000, jr.split(jr.key(1), 1))[0]
    assert score["sliced_wasserstein"] < 0.2 and score["mmd2"] < 0.01
