"""The one flow, with networks that are the flow of a known Gaussian: all predictions on all paths, averages."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import stats
from tests.closeness import assert_close

from contraflow.flow.fewstep import Matching, MeanFlow, Shortcut, SplitMeanFlow
from contraflow.flow.likelihood import (
    ChangeOfVariables,
    Denoising,
    Exact,
    Pushforward,
    action_log_prob,
    denoising_log_density,
)
from contraflow.flow.matching import consistency_error, matching_error, posterior_error, square, with_objective
from contraflow.flow.model import CLOCK, Ddim, Flow, FlowSpec
from contraflow.flow.path import VE, VP, Cosine, Linear, Polynomial
from contraflow.flow.solver import RK4, Euler, EulerMaruyama, Midpoint
from contraflow.flow.support import Box, Real, Tanh
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.flow import FlowPolicy

MEAN, STD = 0.3, 0.1
PATHS = [Linear(), Polynomial(), Cosine(), VP(), VE()]
PREDICTIONS = ["velocity", "noise", "data"]
COND = jnp.zeros(3)
by_name = lambda value: value if isinstance(value, str) else type(value).__name__


def ends(path, x, t, mean=MEAN, std=STD):
    """(E[x1 | x_t], E[x0 | x_t]) where x1 ~ N(mean, std^2)."""
    a, b = path.alpha(t), path.beta(t)
    var = a**2 * std**2 + b**2
    return (mean * b**2 + a * std**2 * x) / var, b * (x - a * mean) / var


class Known(eqx.Module):
    """What the network of a flow with these settings should return where x1 ~ N(MEAN, STD^2)."""

    spec: FlowSpec = eqx.field(static=True)
    dim: int = eqx.field(static=True, default=2)

    def __call__(self, x, t, cond):
        t, path = t / self.spec.clock, self.spec.path
        if self.spec.unit_input:
            x = x * jnp.sqrt(path.alpha(t) ** 2 + path.beta(t) ** 2)
        x1, x0 = ends(path, x, t)
        return {"velocity": path.d_alpha(t) * x1 + path.d_beta(t) * x0, "noise": x0, "data": x1}[self.spec.predict]


def known(**settings) -> Flow:
    spec = FlowSpec(**settings)
    return Flow(Known(spec), spec)


def carried(path, x, t0=0.0, t1=1.0):
    """Where the flow takes x from t0 to t1: by the same number of deviations from the mean."""
    scale = lambda t: jnp.sqrt(path.alpha(t) ** 2 * STD**2 + path.beta(t) ** 2)
    t0, t1 = jnp.asarray(t0), jnp.asarray(t1)
    return path.alpha(t1) * MEAN + scale(t1) / scale(t0) * (x - path.alpha(t0) * MEAN)


@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS, ids=by_name)
def test_one_posterior_in_all_guises(path, predict):
    """Ends and velocity are those of the Gaussian, whatever the network says of it and in whatever units it sees."""
    for changes in ({}, {"clock": 1.0, "unit_input": True}):
        flow = known(path=path, predict=predict, **changes)
        for t in (0.2, 0.55, 0.9):
            t = jnp.asarray(t)
            x = path.alpha(t) * jnp.array([0.35, 0.2]) + path.beta(t) * jnp.array([0.8, -1.1])
            x1, x0 = ends(path, x, t)
            got = flow.ends(x, t, COND)
            # Each is a difference of numbers as large as x_t, divided by the coefficient of what is sought.
            size = float(jnp.abs(x).max() + 1)
            assert_close(got[0], x1, 1e-5, scale=size / min(1.0, float(path.alpha(t))))
            assert_close(got[1], x0, 1e-5, scale=size / min(1.0, float(path.beta(t))))
            v = path.d_alpha(t) * x1 + path.d_beta(t) * x0
            assert_close(flow.velocity(x, t, COND), v, 1e-4, scale=float(jnp.abs(v).max()) + size)


@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS, ids=by_name)
def test_steps_lead_to_the_gaussian(path, predict):
    """Also where alpha_0 = 0 (x_t is the noise then), and where the source is wider than 1."""
    flow = known(path=path, predict=predict, solver=Ddim(400))
    x0 = flow.noise(jr.key(0), 16)
    x1 = jax.jit(jax.vmap(lambda x: flow.sample(x, COND)))(x0)
    assert_close(x1, carried(path, x0), 0.1, scale=STD)  # of 400 steps of first order, in deviations of the data


@pytest.mark.parametrize("solver", [Euler(400), Midpoint(40), RK4(20), EulerMaruyama(2000, path=Linear())], ids=by_name)
def test_other_solvers_run_between_the_margins(solver):
    flow = known(solver=solver, margin=0.05)
    x0 = flow.noise(jr.key(0), 400)
    x1 = jax.jit(jax.vmap(lambda x, k: flow.sample(x, COND, k)))(x0, jr.split(jr.key(1), 400))
    want = carried(Linear(), x0, 0.05, 0.95)
    if isinstance(solver, EulerMaruyama):  # the same distribution by other ways: four errors of 800 draws
        assert_close(x1.mean(), want.mean(), 0.2, scale=want.std())
        assert_close(x1.std(), want.std(), 0.12)
        assert np.corrcoef(np.ravel(x1), np.ravel(want))[0, 1] < 0.9
    else:
        assert_close(x1, want, 0.1 if isinstance(solver, Euler) else 0.02, scale=STD)


def test_ve_starts_from_its_own_source():
    """N(0, s_max^2), not N(0, 1): a target of deviation .1 comes out with .1, where a unit source gives .01."""
    flow = known(path=VE(), predict="data", solver=Ddim(200))
    x0, x1 = jax.jit(lambda k: flow.particles(COND, k, 4000))(jr.key(0))
    np.testing.assert_allclose(x0.std(), 10.0, rtol=0.05)
    np.testing.assert_allclose(x1.std(), 0.1, rtol=0.05)
    np.testing.assert_allclose(x1.mean(), MEAN, rtol=0.02)
    # A policy draws from it too.
    actions = jax.jit(lambda k: FlowPolicy(flow).particles(COND, k, 4000))(jr.key(0))
    np.testing.assert_allclose(actions, jnp.clip(x1, -1, 1), rtol=1e-4)


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_polynomial_is_finite_at_the_source(predict):
    """D = 0 there: 0 / 0 in every conversion of a velocity."""
    flow = FlowSpec(path=Polynomial(), predict=predict, network=ResidualMLP(8, 1, 4), solver=Ddim(3)).init(
        jr.key(0), 2, 3
    )
    x, zero = jnp.array([0.3, -1.0]), jnp.zeros(())
    assert all(np.isfinite(part).all() for part in flow.ends(x, zero, COND))
    loss = lambda flow: jnp.sum(flow.sample(x, COND) ** 2)
    value, grad = jax.jit(jax.value_and_grad(loss))(flow)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grad))


def test_a_clip_bounds_the_end_and_moves_the_noise_with_it():
    flow = known(predict="noise", clip=0.3)
    t, x = jnp.asarray(0.5), jnp.array([0.9, -0.7])
    x1, x0 = flow.ends(x, t, COND)
    free, _ = ends(Linear(), x, t)
    assert free[0] > 0.31 and free[1] < 0.29
    np.testing.assert_allclose(x1, jnp.clip(free, -0.3, 0.3), rtol=1e-5)
    np.testing.assert_allclose(t * x1 + (1 - t) * x0, x, rtol=1e-5)
    np.testing.assert_allclose(flow.velocity(x, t, COND), x1 - x0, rtol=1e-5)
    np.testing.assert_allclose(flow.step(x, t, jnp.asarray(1.0), COND), x1, rtol=1e-5)


@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("path", [Linear(), VP()], ids=by_name)
def test_what_is_regressed_on(path, predict):
    """Pairs of ends give what the network should say of them; posterior means what it does say."""
    flow = known(path=path, predict=predict)
    t, x0, x1 = jnp.asarray(0.6), jnp.array([0.5, -1.0]), jnp.array([0.4, 0.1])
    x_t = path.alpha(t) * x1 + path.beta(t) * x0
    target = {"velocity": path.d_alpha(t) * x1 + path.d_beta(t) * x0, "noise": x0, "data": x1}[predict]
    error = matching_error(flow, COND, x0, x1, t)
    assert_close(error, flow.net(x_t, 5 * t, COND) - target, 1e-5)
    mean, _ = ends(path, x_t, t)
    unit = float(jnp.abs(target).max())
    assert_close(posterior_error(flow, COND, mean, x_t, t), 0.0, 1e-4, scale=unit)
    assert jnp.abs(posterior_error(flow, COND, mean + 0.1, x_t, t)).max() > 0.02
    grad = jax.grad(lambda mean: jnp.sum(posterior_error(flow, COND, mean, x_t, t) ** 2))(mean + 0.1)
    np.testing.assert_array_equal(grad, 0.0)  # held fixed


@pytest.mark.parametrize("support", [Tanh(), Box(), Real()], ids=by_name)
def test_actions_and_their_ends(support):
    flow = known(support=support)
    u = jnp.array([[0.4, -1.7], [0.2, 0.9]])
    want = {"Tanh": jnp.tanh(u), "Box": jnp.clip(u, -1, 1), "Real": u}[type(support).__name__]
    np.testing.assert_allclose(flow.action(u), want, rtol=1e-6)
    np.testing.assert_allclose(flow.action(support.latent(want)), want, rtol=1e-5)
    slope = jnp.linalg.slogdet(jax.jacfwd(support.action)(u[1]))[1]
    assert_close(support.log_det(u[1]), slope, 1e-5, scale=1.0)
    edge = support.latent(jnp.array([1.0, -1.0]))
    assert np.isfinite(edge).all()


@pytest.mark.parametrize("density", [ChangeOfVariables(RK4(40), Exact()), Denoising(8, 4), Pushforward()], ids=by_name)
def test_densities_of_a_gaussian_flow(density):
    """log pi(a) of tanh u, u ~ N(.3, .1^2), by all three, with the flow's own velocity, margin and sampler."""
    flow = known(support=Tanh(), solver=Euler(400), margin=1e-3)
    x0, u = jax.jit(lambda k: flow.particles(COND, k, 4))(jr.key(0))
    keys = jr.split(jr.key(1), 4)
    got = jax.jit(jax.vmap(lambda *row: action_log_prob(density, flow, COND, *row)))(x0, u, keys)
    of_u = stats.norm(MEAN, STD).logpdf(np.asarray(u)).sum(1)
    if isinstance(density, Denoising):  # few levels and probes, so compared with the same of the known denoiser
        noise = lambda x, t: ends(Linear(), x, t)[1]
        by_hand = lambda u, k: denoising_log_density(noise, Linear(), u, 1e-3, 1 - 1e-3, 8, 4, jr.clone(k))
        of_u = np.asarray(jax.jit(jax.vmap(by_hand))(u, keys))
    want = of_u - np.log(1 - np.tanh(u) ** 2).sum(1)
    # Nats. The sampler's own density is that of its 400 steps, which narrow the distribution by some 4 %.
    assert_close(got, want, 0.1 if isinstance(density, Pushforward) else 0.02, scale=1.0)


