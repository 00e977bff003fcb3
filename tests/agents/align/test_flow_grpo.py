"""The GRPO family. Fields are tables, v = a_k x + b_k at step k, so a gradient shows which steps it comes from and the
distribution of the ends between Gaussians follows without sampling."""

from dataclasses import dataclass, replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax.scipy.stats import norm
from tests.closeness import assert_close

from contraflow.agents import presets
from contraflow.agents.align.base import AlignState, Scored
from contraflow.agents.align.flow_grpo import Clip, Filter, FlowGRPO
from contraflow.core.optim import Optim
from contraflow.flow.model import Flow, FlowSpec
from contraflow.flow.plan import Ancestral, FlowSDE, Noisy, Plan
from contraflow.flow.support import Real
from contraflow.rl.group import GroupAdvantage, exponential

FAMILY = (
    "flow-grpo", "mix-grpo", "mix-grpo-flash", "mix-grpo-flash-star", "temp-flow-grpo", "grpo-guard", "tree-rpo",
    "flow-dppo", "ddrl", "flow-grpo-one",
)  # fmt: skip
PLAIN = GroupAdvantage(std="none")
SPEC = FlowSpec(clock=1.0, support=Real())


class Table(eqx.Module):
    """v = a_k x + b_k with k = t K."""

    a: jax.Array
    b: jax.Array

    @property
    def dim(self):
        return self.b.shape[1]

    def __call__(self, x, t, cond):
        k = jnp.clip(jnp.round(t * self.a.shape[0]).astype(int), 0, self.a.shape[0] - 1)
        return self.a[k] * x + self.b[k]


@dataclass(frozen=True)
class Descent(Optim):
    """Steps are gradients."""

    @property
    def tx(self):
        return optax.sgd(1.0)


def table(steps, a=0.0, b=0.0, dim=1):
    return Flow(Table(jnp.full(steps, a), jnp.full((steps, dim), b)), SPEC)


def exact(steps, mean=0.0, std=1.0):
    """The field from N(0, 1) to N(mean, std^2) at the beginnings of steps."""
    t = jnp.arange(steps) / steps
    slope = t * std**2 / ((1 - t) ** 2 + t**2 * std**2)
    offset = (1 - t) ** 2 * mean / ((1 - t) ** 2 + t**2 * std**2)
    return Flow(Table((slope - 1) / (1 - t), (offset / (1 - t))[:, None]), SPEC)


def state_of(agent, flow, reference=None, step=0):
    reference = flow if reference is None else reference
    return AlignState(flow, agent.optim.init(flow), jnp.asarray(step, jnp.int32), reference)


def iteration(agent, state, reward, prompts, group, key, data=None):
    """(next state, metrics, draws) with rewards reward(x)."""
    k_explore, k_update = jr.split(key)
    cond = jnp.zeros((prompts, 1))
    draws = agent.explore(state, cond, group, k_explore)
    r = jax.vmap(jax.vmap(reward))(draws.end)[..., None]
    state, metrics = agent.update(state, Scored(cond, draws, r, data), k_update)
    return state, metrics, draws


run = jax.jit(iteration, static_argnums=(0, 2, 3, 4))


def gradient(agent, flow, reward, group=64, prompts=64, seed=0, step=0, reference=None):
    """The gradient of the loss at the flow that drew the samples, as a Table, with metrics and draws."""
    agent = replace(agent, optim=Descent(), minibatches=1)
    new, metrics, draws = run(agent, state_of(agent, flow, reference, step), reward, prompts, group, jr.key(seed))
    return jax.tree.map(jnp.subtract, flow.net, new.flow.net), metrics, draws


def slope(x):
    return jnp.sum(x)


def hill(x):
    return -jnp.sum((x - 1.4) ** 2)


def flat(x):
    return 0.0 * x[0] + 3.0


def gentle(x):
    return -0.5 * jnp.sum((x - 1.0) ** 2)


