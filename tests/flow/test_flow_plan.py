"""Plans of noise: between Gaussians every step is affine, so means and variances follow without sampling."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from contraflow.flow.path import Linear
from contraflow.flow.plan import CPS, Ancestral, FlowSDE, Plan, generate, multistep
from contraflow.flow.targets import Gaussian


def exact(mean=1.0, std=0.5):
    """The field from N(0, 1) to N(mean, std^2)."""
    target = Gaussian(jnp.array([mean]), std)
    return lambda x, t: Linear().velocity(target.posterior_mean(Linear(), x, t), x, t)


def moments(plan, field):
    """Mean and standard deviation of the ends with noise at every step that has a density."""
    k = jnp.arange(plan.steps)
    at = lambda x: jax.vmap(lambda k: plan.step(field, jnp.full(1, x), k))(k)
    euler = lambda x: jax.vmap(lambda k: x + plan.h * field(jnp.full(1, x), k * plan.h)[0])(k)
    noisy = np.arange(plan.steps) < plan.noisy
    zero, one = (np.where(noisy, at(x)[0][:, 0], euler(x)) for x in (0.0, 1.0))
    std = np.where(noisy, at(0.0)[1], 0.0)
    mean, var = 0.0, 1.0
    for slope, shift, s in zip(one - zero, zero, std, strict=True):
        mean, var = slope * mean + shift, slope**2 * var + s**2
    return mean, np.sqrt(var)


@pytest.mark.parametrize("noise", [FlowSDE(0.3), FlowSDE(0.7), FlowSDE(2**0.5), Ancestral(0.5), Ancestral(1.0)])
def test_ends_have_the_distribution_of_the_ode(noise):
    """First order in h: at most 3 % at 200 steps, and less at 400, down to rounding and what the guard leaves."""
    errors = []
    for steps in (200, 400):
        mean, std = moments(Plan(steps, noise), exact())
        errors.append(abs(mean - 1.0) + abs(std / 0.5 - 1.0))
    assert errors[0] < 0.03 and errors[1] < max(0.7 * errors[0], 0.003)


def test_a_small_a_is_the_ode():
    """At a = 1e-3 the chain of means is Euler's, to the square of a."""
    plan, field = Plan(20, FlowSDE(1e-3)), exact()
    x = jnp.array([0.3])
    for k in range(20):
        t = jnp.asarray(k / 20)
        mean, std = plan.step(field, x, jnp.asarray(k))
        np.testing.assert_allclose(mean, x + field(x, t) / 20, rtol=1e-5, atol=1e-5)
        assert float(std) < 2e-3
        x = mean


def test_the_guard_of_the_first_step_inflates_it():
    """Var = (1 - a^2 / 2)^2 + a^2 = 1 + a^4 / 4 after the first step where v = x1 - x0 has the mean -x at t = 0."""
    for a in (0.7, 2**0.5):
        mean, std = Plan(10, FlowSDE(a)).step(lambda x, t: 0.0 * x, jnp.ones(1), jnp.asarray(0))
        assert np.isclose(float(mean[0]) ** 2 + float(std) ** 2, 1 + a**4 / 4, rtol=1e-5)


def test_coefficient_preserving_steps_shrink():
    """N(1.3, .4^2): deviations of .231, .277 and .307 in 4, 10 and 40 steps at eta = .8, where .4 is right; a point
    is exact."""
    found = [moments(Plan(steps, CPS(0.8)), exact(1.3, 0.4))[1] for steps in (4, 10, 40)]
    np.testing.assert_allclose(found, [0.231, 0.277, 0.307], atol=6e-4)  # the last digit of the sheet
    assert moments(Plan(10, CPS(0.8)), exact(1.3, 1e-3))[1] < 2e-3


def test_trees_share_their_prefix():
    plan = Plan(6, FlowSDE(0.7), window=2, branches=(2, 3), place="random")
    ends, steps = generate(plan, exact(), jr.normal(jr.key(0), (4, 1)), jnp.asarray(1), jr.key(1))
    assert plan.leaves == 6 and ends.shape == (24, 1) and steps.x.shape == (24, 2, 1)
    first = np.asarray(steps.new[:, 0, 0]).reshape(4, 2, 3)
    assert (first == first[:, :, :1]).all() and len(np.unique(first)) == 8  # leaves of a child share its state
    assert len(np.unique(np.asarray(ends))) == 24
    np.testing.assert_array_equal(steps.x[:, 1], steps.new[:, 0])
    np.testing.assert_array_equal(np.asarray(steps.k), [[1, 2]] * 24)


def test_a_tree_of_single_children_is_a_window():
    """Steps have the same densities; the noise differs."""
    x0 = jr.normal(jr.key(0), (5, 1))
    for start in (0, 2):
        one = generate(Plan(5, window=3), exact(), x0, jnp.asarray(start), jr.key(1))[1]
        two = generate(Plan(5, window=3, branches=(1, 1, 1)), exact(), x0, jnp.asarray(start), jr.key(1))[1]
        np.testing.assert_array_equal(one.k, two.k)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            (one.x[:, 0], one.mean[:, 0], one.std), (two.x[:, 0], two.mean[:, 0], two.std),
        )  # fmt: skip


@pytest.mark.parametrize("kind", [FlowSDE, Ancestral, CPS])
def test_a_scale_multiplies_the_level(kind):
    """The mean follows, so that ends keep their distribution; it stops at 1 where the level does."""
    x, v, t = jnp.array([0.3]), jnp.array([-0.8]), jnp.asarray(0.4)
    got = kind(0.4)(x, v, t, 0.1, 1.5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, kind(0.6)(x, v, t, 0.1))
    if kind is not FlowSDE:
        capped = kind(0.4)(x, v, t, 0.1, 9.0)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), capped, kind(1.0)(x, v, t, 0.1))


def test_deeper_children_are_noisier():
    plan = Plan(6, FlowSDE(0.5), window=2, branches=(2, 2), deepen=0.5)
    _, steps = generate(plan, exact(), jnp.zeros((1, 1)), jnp.asarray(2), jr.key(0))
    plain = [float(plan.noise(jnp.zeros(1), jnp.zeros(1), jnp.asarray(k / 6), 1 / 6)[1]) for k in (2, 3)]
    np.testing.assert_allclose(steps.std[0], [1.25 * plain[0], 1.5 * plain[1]], rtol=1e-5)


def test_the_multistep_solver_is_of_second_order():
    field = exact()
    x = jnp.array([[-1.0], [0.2], [1.5]])
    right = 1.0 + 0.5 * (x - 0.0)  # the map of the ODE between Gaussians
    errors = [float(jnp.abs(multistep(field, x, jnp.zeros(()), jnp.asarray(n)) - right).max()) for n in (40, 80)]
    assert np.log2(errors[0] / errors[1]) > 1.6


def test_a_sweeping_window_visits_every_place():
    plan = Plan(6, window=2, place="sweep", every=3)
    found = [int(plan.start(jnp.asarray(i), jr.key(0))) for i in range(18)]
    assert found == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 0, 0, 0]


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Plan(4, window=5),
        lambda: Plan(4, CPS(), window=4),
        lambda: Plan(4, window=2, branches=(2,)),
        lambda: Plan(4, compress=0.0),
        lambda: CPS(1.5),
        lambda: FlowSDE(0.0),
    ],
)
def test_plans_that_do_not_fit_are_refused(bad):
    with pytest.raises(ValueError, match=r"window|branches|compress|eta|must be positive"):
        bad()