def test_steps_asked_for_take_the_place_of_the_solvers():
    flow = known(solver=Ddim(1))
    x0 = flow.noise(jr.key(0))
    np.testing.assert_allclose(flow.sample(x0, COND), x0 + flow.velocity(x0, jnp.zeros(()), COND), rtol=1e-5)
    assert_close(flow.sample(x0, COND, steps=400), carried(Linear(), x0), 0.1, scale=STD)


@pytest.mark.parametrize(
    "bad",
    [
        {"margin": 0.5},
        {"margin": -0.1},
        {"clock": 0.0},
        {"clip": 0.0},
        {"clip": -1.0},
        {"path": VP(), "solver": EulerMaruyama(5, path=Linear())},
        {"averaged": True, "path": VP()},
        {"averaged": True, "predict": "noise"},
        {"averaged": True, "solver": Midpoint(2)},
    ],
)
def test_what_does_not_fit_is_refused(bad):
    with pytest.raises(ValueError, match=r"margin|clock|clip|path|averaged"):
        FlowSpec(**bad)


# Average velocities: u(x_t, t, r) of a step of any size.

AVERAGED = FlowSpec(averaged=True, clock=1.0, support=Tanh(), solver=Ddim(1), network=ResidualMLP(8, 1, 8))
OBJECTIVES = [Shortcut(levels=3), SplitMeanFlow(), MeanFlow()]
WIDE, FAR = 0.4, 1.3  # another Gaussian, N(FAR, WIDE^2)