def made(n, std, gap, dim, seed=0):
    """(steps of an old flow, means of a new one): one step each, whose means differ by gap / sqrt(dim) everywhere."""
    mean = jnp.ones((n, 1, dim))
    new = mean + std * jr.normal(jr.key(seed), mean.shape)
    steps = Noisy(mean, new, mean, jnp.full((n, 1), std), jnp.zeros((n, 1), jnp.int32))
    return steps, mean - gap / dim**0.5


# Ratios


def test_the_ratio_is_that_of_densities():
    steps, mean = made(50, 0.3, 0.4, 3)
    got, moved = FlowGRPO().log_ratio(steps, mean)
    log_p = lambda mean: jnp.sum(norm.logpdf(steps.new, mean, 0.3), -1)
    assert_close(got, log_p(mean) - log_p(steps.mean), 1e-5)
    assert_close(moved, jnp.full((50, 1), 0.4**2 / (2 * 0.3**2)), 1e-5)


@pytest.mark.parametrize("name", ["flow-grpo", "mix-grpo", "grpo-guard", "tree-rpo"])
def test_the_ratio_is_one_at_the_old_flow(name):
    """Up to the rounding of means, which a step of std .1 or more divides."""
    agent = presets()[name].agent
    _, metrics, _ = gradient(agent, exact(agent.plan.steps, 1.0, 0.5), slope, 16, 4)
    assert abs(float(metrics["log_ratio"])) < 1e-5 and float(metrics["moved"]) < 1e-9


def test_the_mean_ratio_is_one_with_sums_and_less_with_means():
    """200 000 draws: five standard errors. exp(-m / 2 + m / (2 n)) with m = |gap|^2 / (n std^2)."""
    n, dim, std, gap = 200_000, 4, 0.5, 0.6
    steps, mean = made(n, std, gap, dim)
    rho = jnp.exp(FlowGRPO().log_ratio(steps, mean)[0])
    square = gap**2 / std**2
    assert abs(float(rho.mean()) - 1) < 5 * np.sqrt(np.expm1(square) / n)
    m = square / dim
    shifted = jnp.exp(FlowGRPO(ratio="mean").log_ratio(steps, mean)[0])
    want = np.exp(-m / 2 + m / (2 * dim))
    assert want < 0.9 and abs(float(shifted.mean()) - want) < 5 * want * np.sqrt(np.expm1(m / dim) / n)


def test_a_guarded_ratio_is_centred_with_the_size_of_the_move():
    """E = 0 and Var = |gap|^2, whatever the noise; 200 000 draws: five standard errors."""
    n, gap = 200_000, 0.4
    for std in (0.1, 2.0):
        log = FlowGRPO(guard=True).log_ratio(*made(n, std, gap, 3))[0]
        assert abs(float(log.mean())) < 5 * gap / np.sqrt(n)
        assert abs(float(log.var()) / gap**2 - 1) < 5 * np.sqrt(2 / n)


def test_the_guard_weighs_the_steps_of_flow_grpo_by_their_noise():
    """At the old flow by std / h exactly."""
    plan, flow = Plan(6, FlowSDE(0.7)), exact(6, 1.0, 0.5)
    plain, _, draws = gradient(FlowGRPO(plan=plan, kl=0.0), flow, slope)
    guarded, _, _ = gradient(FlowGRPO(plan=plan, kl=0.0, guard=True), flow, slope)
    weights = draws.extras.std[0, 0] / plan.h
    assert weights.max() > 3 * weights.min()
    assert_close(guarded.a, weights * plain.a, 1e-4)
    assert_close(guarded.b, weights[:, None] * plain.b, 1e-4)


def test_the_filter_drops_steps_that_moved_on():
    log, divergence = jnp.array([[0.3, -0.3, 0.3]]), jnp.array([[0.03, 0.03, 0.01]])
    up = Filter(0.02)(log, jnp.full((1, 3), 2.0), divergence)
    down = Filter(0.02)(log, jnp.full((1, 3), -2.0), divergence)
    e = np.exp(0.3)
    np.testing.assert_allclose(up, [[0.0, -2 / e, -2 * e]], rtol=1e-6)
    np.testing.assert_allclose(down, [[2 * e, 0.0, 2 * e]], rtol=1e-6)


