"""Adjoint matching between Gaussians, where the tilt and the fixed point in K steps are known, and on a mixture."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.agents.align import tables
from tests.agents.align.tables import M, S, table, trained
from tests.flow.tilts import Tilt, affine

from contraflow.agents.align.adjoint_matching import AdjointMatching
from contraflow.agents.align.base import Scored
from contraflow.core.optim import Optim
from contraflow.core.types import EnvSpec, UserError
from contraflow.envs.align.mixture import centre
from contraflow.flow.adjoint import lean_adjoint, rollout
from contraflow.flow.model import Ddim, FlowSpec
from contraflow.flow.plan import FlowSDE, Plan
from contraflow.nets.velocity import ResidualMLP

LAM, K = 0.5, 20
AGENT = AdjointMatching(temperature=LAM, steps=K, minibatches=1, optim=Optim(0.03, decay_steps=400))


def line(x, cond):
    return 0.6 * jnp.sum(x)


def bowl(x, cond):
    return -0.75 * jnp.sum((x - 0.8) ** 2)


def shifted(steps):
    """Mean and std of Euler's ends at the fixed point for a linear reward: its adjoint is the same on all paths."""
    base = table(steps)
    field = lambda x, t: base.velocity(x, t, jnp.zeros(1))
    found = lean_adjoint(field, jnp.zeros((steps + 1, 1)), jnp.full(1, -0.6 / LAM))
    push = jnp.append((found.velocity - found.base)[:, 0], 0.0)
    return replace(base.net, b=base.net.b + push).ends()


def test_a_linear_reward_shifts_the_mean():
    """By s^2 c / lambda, 6 % more in 20 steps, and the spread stays: within 3 % of the fixed point's, which is that of
    the tilt within 1 % in 200 steps."""
    state, _ = trained(AGENT, table(K), line, 400, 128)
    (mean, std), right, plain = state.flow.net.ends(), shifted(K), table(K).net.ends()
    assert abs((mean - plain[0]) / (right[0] - plain[0]) - 1) < 0.03 and abs(std / plain[1] - 1) < 0.03
    assert abs((shifted(200)[0] - M) / (S**2 * 0.6 / LAM) - 1) < 0.01


@pytest.mark.parametrize("times", [None, 5])
def test_a_quadratic_reward_adds_precision(times):
    """The fixed point in 20 steps, which is the tilt 1 / s^2 + k / lambda up to Euler's error: within 3 % of the shift
    and of the spread; on all steps, and on a quarter of them."""
    state, metrics = trained(replace(AGENT, times=times), table(K), bowl, 400, 128)
    mean, std = state.flow.net.ends()
    right = Tilt(M, S, 0.8, 1.5, 1 / LAM).fixed_point(K)
    assert abs((mean - right[0]) / (right[0] - M)) < 0.03 and abs(std / right[1] - 1) < 0.03
    # Path by path the entropy varies by about its size: the last 100 iterations have 12 800 paths.
    np.testing.assert_allclose(np.mean(metrics["path_kl"][-100:]), right[2], rtol=0.06)


def test_noise_that_remembers_the_start_biases_the_tilt():
    """For r = c x the optimal control of any noise moves the mean by c Var(x_K | x_0): c s^2 (1 - rho^2), with the
    correlation rho of x_0 and x_K, which only memoryless noise makes 0."""
    steps, rate, shifts = 400, 0.6 / LAM, {}
    field = lambda x, t: affine(t, M, S)[0] * x + affine(t, M, S)[1]
    for a in (0.3, 0.7, 2**0.5):
        plan = Plan(steps, FlowSDE(a))
        at = jax.vmap(lambda k, x, plan=plan: plan.step(field, jnp.full(1, x), k), (0, None))
        k = jnp.arange(steps)
        slopes, stds = np.asarray(at(k, 1.0)[0] - at(k, 0.0)[0])[:, 0], np.asarray(at(k, 0.0)[1])
        after = np.append(np.cumprod(slopes[::-1])[::-1][1:], 1.0)  # d x_K / d x_{k+1}
        shifts[a] = rate * np.sum((after * stds) ** 2)
        rho = np.prod(slopes) / S
        np.testing.assert_allclose(shifts[a], rate * S**2 * (1 - rho**2), rtol=0.02)
    assert abs(shifts[2**0.5] / (rate * S**2) - 1) < 0.02 and shifts[0.7] < 0.995 * rate * S**2
    assert shifts[0.3] < 0.7 * rate * S**2


def push(x, t, cond):
    """A running cost f = .8 x."""
    return 0.8 * jnp.sum(x)