class Stepping(eqx.Module):
    """The flow of N(FAR, WIDE^2), which reads the length of its step off the features it is given."""

    embedding: int = eqx.field(static=True, default=8)
    dim: int = eqx.field(static=True, default=2)

    def __call__(self, x, t, cond):
        # The first features are sine and cosine of the length itself.
        n = self.embedding
        length = jnp.mod(jnp.arctan2(cond[3], cond[3 + n // 2]), 2 * jnp.pi) / CLOCK
        length = jnp.where(length > 1.1, 0.0, length)  # a zero that was rounded to below zero
        r = t + length
        scale = lambda t: jnp.sqrt(t**2 * WIDE**2 + (1 - t) ** 2)
        velocity = FAR + (t * WIDE**2 - (1 - t)) / scale(t) ** 2 * (x - t * FAR)
        step = (r * FAR + scale(r) / scale(t) * (x - t * FAR) - x) / jnp.where(length < 1e-4, 1.0, length)
        return jnp.where(length < 1e-4, velocity, step)


def stepping(steps: int = 1) -> Flow:
    return Flow(Stepping(), replace(AVERAGED, solver=Ddim(steps)))


@pytest.fixture(scope="module")
def wrong() -> Flow:
    """A network that is no flow of anything."""
    flow = AVERAGED.init(jr.key(5), 2, 3)
    last = flow.net.last.weight
    return eqx.tree_at(lambda f: f.net.last.weight, flow, 0.3 * jr.normal(jr.key(6), last.shape))


@pytest.mark.parametrize("steps", [1, 4])
def test_any_number_of_steps_gives_the_distribution(steps):
    x0, u = jax.jit(lambda k: stepping(steps).particles(COND, k, 500))(jr.key(1))
    assert_close(u, FAR + WIDE * x0, 2e-3)
    t, r = jnp.asarray(0.3), jnp.asarray(0.8)
    x = x0[0]
    assert_close(stepping().step(x, t, r, COND), x + 0.5 * stepping().average(x, t, r, COND), 1e-5)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_density_of_the_sampler(steps, wrong):
    """That of a known Gaussian; of a network that is wrong by differences of its ends."""
    log_prob = jax.jit(
        jax.vmap(lambda flow, x0, u: action_log_prob(Pushforward(), flow, COND, x0, u, jr.key(7)), (None, 0, 0))
    )
    exact = stepping(steps)
    x0, u = exact.particles(COND, jr.key(1), 50)
    known = stats.norm(FAR, WIDE).logpdf(np.asarray(u)).sum(1) - np.log(1 - np.tanh(u) ** 2).sum(1)
    assert_close(log_prob(exact, x0, u), known, 0.01, scale=1.0)  # nats

    flow = Flow(wrong.net, exact.spec)
    x0, u = flow.particles(COND, jr.key(1), 50)
    h = 1e-2
    end = jax.jit(jax.vmap(lambda x: flow.action(flow.sample(x, COND))))
    across = [(end(x0 + h * e[None]) - end(x0 - h * e[None])) / (2 * h) for e in jnp.eye(2)]
    slope = across[0][:, 0] * across[1][:, 1] - across[0][:, 1] * across[1][:, 0]
    by_hand = jax.scipy.stats.norm.logpdf(x0).sum(1) - jnp.log(jnp.abs(slope))
    assert_close(log_prob(flow, x0, u), by_hand, 0.05, scale=1.0)  # nats; second differences of h = .01
    assert np.std(np.log(np.abs(slope))) > 0.1


@pytest.mark.parametrize("objective", OBJECTIVES, ids=by_name)
def test_the_exact_flow_has_nothing_to_tie(objective, wrong):
    """But for Euler's error of the smallest steps of a shortcut. A network that is wrong has something."""
    x1 = FAR + WIDE * jr.normal(jr.key(2), (200, 2))
    x0 = jr.normal(jr.key(4), (200, 2))

    def tied(flow):
        def one(x0, x1, key):
            return square(consistency_error(objective, flow, flow, COND, x0, x1, *jr.split(key)))

        return jax.vmap(one)(x0, x1, jr.split(jr.key(3), 200)).mean()

    error, bad = jax.jit(tied)(stepping()), jax.jit(tied)(wrong)
    # MeanFlow's target is only defined for r > t, and the fake's derivative is that of a step only there.
    assert error < (0.02 if isinstance(objective, Shortcut) else 1e-3)
    assert bad > 10 * error


def test_matching_is_of_the_velocity_at_t():
    """The regression on a posterior mean sees u(x, t, t), whatever the steps in use."""
    flow, x_t, t = stepping(), jnp.array([0.3, -0.2]), jnp.asarray(0.4)
    mean, x0 = ends(Linear(), x_t, t, FAR, WIDE)
    assert square(posterior_error(flow, COND, mean, x_t, t)) < 1e-8
    assert square(posterior_error(flow, COND, mean + 0.1, x_t, t)) > 1e-2
    assert_close(flow.velocity(x_t, t, COND), mean - x0, 1e-4)


def test_an_objective_makes_the_flow_an_average():
    plain = replace(AVERAGED, averaged=False)
    assert with_objective(plain, MeanFlow()) == AVERAGED and with_objective(plain, Matching()) == plain
    with pytest.raises(ValueError, match="objective that makes steps consistent"):
        with_objective(AVERAGED, Matching())