def test_the_clip_bounds_what_a_step_can_win():
    log = jnp.log(jnp.array([[0.5, 1.0, 1.5]]))
    loss = lambda a: Clip(0.2)(log, jnp.full((1, 3), a), jnp.zeros((1, 3)))
    np.testing.assert_allclose(loss(1.0), [[-0.5, -1.0, -1.2]], rtol=1e-6)
    np.testing.assert_allclose(loss(-1.0), [[0.8, 1.0, 1.5]], rtol=1e-6)


# Places of noise


def test_a_window_of_all_steps_is_flow_grpo():
    flow, all_steps = exact(6, 1.0, 0.5), FlowGRPO(plan=Plan(6))
    one, _, _ = gradient(all_steps, flow, hill)
    for place in ("sweep", "random"):
        window = replace(all_steps, plan=Plan(6, window=6, place=place))
        two, _, _ = gradient(window, flow, hill, step=40)
        jax.tree.map(np.testing.assert_array_equal, one, two)


def test_equal_rewards_give_no_gradient():
    for name in ("flow-grpo-one", "tree-rpo", "grpo-guard"):
        agent = presets()[name].agent
        found, _, _ = gradient(agent, exact(agent.plan.steps, 1.0, 0.5), flat, 16, 4)
        assert all(not np.any(leaf) for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("name", ["mix-grpo", "mix-grpo-flash", "tree-rpo"])
def test_the_gradient_stays_in_the_window(name):
    agent = presets()[name].agent
    plan = agent.plan
    found, _, _ = gradient(agent, exact(plan.steps, 1.0, 0.5), hill, 16, 4, step=3 * plan.every)
    np.testing.assert_array_equal(np.flatnonzero(found.a), 3 + np.arange(4))


@pytest.mark.parametrize("a", [0.3, 0.7, 2**0.5])
def test_the_divergence_of_a_step(a):
    """kappa t / (1 - t) |dv|^2 h with kappa = (1 + a^2 / 2)^2 / (2 a^2); at t = 0, where the noise is that at h for the
    drift and for nothing else, h^2 |dv|^2 / (2 a^2)."""
    steps, dv = 5, 0.3
    agent = FlowGRPO(plan=Plan(steps, FlowSDE(a), window=1, place="sweep", every=1), kl=0.1)
    flow = exact(steps, 1.0, 0.5)
    reference = eqx.tree_at(lambda f: f.net.b, flow, flow.net.b + dv)
    found = [gradient(agent, flow, slope, 8, 2, step=k, reference=reference)[1]["kl"] for k in range(steps)]
    t, h = np.arange(steps) / steps, 1 / steps
    want = (1 + a**2 / 2) ** 2 / (2 * a**2) * t / (1 - t) * dv**2 * h
    want[0] = h**2 * dv**2 / (2 * a**2)
    np.testing.assert_allclose(found, want, rtol=1e-4)


def test_one_noisy_step_sees_about_a_kth_of_the_gradient():
    """v = theta at K = 4, a = .5 and r = -(x - 1.4)^2: dE[r] / dtheta = 2.8. One noisy step at a random place finds
    2.8 (1 + (1 - 1 / K) a^2 / 2) / K = .766, because the other steps are not differentiated. 6.5e4 draws: 5 % is
    three standard errors or more."""
    flow = table(4)
    chain = FlowGRPO(plan=Plan(4, FlowSDE(0.5)), advantage=PLAIN, kl=0.0)
    full = 4 * jnp.sum(gradient(chain, flow, hill, 64, 1024)[0].b)
    step = replace(chain, plan=Plan(4, FlowSDE(0.5), window=1, place="sweep", every=1))
    one = [jnp.sum(gradient(step, flow, hill, 64, 1024, seed=k, step=k)[0].b) for k in range(4)]
    assert_close(full, -2.8, 0.05)
    assert_close(np.mean(one), -2.8 * (1 + 0.75 * 0.125) / 4, 0.05)


def test_weights_by_noise_have_mean_one():
    agent = presets()["temp-flow-grpo"].agent
    std = []
    for k in range(agent.plan.steps):
        zero = jnp.zeros(1)
        std.append(float(agent.plan.noise(zero, zero, jnp.asarray(k * agent.plan.h), agent.plan.h)[1]))
    weights = agent._weights(jnp.asarray(std)[:, None])
    assert_close(weights.mean(), 1.0, 1e-5)
    assert_close(weights[:, 0], np.asarray(std) / np.mean(std), 1e-5)


# Trees


def test_the_gradient_of_a_shared_step_is_the_mean_over_its_leaves():
    """By hand, from the edges of the tree: -A_edge (x' - mean) / std^2 dmean/db with A_edge averaged below it."""
    plan = Plan(5, FlowSDE(0.7), window=2, branches=(2, 3))
    agent = FlowGRPO(plan=plan, advantage=PLAIN, kl=0.0)
    found, _, draws = gradient(agent, exact(5, 1.0, 0.5), hill, group=12, prompts=3)
    steps, reward = draws.extras, np.asarray(jax.vmap(jax.vmap(hill))(draws.end))
    advantage = (reward - reward.mean(1, keepdims=True)) * 12 / 11
    for level, below in ((0, 3), (1, 1)):
        edge = advantage.reshape(-1, below).mean(1)
        kick = np.asarray(steps.new - steps.mean)[..., level, 0].reshape(-1, below)
        assert (kick == kick[:, :1]).all()
        std = np.asarray(steps.std)[..., level].reshape(-1, below)[:, 0]
        inner = plan.h * (1 + (0.7**2 / 2 if level else 0.0))
        want = -np.mean(edge * kick[:, 0] / std**2) * inner / 2
        assert_close(found.b[level, 0], want, 1e-4)


def test_children_are_compared_with_each_other():
    """A reward that differs between starts, but not between children, teaches TempFlow nothing."""
    plan = Plan(5, FlowSDE(0.7), window=1, branches=(4,))
    agent = FlowGRPO(plan=plan, group="start", advantage=PLAIN, kl=0.0)
    cond, key = jnp.zeros((2, 1)), jr.key(0)
    state = state_of(agent, exact(5, 1.0, 0.5))
    draws = agent.explore(state, cond, 8, key)
    reward = jnp.array([[0.0] * 4 + [5.0] * 4, [1.0] * 4 + [2.0] * 4])[..., None]
    steps = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), draws.extras)
    credit = lambda agent, r: agent._credit(Scored(cond, draws, r), steps, steps.mean)
    assert not np.any(credit(agent, reward))
    assert np.any(credit(replace(agent, group="condition"), reward))
    one = reward.at[0, 0].set(3.0)
    np.testing.assert_allclose(credit(agent, one)[:5, 0], [3.0, -1.0, -1.0, -1.0, 0.0], atol=1e-6)


