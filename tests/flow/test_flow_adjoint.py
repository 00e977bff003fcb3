"""Adjoint matching against closed forms: linear fields between Gaussians, where every conditional mean is affine."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.closeness import assert_close
from tests.flow.tilts import Tilt, affine

from contraflow.flow import adjoint
from contraflow.flow.path import Linear
from contraflow.flow.solver import Euler

M, S, C, CURVE = 0.3, 0.5, 0.8, 1.0  # those of `Tilt`


def tilted(tau):
    return Tilt(tau=tau).tilted


def velocity(x, t, mean=M, std=S):
    slope, shift = affine(t, mean, std)
    return slope * x + shift


def fixed_point(tau, steps):
    """Tables a_i, b_i of the field a_i x + b_i that adjoint matching leaves as it is, by the functions of the library.

    Backwards: given v of all later steps, v_i(x) solves v = E[target velocity | x_i = x]. All is affine, so that
    expectations are chains without noise and two values determine the solution.
    """
    field_at = lambda table: lambda x, t: (lambda k: table[k, 0] * x + table[k, 1])(jnp.round(t * steps).astype(int))

    @jax.jit
    def target(table, i, x):
        """The target velocity at x_i = x, on the chain without noise."""
        step = adjoint.memoryless(field_at(table), steps)

        def move(y, k):
            new = jnp.where(k == steps - 1, y + velocity(y, k / steps) / steps, step(y, k)[0])
            return jnp.where(k < i, y, new), y

        end, xs = jax.lax.scan(move, x, jnp.arange(steps))
        found = adjoint.lean_adjoint(velocity, jnp.concatenate([xs, end[None]]), tau * CURVE * (end - C))
        return found.velocity[i, 0]

    table = jnp.zeros((steps, 2))
    for i in reversed(range(steps)):
        # F(v) at x = 0 and 1, each affine in the value v of the field there.
        def solved(x, i=i, table=table):
            at = lambda v: target(table.at[i].set(jnp.array([0.0, v])), i, jnp.full(1, x))
            zero, one = at(0.0), at(1.0)
            return zero / (1 - (one - zero))

        b = solved(0.0)
        table = table.at[i].set(jnp.stack([solved(1.0) - b, b]))
    return table, field_at(table)


def ends(table):
    """Mean and std of Euler's ends from N(0, 1)."""
    mean, std = 0.0, 1.0
    for a, b in np.asarray(table, float):
        mean, std = mean + (a * mean + b) / len(table), std * abs(1 + a / len(table))
    return mean, std


def test_the_optimal_field_of_a_gaussian_is_the_tilted_one():
    """v_b - sigma^2 / 2 E[a_t | x_t] with a_t = (s^2 t / D) grad g(x_1), D = t^2 s^2 + (1 - t)^2, is the velocity of
    the tilted Gaussian, so v - v_b = ((1 - t) s^2 / D) tau E[grad Q | x_t]: to rounding."""
    for tau in (1.0, 3.0):
        mean, std = tilted(tau)
        for t in (0.1, 0.5, 0.9):
            t, x = jnp.asarray(t), jnp.array([-1.0, 0.2, 2.0])
            d = t**2 * S**2 + (1 - t) ** 2
            x1 = Linear().x1_from_velocity(velocity(x, t, mean, std), x, t)  # E[x1 | x_t], tilted
            a = S**2 * t / d * tau * CURVE * (x1 - C)
            wanted = velocity(x, t, mean, std)
            assert_close(velocity(x, t) - 0.5 * adjoint.sigma(t) ** 2 * a, wanted, 3e-6, scale=2.0)


@pytest.mark.parametrize("steps", [50, 200])
def test_the_lean_adjoint_of_a_gaussian(steps):
    """a_t = (s^2 t / D(t)) grad g(x_1), up to terms in h."""
    xs = adjoint.rollout(velocity, velocity, jr.normal(jr.key(0), (1,)), steps, jr.key(1))
    found = adjoint.lean_adjoint(velocity, xs, jnp.array([2.0]))
    t = found.t + 1 / steps  # of the adjoint behind the step
    np.testing.assert_allclose(found.adjoint[:, 0], 2 * S**2 * t / (t**2 * S**2 + (1 - t) ** 2), atol=8 / steps)


def test_the_adjoint_is_the_derivative_of_the_steps_of_the_base():
    """d g(x_K) / d x_{i+1} of a chain with given noises, here of a field that is not linear."""
    steps, weight = 6, jr.normal(jr.key(0), (3, 3))
    base = lambda x, t: jnp.tanh(weight @ x + t)
    goal = lambda x: jnp.sum(jnp.sin(x))
    xs = adjoint.rollout(base, base, jr.normal(jr.key(1), (3,)), steps, jr.key(2))
    step = adjoint.memoryless(base, steps)

    def rest(x, i):
        """g(x_K) from x_i on, with the noises of the chain: the distance of its states from their means."""
        for k in range(i, steps):
            mean = lambda x, k=k: x + base(x, k / steps) / steps if k == steps - 1 else step(x, jnp.asarray(k))[0]
            x = mean(x) + (xs[k + 1] - mean(xs[k]))
        return goal(x)

    found = adjoint.lean_adjoint(base, xs, jax.grad(goal)(xs[-1]))
    for i in range(steps):
        assert_close(found.adjoint[i], jax.grad(rest)(xs[i + 1], i + 1), 1e-5)
        assert_close(found.base[i], base(xs[i], i / steps), 1e-6)


