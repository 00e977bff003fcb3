"""Solvers: declared order against measured, diffrax as oracle, closed forms on Gaussians, marginals of the SDE."""

from functools import partial

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import stats
from tests.closeness import assert_close

from contraflow.flow.path import Cosine, Linear
from contraflow.flow.solver import RK4, ConstantNoise, DecayingNoise, Euler, EulerMaruyama, Heun, Midpoint

SOLVERS = {"euler": Euler, "midpoint": Midpoint, "heun": Heun, "rk4": RK4}
MEAN, STD = 1.3, 0.4


def nonlinear(x, t):
    return jnp.sin(3.0 * t + x[::-1]) - 0.5 * x**2 * t


@partial(jax.jit, static_argnums=(0, 1))
def solve(solver, drift, x, t0, t1):
    return solver(drift, x, t0, t1)


@pytest.mark.parametrize("name", SOLVERS)
def test_steps_that_shrink_are_steps_of_another_clock(name):
    """dx/dt over t(s) = t0 + (t1 - t0) (1 - (1 - s)^2): the ends are those, and the order is the same."""
    times: list[float] = []
    solve(
        SOLVERS[name](4, 2.0),
        lambda x, t: jax.debug.callback(times.append, t) or jnp.ones_like(x),
        jnp.zeros(1),
        1.0,
        3.0,
    )
    jax.effects_barrier()
    starts = [1.0 + 2.0 * (1 - (1 - i / 4) ** 2) for i in range(4)]
    assert all(np.isclose(times, t).any() for t in starts) and max(times) <= 3.0
    with jax.enable_x64(True):
        x = jnp.array([0.3, -0.8])
        n = 32 if name == "rk4" else 64
        ends = [solve(SOLVERS[name](k, 2.0), nonlinear, x, 0.1, 1.7) for k in (n, 2 * n, 64 * n)]
        errors = [np.abs(np.asarray(end - ends[-1])).max() for end in ends[:-1]]
        assert_close(np.log2(errors[0] / errors[1]), SOLVERS[name].order, 0.2, scale=1.0)
    with pytest.raises(ValueError, match="power"):
        SOLVERS[name](4, 0.0)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.usefixtures("allow_rank_promotion")
def test_order_and_oracle(name):
    with jax.enable_x64(True):
        x, t0, t1 = jnp.array([0.3, -0.8]), 0.1, 1.7
        term = diffrax.ODETerm(lambda t, x, args: nonlinear(x, t))
        oracle = diffrax.diffeqsolve(
            term, diffrax.Dopri8(), t0, t1, 0.01, x, stepsize_controller=diffrax.PIDController(rtol=1e-12, atol=1e-13)
        ).ys[0]
        steps = 32 if name == "rk4" else 128
        errors = [
            float(jnp.linalg.norm(solve(SOLVERS[name](k), nonlinear, x, jnp.asarray(t0), jnp.asarray(t1)) - oracle))
            for k in (steps, 2 * steps)
        ]
        # The next order adds to the measured one a term in the step, a 64th or less.
        assert_close(np.log2(errors[0] / errors[1]), SOLVERS[name].order, 0.1, scale=1.0)
        assert errors[1] < (1e-7 if name == "rk4" else 5e-2) * jnp.linalg.norm(oracle)
        back = solve(SOLVERS[name](2 * steps), nonlinear, oracle, jnp.asarray(t1), jnp.asarray(t0))
        assert_close(back, x, 3.0, scale=errors[1])  # as far off as on the way there


@pytest.mark.parametrize("name", SOLVERS)
def test_nfe_counts_calls(name):
    calls = []

    def drift(x, t):
        jax.debug.callback(lambda: calls.append(0))
        return -x

    solver = SOLVERS[name](6)
    jax.block_until_ready(solver(drift, jnp.ones(2), 0.0, 1.0))
    jax.effects_barrier()
    assert len(calls) == solver.nfe


def gaussian_velocity(x, t):
    """Exact velocity of the linear path to N(MEAN, STD^2)."""
    variance = (t * STD) ** 2 + (1 - t) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


@pytest.mark.parametrize(("steps", "known"), [(1, 0.0), (2, 0.138), (5, 0.285), (20, 0.3685)])
def test_euler_on_a_gaussian(steps, known):
    """Standard deviation prod_k (1 + h a_k), exactly 0 for one step."""
    t = np.arange(steps) / steps
    closed = np.prod(1 + (t * STD**2 - (1 - t)) / ((t * STD) ** 2 + (1 - t) ** 2) / steps)
    assert_close(closed, known, 2e-3, scale=0.4)  # three digits of a deviation that tends to .4
    x = jax.vmap(lambda x: Euler(steps)(gaussian_velocity, x, 0.0, 1.0))(jnp.array([[-1.0], [0.0], [2.0]]))
    assert_close(x[:, 0], MEAN + closed * np.array([-1, 0, 2]), 1e-6)


@pytest.mark.parametrize("name", ["midpoint", "heun", "rk4"])
def test_exact_field_gives_the_data(name):
    x = SOLVERS[name](64)(gaussian_velocity, jnp.array([-1.0, 2.0]), 0.0, 1.0)
    assert_close(x, MEAN + STD * np.array([-1.0, 2.0]), 5e-4)  # of 64 steps