# Where training ends


def affine(plan, net, k):
    """(slope, offset, std) of a step as a Gaussian."""
    t = jnp.asarray(k * plan.h)
    at = lambda x: plan.noise(x, net(x, t, None), t, plan.h)
    (one, std), (zero, _) = at(jnp.ones(1)), at(jnp.zeros(1))
    return one[0] - zero[0], zero[0], std if k < plan.noisy else 0.0


def chain(plan, net, reference=None):
    """Mean and variance of the ends, and E[sum_k D_k] from a reference."""
    mean, var, total = 0.0, 1.0, 0.0
    for k in range(plan.steps):
        slope, offset, std = affine(plan, net, k)
        if reference is not None and k < plan.noisy:
            there = affine(plan, reference, k)
            turn, shift = slope - there[0], offset - there[1]
            total += ((turn * mean + shift) ** 2 + turn**2 * var) / (2 * std**2)
        mean, var = slope * mean + offset, slope**2 * var + std**2
    return mean, var, total


def test_the_gradient_of_the_divergence():
    """Against the closed form; 2.6e4 draws of a gradient whose noise is that of the divergence alone. Without kl_to_go
    the share of later steps is missing."""
    plan, reference = Plan(5, Ancestral(1.0)), exact(5)
    flow = Flow(Table(reference.net.a - 0.3, reference.net.b + 0.8), SPEC)
    want = jax.grad(lambda net: chain(plan, net, reference.net)[2] / plan.noisy)(flow.net).b
    agent = FlowGRPO(plan=plan, advantage=PLAIN, kl=1.0, kl_to_go=True)
    errors = []
    for togo in (True, False):
        found = gradient(replace(agent, kl_to_go=togo), flow, flat, 64, 400, reference=reference)[0].b
        errors.append(float(jnp.abs(found - want).max() / jnp.abs(want).max()))
    assert errors[0] < 0.01 and errors[1] > 0.05, errors


