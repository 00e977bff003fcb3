"""Annealed importance sampling and what `fab` makes of it, against quadrature and closed forms."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.integrate import quad
from tests.closeness import assert_close

from contraflow.flow.path import Linear
from contraflow.flow.targets import Gaussian
from contraflow.sampling.distances import modes_found
from contraflow.sampling.fab import Buffer, Fab, anneal
from contraflow.sampling.targets import find_target, many_well
from contraflow.sampling.trainer import Trainer, noised, start

GAUSSIAN = Gaussian(jnp.array([0.8, -0.5]), 0.7)
FAB = Fab(samples=40, temperatures=7)
SMALL = Trainer(FAB, steps=100, batch=16, every=50, kept=2, width=8)


def double_well(x):
    return jnp.sum(-(x**4) + 2.0 * x**2 + 0.5 * x)


def chains(log_pi, dim: int, mean: float, std: float, sizes: float, temperatures: int = 4, n: int = 20_000):
    betas = jnp.arange(1, temperatures + 1) / temperatures
    one = partial(anneal, log_pi=log_pi, mean=jnp.full(dim, mean), std=jnp.full(dim, std), betas=betas)
    return jax.jit(jax.vmap(partial(one, sizes=jnp.full(temperatures, sizes))))(jr.split(jr.key(0), n))


def assert_mean(values, exact: float, precision: float):
    """Within four standard errors, which are below `precision`."""
    error = np.std(values) / np.sqrt(len(values))
    assert error < precision
    assert abs(np.mean(values) - exact) < 4 * error


@pytest.mark.parametrize("sizes", [0.4, 1.2])  # nearly all accepted, about half
def test_weights_are_unbiased_on_a_gaussian(sizes: float):
    """pi = 3 N(mean, .7^2) in two dimensions: E[w] = 3, E[w x] = 3 mean, E[w |x - mean|^2] = 3 * 2 * .49."""
    ends = chains(lambda x: GAUSSIAN(x) + jnp.log(3.0), 2, 0.2, 1.0, sizes)
    w, x = np.exp(np.asarray(ends.log_w, float)), np.asarray(ends.x, float)
    assert_mean(w, 3.0, 0.03)
    for i, mean in enumerate(GAUSSIAN.mean):
        assert_mean(w * x[:, i], 3.0 * float(mean), 0.04)
    assert_mean(w * np.sum((x - np.asarray(GAUSSIAN.mean)) ** 2, 1), 3.0 * 2 * 0.49, 0.05)
    assert ends.accept.min() + ends.accept.mean() > 0.2 and ends.accept.max() <= 1.0


@pytest.mark.parametrize("temperatures", [1, 6])
def test_weights_are_unbiased_on_a_double_well(temperatures: int):
    p = lambda x: np.exp(-(x**4) + 2 * x**2 + 0.5 * x)
    exact, first, right = quad(p, -5, 5)[0], quad(lambda x: x * p(x), -5, 5)[0], quad(p, 0, 5)[0]
    ends = chains(double_well, 1, 0.0, 1.5, 0.4, temperatures)
    w, x = np.exp(np.asarray(ends.log_w, float)), np.asarray(ends.x[:, 0], float)
    assert_mean(w, exact, 0.02 * exact)
    assert_mean(w * x, first, 0.02 * exact)
    assert_mean(w * (x > 0), right, 0.02 * exact)


def test_more_temperatures_are_less_variance():
    ess = []
    for temperatures in (1, 4, 16):
        w = jax.nn.softmax(chains(GAUSSIAN, 2, 0.0, 2.0, 0.3, temperatures, 4000).log_w)
        ess.append(float(1 / jnp.sum(w**2)) / 4000)
    assert ess[0] < 0.8 * ess[1] < 0.64 * ess[2]


def test_weights_are_equal_where_the_base_is_the_target():
    target = Gaussian(jnp.full(3, 0.3), 1.7)
    ends = chains(target, 3, 0.3, 1.7, 0.5, n=500)
    assert_close(ends.log_w, 0.0, 1e-5, scale=jnp.abs(jax.vmap(target)(ends.x)).max())
    buffer = Buffer(ends.x, ends.log_w, jnp.array(500), jnp.ones(4))
    assert buffer.ess() == pytest.approx(500, rel=1e-3) and np.exp(buffer.log_z()) == pytest.approx(1.0, rel=1e-3)


def test_a_density_with_walls_has_chains_that_stay_inside():
    """pi = exp(-x) on x > 0, -inf elsewhere: Z = 1."""
    ends = chains(lambda x: jnp.sum(jnp.where(x > 0, -x, -jnp.inf)), 1, 0.5, 1.5, 0.5)
    w = np.exp(np.asarray(ends.log_w, float))
    assert_mean(w, 1.0, 0.02)
    assert np.isfinite(ends.x).all() and np.all(ends.x[w > 0] > 0)


def test_log_z_and_samples_of_many_well():
    """Against scipy's quadrature of one well; 164.69568 is also the figure used in the literature for d = 32."""
    target = many_well()
    p = lambda x: np.exp(-(x**4) + 6 * x**2 + 0.5 * x)
    mass, deep, first, second = (quad(lambda x, f=f: f(x) * p(x), -5, 5, points=[-1.7, 1.7])[0] for f in (
        lambda x: 1.0, lambda x: float(x > 0), lambda x: x, lambda x: x * x
    ))  # fmt: skip
    assert target.dim == 32
    assert target.log_z == pytest.approx(16 * (np.log(mass) + 0.5 * np.log(2 * np.pi)), rel=1e-6)
    assert target.log_z == pytest.approx(164.69568, rel=1e-6)
    x = np.asarray(target.sample(jr.key(0), 4000), float)
    wells, normal = x[:, ::2].ravel(), x[:, 1::2].ravel()
    assert_mean(wells > 0, deep / mass, 0.002)
    assert_mean(wells, first / mass, 0.006)
    assert_mean(wells**2, second / mass, 0.006)
    assert_mean(normal, 0.0, 0.005)
    assert_mean(normal**2, 1.0, 0.007)
    assert np.abs(np.corrcoef(x.T) - np.eye(32)).max() < 0.09
    value = -(1.3**4) + 6 * 1.3**2 + 0.65 - 0.5 * 0.49
    assert target.log_density(jnp.tile(jnp.array([1.3, -0.7]), 16)) == pytest.approx(16 * value, rel=1e-5)
    assert target.plane(jnp.array([1.3, 0.0])) == pytest.approx(value + 0.5 * 0.49, rel=1e-5)