def test_the_optimum_of_a_running_cost():
    """f = c x moves the ends of the process by -(c / lambda) Cov(int x_t dt, x_1) = -c s^2 / (2 lambda), and those of
    the ODE by -(c s / lambda) int sqrt(t^2 s^2 + (1 - t)^2) dt, which is more: both within 5 %."""
    zero = lambda x, cond: 0.0 * jnp.sum(x)
    steps = 40
    agent = replace(AGENT, steps=steps, running=push)
    state, _ = trained(agent, table(steps), zero, 400, 128)
    t = (np.arange(4000) + 0.5) / 4000
    ode = -0.8 / LAM * S * np.mean(np.sqrt(t**2 * S**2 + (1 - t) ** 2))
    process = -0.8 / LAM * S**2 / 2
    moved = state.flow.net.ends()[0] - table(steps).net.ends()[0]
    assert abs(moved / ode - 1) < 0.05

    def end(flow, key):  # the same noises for both: their difference has none
        one = lambda f: lambda x, t: f.velocity(x, t, jnp.zeros(1))
        k_start, k_path = jr.split(key)
        return rollout(one(flow), one(state.reference), jr.normal(k_start, (1,)), steps, k_path)[-1, 0]

    both = [jax.vmap(lambda k, f=f: end(f, k))(jr.split(jr.key(5), 64)) for f in (state.flow, table(steps))]
    assert abs(float(np.mean(both[0] - both[1])) / process - 1) < 0.05


def test_without_a_reward_nothing_moves():
    """Adam would make much of rounding: the losses and gradients themselves are 0."""
    _, metrics = trained(AGENT, table(K), lambda x, cond: 0.0 * jnp.sum(x), 1, 32)
    assert float(metrics["loss"][0]) < 1e-10 and float(metrics["path_kl"][0]) < 1e-10


def test_steps_are_chosen_from_all_parts_of_a_path():
    """Every step as often as any other, one in each part: 6 of 20 over 2000 draws, within five standard errors."""
    agent = replace(AGENT, times=6)
    found = np.asarray(jax.vmap(agent.chosen)(jr.split(jr.key(0), 2000)))
    assert found.shape == (2000, 6) and np.all(np.diff(found, axis=1) >= 0)
    counts = np.bincount(found.ravel(), minlength=20)
    assert np.abs(counts - 600).max() < 5 * 600**0.5
    np.testing.assert_array_equal(AGENT.chosen(jr.key(0)), np.arange(20))


def test_the_largest_losses_may_be_left_out():
    """keep = .9 lowers the loss of the same batch, to the mean of the losses below the quantile."""
    one = lambda keep: float(trained(replace(AGENT, keep=keep), table(K), bowl, 1, 64)[1]["loss"][0])
    assert 0 < one(0.9) < 0.9 * one(1.0)


@pytest.mark.learn
def test_on_a_mixture_it_learns_the_tilt():
    """Eight Gaussians and r = -4 |x - c|^2, lambda = 2: total variation to the exact tilt below .13 after 512 000 paths
    of 60 steps (.10 seen, .14 with a quarter of them; the reference has .38). Modes are far apart, and the adjoint has
    heavy tails between them."""
    agent = AdjointMatching(
        temperature=2.0, steps=60, times=15, minibatches=1, optim=Optim(5e-3, decay_steps=500, max_grad_norm=5.0)
    )
    flow, reward = tables.corrected(), lambda x, cond: centre(x, x)
    state, _ = trained(agent, flow, reward, 500, 1024)
    away, before, *_ = tables.tilt_distance(state.flow, reward, 2.0)
    assert away < 0.13 < 0.3 < before, (away, before)


def temporary(steps, direct=False, rows=256):
    """Bytes that an update, or a gradient through the sampler itself, takes beside its arguments and results."""
    flow = FlowSpec(solver=Ddim(steps), network=ResidualMLP(64, 2))
    agent = replace(AGENT, flow=flow, steps=steps, times=4)
    state = agent.init(jr.key(0), EnvSpec(1, 2, 1, 1, True))
    cond = jnp.zeros((1, 1))
    draws = jax.eval_shape(lambda s: agent.explore(s, cond, rows, jr.key(0)), state)

    def update(state, draws, key):
        return agent.update(state, Scored(cond, draws, jnp.zeros((1, rows, 1)), score=bowl), key)[0].flow

    def through(state, draws, key):
        noise = state.flow.noise(key, rows)
        return jax.grad(lambda f: jnp.mean(jax.vmap(lambda z: bowl(f.sample(z, cond[0]), cond[0]))(noise)))(state.flow)

    compiled = jax.jit(through if direct else update).lower(state, draws, jr.key(0)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_is_that_of_the_states():
    """From 10 to 40 steps an update takes a few numbers more for each coordinate of each state that is added, and a
    gradient through the sampler those of all layers."""
    added = 30 * 256 * 2 * 4  # bytes of one array of states
    ours, direct = (temporary(40, d) - temporary(10, d) for d in (False, True))
    assert ours < 12 * added and direct > 5 * ours, (ours / added, direct / added)


def test_rewards_without_gradients_are_refused():
    with pytest.raises(UserError, match="rfm-align"):
        trained(AGENT, table(K), line, 1, 4, host=True)


@pytest.mark.parametrize("bad", [{"times": 21}, {"steps": 1}, {"keep": 0.0}, {"temperature": 0.0}])
def test_settings_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValueError, match=r"times|keep|temperature"):
        AdjointMatching(**bad)