def trained(agent, flow, reward, iterations, prompts=16, group=64, seed=0):
    """The flow after some iterations from itself as the reference."""

    @jax.jit
    def all_of_them(state):
        body = lambda state, key: (iteration(agent, state, reward, prompts, group, key)[0], None)
        return jax.lax.scan(body, state, jr.split(jr.key(seed), iterations))[0]

    return all_of_them(state_of(agent, flow)).flow


@pytest.mark.slow
def test_training_ends_at_the_tilt():
    """From N(0, 1) with r = -(x - 1)^2 / 2 and temperature 1 the tilt of the ends N(0, .648) of ten steps is
    N(.393, .393). Noise of fixed size cannot shrink the variance as the tilt does: the best chain has .426. A step that
    does not pay for later steps ends at N(.346, .440), and without an anchor at the best sample.

    The three are solutions of a quadratic problem; training comes within .02 of them."""
    plan, flow = Plan(10, Ancestral(1.0)), exact(10)
    agent = FlowGRPO(plan=plan, advantage=PLAIN, minibatches=1, optim=Optim(0.05, decay_steps=400), kl=1.0)
    _, var, _ = chain(plan, flow.net)
    tilt = var / (1 + var)
    ends = lambda agent: np.asarray(chain(plan, trained(agent, flow, gentle, 400).net)[:2])
    np.testing.assert_allclose(ends(replace(agent, kl_to_go=True)), [tilt, 0.4255], atol=0.02)
    np.testing.assert_allclose(ends(agent), [0.3464, 0.4399], atol=0.02)
    mean, var = ends(replace(agent, kl=0.0))
    assert mean > 0.9 and var < 0.1


@pytest.mark.parametrize("name", ["mix-grpo-flash", "temp-flow-grpo", "flow-dppo", "ddrl", "flow-grpo-one"])
def test_every_method_climbs(name):
    """r = sum x: the ends of the ODE move by a quarter of a deviation or more in 30 iterations."""
    agent = replace(presets()[name].agent, optim=Optim(0.03))
    flow = exact(agent.plan.steps, 0.0, 0.5)
    new = trained(agent, flow, slope, 30, prompts=4, group=16)
    ode = lambda flow: jnp.mean(jax.vmap(lambda x: flow.sample(x, jnp.zeros(1), steps=agent.plan.steps))(x0))
    x0 = jnp.linspace(-1.0, 1.0, 5)[:, None]
    assert float(ode(new) - ode(flow)) > 0.125


# DDRL


def test_the_exponential_utility_reaches_the_tilt_and_the_plain_one_does_not():
    """Gradient ascent of E_p[utility] - KL(p_data | p) over 61 masses: total variations of 2e-7 with the shift Z, .06
    with the mean reward in its place, as in a group, and .19 for the plain reward."""
    x = jnp.linspace(-2.0, 2.0, 61)
    data = jax.nn.softmax(-0.5 * x**2)
    z = 0.8 * x
    tilt = jax.nn.softmax(jnp.log(data) + z)
    shifted = z - jnp.log(jnp.sum(data * jnp.exp(z)))

    def distance(utility):
        def value(logits):
            log_p = jax.nn.log_softmax(logits)
            return jnp.exp(log_p) @ utility + data @ log_p

        def ascend(_, logits):
            return logits + 0.2 * jax.grad(value)(logits) / data

        p = jax.nn.softmax(jax.lax.fori_loop(0, 3000, ascend, jnp.log(data)))
        return float(0.5 * jnp.abs(p - tilt).sum())

    assert distance(exponential(shifted)) < 1e-3
    assert 0.03 < distance(exponential(z - tilt @ z)) < 0.1
    assert distance(shifted) > 0.15