def test_the_optimum_of_the_weighted_regression_is_the_velocity_of_a_gaussian():
    """v(x, t) is linear in x there, so at one time least squares finds it: slope and intercept in closed form."""
    method = replace(FAB, samples=400)
    memory = method.memory(SMALL, jr.key(0), 2)
    for i in range(2):
        memory = jax.jit(partial(method.fill, SMALL, GAUSSIAN, 50))(memory, jr.key(i + 1))
    x1 = method.endpoints(memory, jr.key(9), 40_000)
    x_t, t = noised(SMALL, jr.key(3), jr.key(4), x1)
    near = np.asarray(jnp.abs(t - 0.6) < 0.02)
    target = jax.vmap(Linear().velocity)(x1, x_t, t)[near]
    design = np.column_stack([x_t[near], np.ones(near.sum())])
    slope = np.linalg.lstsq(design, np.asarray(target))[0]
    time = jnp.array(0.6)
    exact = lambda x: Linear().velocity(GAUSSIAN.posterior_mean(Linear(), x, time), x, time)
    # Five standard errors of least squares, whose inputs have a deviation of .6; of the endpoints, which are picked
    # again from 8000 weighted chains, 7 %.
    error = 5 / near.sum() ** 0.5 / 0.6
    assert_close(slope[2], exact(jnp.zeros(2)), error, scale=np.std(target))
    assert_close(slope[:2].T, jax.jacobian(exact)(jnp.zeros(2)), error, scale=np.std(target))
    assert_close(x1.mean(0), GAUSSIAN.mean, 0.07, scale=0.7)
    assert_close(x1.std(0), 0.7, 0.07)