@pytest.mark.parametrize(
    "sigma",
    [ConstantNoise(0.5), ConstantNoise(2.0), DecayingNoise(0.7), DecayingNoise(2**0.5), lambda t: 3.0 * t * (1.0 - t)],
    ids=["constant", "strong", "flow-grpo", "memoryless", "bump"],
)
def test_sde_keeps_the_marginals(sigma):
    steps, n, t0, t1 = 240, 4000, 0.05, 0.95
    times = np.linspace(t0, t1, steps + 1)
    deviation = np.sqrt((times * STD) ** 2 + (1 - times) ** 2)
    k_start, k_noise = jr.split(jr.key(0))
    start = t0 * MEAN + deviation[0] * jr.normal(k_start, (n, 1))
    solver = EulerMaruyama(steps, sigma)
    run = jax.jit(jax.vmap(lambda x, k: solver.chain(gaussian_velocity, x, t0, t1, k).xs))
    xs = np.asarray(run(start, jr.split(k_noise, n)))[..., 0]
    assert np.std(xs[:, -1] - MEAN - STD * xs[:, 0]) > 0.05  # it is not the ODE
    for i in (0, steps // 3, 2 * steps // 3, steps):
        # Four standard errors, and 1 % for the finite step.
        assert abs(xs[:, i].mean() - times[i] * MEAN) < 4 * deviation[i] / np.sqrt(n) + 0.01 * deviation[i]
        assert abs(xs[:, i].std() / deviation[i] - 1) < 4 / np.sqrt(2 * n) + 0.01


def test_sde_of_another_path():
    """The score comes from the solver's own path: with the wrong one the spread is off by far more than the margin."""
    path, n, t0, t1 = Cosine(), 4000, 0.05, 0.95

    def field(x, t):
        a, b = path.alpha(t), path.beta(t)
        mean = (b**2 * MEAN + a * STD**2 * x) / (b**2 + (a * STD) ** 2)
        return path.velocity(mean, x, t)

    def spread(t):
        return np.sqrt((np.sin(np.pi * t / 2) * STD) ** 2 + np.cos(np.pi * t / 2) ** 2)

    k_start, k_noise = jr.split(jr.key(1))
    start = np.sin(np.pi * t0 / 2) * MEAN + spread(t0) * jr.normal(k_start, (n, 1))
    solver = EulerMaruyama(200, ConstantNoise(1.0), path)
    x = jax.jit(jax.vmap(lambda x, k: solver(field, x, t0, t1, k)))(start, jr.split(k_noise, n))
    assert abs(x.std() / spread(t1) - 1) < 4 / np.sqrt(2 * n) + 0.015
    keys = jr.split(jr.clone(k_noise), n)
    wrong = jax.jit(jax.vmap(lambda x, k: EulerMaruyama(200)(field, x, t0, t1, k)))(start, keys)
    assert abs(wrong.std() / spread(t1) - 1) > 0.05


def test_chain_log_prob_is_the_gaussian_density_of_each_step():
    sigma, steps, t0, t1 = DecayingNoise(0.7), 7, 0.1, 0.9
    chain = EulerMaruyama(steps, sigma).chain(nonlinear, jnp.array([0.5, -1.0]), t0, t1, jr.key(0))
    xs, dt = np.asarray(chain.xs, np.float64), (t1 - t0) / steps
    assert xs.shape == (steps + 1, 2)
    assert chain.log_prob.shape == (steps,)
    for i in range(steps):
        t, x = t0 + dt * i, xs[i]
        v = np.sin(3 * t + x[::-1]) - 0.5 * x**2 * t
        score = -(x - t * v) / (1 - t)  # linear path: E[x0] = x - t v, score = -E[x0] / beta
        s = 0.7 * np.sqrt((1 - t) / t)
        expected = stats.norm(x + dt * (v + 0.5 * s**2 * score), s * np.sqrt(dt)).logpdf(xs[i + 1]).sum()
        # The log-density is of order 1; a step is a small difference of states, divided by its noise.
        assert_close(chain.log_prob[i], expected, 1e-4, scale=max(1.0, abs(expected)))


def test_sde_without_noise_is_euler():
    x = jnp.array([0.5, -1.0])
    quiet = EulerMaruyama(9, ConstantNoise(0.0))(nonlinear, x, 0.1, 0.8, jr.key(0))
    assert_close(quiet, Euler(9)(nonlinear, x, 0.1, 0.8), 1e-6)
    loud = EulerMaruyama(9, ConstantNoise(1.0))
    k1, k2 = jr.split(jr.key(0))
    assert jnp.any(loud(nonlinear, x, 0.1, 0.8, k1) != loud(nonlinear, x, 0.1, 0.8, k2))


def test_mistakes_are_named():
    for make in (*SOLVERS.values(), EulerMaruyama):
        for wrong in (0, -1, True):
            with pytest.raises(ValueError, match=f"{make.__name__}: steps must be a whole number, at least 1"):
                make(steps=wrong)
        solver = make()
        object.__setattr__(solver, "steps", 2.5)  # the checks of annotations, in tests only, would refuse it before
        with pytest.raises(ValueError, match=f"{make.__name__}: steps must be a whole number, at least 1, got 2.5"):
            solver.__post_init__()
    with pytest.raises(ValueError, match="pass key"):
        EulerMaruyama(2)(nonlinear, jnp.zeros(2), 0.1, 0.9)
    assert EulerMaruyama(2).path == Linear()