SHEET = {  # mean and std of the fixed point of the released scheme, K = 10, 20, 50, 200
    1: (".400 .379", ".398 .412", ".398 .433", ".399 .444"),
    3: (".511 .314", ".507 .346", ".509 .365", ".512 .375"),
    10: (".652 .203", ".641 .242", ".646 .259", ".653 .265"),
}
OURS = {
    1: (".406 .381", ".402 .413", ".401 .433", ".400 .444"),
    3: (".521 .316", ".514 .347", ".513 .366", ".514 .375"),
    10: (".661 .208", ".650 .244", ".652 .259", ".655 .266"),
}


@pytest.mark.parametrize("tau", [1, 3, 10])
def test_the_fixed_point_in_steps(tau):
    """Of the released scheme the numbers that were published with it; of ours those above, by the recursion and by the
    library. From 50 steps on, the means of ours are closer to that of the tilted Gaussian; the rest is Euler's own."""
    number = lambda rows: np.array([[float(x) for x in row.split()] for row in rows[tau]])
    released, ours = (np.array([Tilt(tau=tau).fixed_point(k, r)[:2] for k in (10, 20, 50, 200)]) for r in (True, False))
    np.testing.assert_allclose(released, number(SHEET), atol=6e-4)
    np.testing.assert_allclose(ours, number(OURS), atol=6e-4)
    for row, steps in zip(ours[:2], (10, 20), strict=True):
        table, _ = fixed_point(tau, steps)
        np.testing.assert_allclose(ends(table), row, rtol=2e-4)  # float32
    assert np.all(np.abs(ours - tilted(tau))[2:, 0] < 0.6 * np.abs(released - tilted(tau))[2:, 0])
    np.testing.assert_allclose(ours[-1], tilted(tau), atol=4e-3)


def test_without_a_slope_the_base_is_optimal():
    """tau = 0: v = v_b everywhere, on the chains of any field."""
    other = lambda x, t: -x
    xs = adjoint.rollout(other, velocity, jr.normal(jr.key(0), (1,)), 8, jr.key(1))
    found = adjoint.lean_adjoint(velocity, xs, jnp.zeros(1))
    np.testing.assert_array_equal(found.velocity, found.base)
    np.testing.assert_array_equal(found.error(found.control(velocity)), 0 * found.x)
    assert adjoint.path_kl(found.control(velocity)) == 0 < adjoint.path_kl(found.control(other))


def test_at_the_optimum_nothing_known_at_x_predicts_the_error():
    """u + sigma a has mean 0 given x_i at the fixed point: neither its mean nor its slope on x_i differs from 0 by more
    than four standard errors, of 38 numbers;
    those of the base, and of a field that is tilted by another temperature, do."""
    steps, n, tau = 20, 4000, 3.0
    _, field = fixed_point(tau, steps)

    def z_scores(field):
        @jax.jit
        @jax.vmap
        def errors(x0, key):
            xs = adjoint.rollout(field, velocity, x0, steps, key)
            found = adjoint.lean_adjoint(velocity, xs, tau * CURVE * (xs[-1] - C))
            return found.x[:, 0], found.error(found.control(field))[:, 0]

        x, e = map(np.asarray, errors(jr.normal(jr.key(0), (n, 1)), jr.split(jr.key(1), n)))
        x = (x - x.mean(0)) / x.std(0)
        # The last step is without noise: nothing is left that could be predicted.
        x, e = x[:, :-1], e[:, :-1]
        return np.concatenate([np.sqrt(n) * (z * e).mean(0) / (z * e).std(0) for z in (1 + 0 * x, x)])

    assert np.abs(z_scores(field)).max() < 4
    assert np.abs(z_scores(velocity)).max() > 20
    assert np.abs(z_scores(lambda x, t: velocity(x, t, *tilted(1.0)))).max() > 20


def test_noises_are_drawn_apart_from_the_start():
    """Chains of the same start and another key differ from their first step on, and end without noise."""
    x0 = jnp.ones(2)
    one, other = (adjoint.rollout(velocity, velocity, x0, 5, jr.key(i)) for i in (1, 2))
    assert np.all(one[0] == other[0]) and np.all(one[1:] != other[1:])
    assert_close(one[-1], one[-2] + 0.2 * velocity(one[-2], 0.8), 1e-6)


def test_the_relative_entropy_of_paths_bounds_that_of_the_ends():
    """At the optimum it is KL(tilted || base), up to the steps: 200 of them, 4000 chains."""
    tau, steps = 3.0, 200
    mean, std = tilted(tau)
    fine = lambda x, t: velocity(x, t, mean, std)

    @jax.jit
    @jax.vmap
    def one(x0, key):
        xs = adjoint.rollout(fine, velocity, x0, steps, key)
        return adjoint.path_kl(adjoint.lean_adjoint(velocity, xs, 0 * xs[-1]).control(fine))

    found = one(jr.normal(jr.key(0), (4000, 1)), jr.split(jr.key(1), 4000))
    np.testing.assert_allclose(found.mean(), Tilt(tau=tau).kl, rtol=0.1)
    np.testing.assert_allclose(Tilt(tau=tau).fixed_point(steps)[2], Tilt(tau=tau).kl, rtol=0.02)


def test_the_marginals_of_the_process_are_those_of_the_flow():
    """Its ends, 200 steps, against Euler's ends of the same field."""

    @jax.jit
    @jax.vmap
    def one(x0, key):
        return adjoint.rollout(velocity, velocity, x0, 200, key)[-1]

    x = one(jr.normal(jr.key(0), (8000, 1)), jr.split(jr.key(1), 8000))
    assert abs(float(x.mean()) - M) < 0.025 and abs(float(x.std()) / S - 1) < 0.04
    y = jax.vmap(lambda x: Euler(200)(velocity, x, 0.0, 1.0))(jr.normal(jr.key(2), (8000, 1)))
    assert abs(float(x.mean() - y.mean())) < 0.03