def test_the_base_goes_from_wide_to_the_moments_of_the_buffer():
    method = replace(FAB, prior=100.0)
    empty = method.memory(SMALL, jr.key(0), 2)
    mean, std = method.base(empty, 4.0)
    np.testing.assert_allclose(mean, 0.0)
    np.testing.assert_allclose(std, 2.0)
    x = GAUSSIAN.sample(jr.key(1), 1000)
    mean, std = method.base(Buffer(x, jnp.zeros(1000), jnp.array(1000), empty.sizes), 4.0)
    share = 1000 / 1100
    np.testing.assert_allclose(mean, share * x.mean(0), rtol=1e-3)
    np.testing.assert_allclose(std**2, share * jnp.mean(x**2, 0) + (1 - share) * 4.0 - mean**2, rtol=1e-3)


def test_the_buffer_keeps_the_newest_rounds_and_tunes_the_moves():
    fill = jax.jit(partial(FAB.fill, SMALL, GAUSSIAN, 50))
    n = FAB.chains(SMALL, 50)
    buffer = FAB.memory(SMALL, jr.key(0), 2)
    assert n == 50 * 16 * 40 // 8 and buffer.x.shape == (2 * n, 2)
    seen = []
    for i in range(3):
        buffer = fill(buffer, jr.key(i))
        seen.append(buffer.x[:n])
        assert buffer.count == min(i + 1, 2) * n
        if i == 0:
            assert np.exp(buffer.log_z()) == pytest.approx(1.0, rel=0.05)
    np.testing.assert_array_equal(buffer.x[n:], seen[1])
    drawn = FAB.endpoints(buffer, jr.key(9), 1000)
    assert np.abs(drawn[:500].mean(0) - drawn[500:].mean(0)).max() < 0.2
    newest = np.isin(drawn[:, 0], seen[2][:, 0])
    assert 0.3 < newest[:500].mean() < 0.7  # in random order, not round after round
    assert np.exp(buffer.log_z()) == pytest.approx(1.0, rel=0.05)
    assert np.isfinite(buffer.log_w).all() and bool(jnp.all(buffer.sizes > 0.3))  # first moves were too timid


def test_forty_modes_are_all_found_by_chains():
    target = find_target("forty", 4.0)
    assert modes_found(target.sample(jr.key(1), 4000), target.sample(jr.key(2), 4000), target.modes) == 1.0
    assert target.modes.means.shape == (40, 2) and bool(jnp.all(jnp.abs(target.modes.means) <= 2.0))
    assert target.modes.std[0] * 20 == pytest.approx(np.log1p(np.e))
    method = Fab(samples=64, temperatures=31)
    trainer = Trainer(method)
    fill = jax.jit(partial(method.fill, trainer, target.log_density, 50))
    buffer = method.memory(trainer, jr.key(0), 2)
    for i in range(3):
        buffer = fill(buffer, jr.key(i + 3))
    points = method.endpoints(buffer, jr.key(8), 4000)
    assert modes_found(points, target.sample(jr.key(2), 4000), target.modes) >= 0.95
    assert np.exp(buffer.log_z()) == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("wrong", [{"temperatures": 0}, {"samples": 0}, {"prior": 0.0}])
def test_settings_out_of_range(wrong: dict):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Fab(**wrong)


def test_chains_must_be_whole():
    with pytest.raises(ValueError, match="density calls per chain"):
        Trainer(Fab(samples=10, temperatures=62))


def test_a_fresh_flow_has_an_empty_buffer():
    state = start(SMALL, jr.split(jr.key(0), 2))
    assert state.memory.count.tolist() == [0, 0] and bool(jnp.all(state.memory.log_w == -jnp.inf))
