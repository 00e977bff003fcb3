"""Steering of a Gaussian flow, where tilts, soft values and the map of the ODE are known."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.flow.tilts import Tilt, affine

from contraflow.core.types import EnvSpec, UserError
from contraflow.flow.model import Ddim, Ddpm, Flow, FlowSpec
from contraflow.flow.solver import RK4
from contraflow.flow.support import Real
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.artifact import load_policy, save_policy
from contraflow.policy.flow import FlowPolicy
from contraflow.policy.normalise import Normalised, RunningMoments
from contraflow.policy.steered import Plain, invert, search, searched, steered
from contraflow.policy.uniform import uniform_policy

M, S, GOAL, CURVE = 0.3, 0.5, 0.8, 3.0
OBS = jnp.ones(1)


class Gaussian(eqx.Module):
    """The velocity of data N(M, S^2)."""

    dim: int = eqx.field(static=True, default=1)

    def __call__(self, x, t, cond):
        slope, shift = affine(jnp.minimum(t / 5.0, 1 - 1e-6), M, S)  # the clock of the flow
        return slope * x + shift


FLOW = FlowPolicy(Flow(Gaussian(), FlowSpec(support=Real(), solver=RK4(64))))


def line(x, cond):
    return 0.7 * jnp.sum(x * cond)


def bowl(x, cond):
    return -0.5 * CURVE * jnp.sum((x - GOAL) ** 2)


def soft(x, t, cond):
    """log E[exp(bowl(x_1)) | x_t] for N(M, S^2), up to a constant."""
    d = t**2 * S**2 + (1 - t) ** 2
    mean, var = (t * S**2 * x + (1 - t) ** 2 * M) / d, S**2 * (1 - t) ** 2 / d
    return jnp.sum(-0.5 * CURVE * (mean - GOAL) ** 2 / (1 + CURVE * var) - 0.5 * jnp.log1p(CURVE * var))


def ends(policy):
    """Mean and standard deviation of the ends: the map from noise is affine."""
    x = policy.pushed(OBS)
    zero, one = (float(x.from_noise(OBS, jnp.full(1, z))[0]) for z in (0.0, 1.0))
    return zero, one - zero


def test_the_soft_value_makes_the_exact_tilt():
    """v + (1 - t) / t grad V is the velocity of p exp(r) to rounding, and the ends have its mean and deviation, up to
    what the gain misses below t = .02."""
    policy = steered(FLOW, soft, 1.0, at="state")
    mean, std = Tilt(M, S, GOAL, CURVE).tilted
    field = policy.pushed(OBS).flow
    for t in (0.05, 0.3, 0.7, 0.95):
        slope, shift = affine(t, mean, std)
        for x in (-1.0, 0.4, 2.0):
            found = float(field.velocity(jnp.full(1, x), jnp.asarray(t), OBS)[0])
            assert np.isclose(found, slope * x + shift, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ends(policy), (mean, std), rtol=3e-3)


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_a_linear_reward_at_the_predicted_end_is_exact_between_gaussians(weight):
    """E[x_1 | x_t] is linear in x_t, so grad r(E[x_1 | x_t]) is the gradient of the soft value: mean M + w c S^2."""
    mean, std = ends(steered(FLOW, line, weight))
    np.testing.assert_allclose((mean, std), (M + weight * 0.7 * S**2, S), rtol=3e-3)


def test_the_predicted_end_is_not_the_soft_value_of_a_bowl():
    """It leaves out that x_1 still varies, and pulls too much: too narrow by more than a twentieth, .344 for .378."""
    assert ends(steered(FLOW, bowl, 1.0))[1] < 0.95 * Tilt(M, S, GOAL, CURVE).tilted[1]


def test_the_controller_moves_ends_by_the_sum_of_its_pushes():
    """v - w c moves all ends by -w c int_0^1 S / sqrt(t^2 S^2 + (1 - t)^2) dt, the ODE's derivative from t to 1."""
    t = (np.arange(4000) + 0.5) / 4000
    c = np.mean(S / np.sqrt(t**2 * S**2 + (1 - t) ** 2))
    mean, std = ends(steered(FLOW, lambda x, t, cond: -0.7 * jnp.sum(x), 0.4, at="state", gain="equal"))
    np.testing.assert_allclose((mean, std), (M - 0.4 * 0.7 * c, S), rtol=1e-3)


def net_policy():
    return FlowPolicy(FlowSpec(solver=Ddim(3), network=ResidualMLP(8, 1, 4)).init(jr.key(0), 2, 1))


STATS = RunningMoments(jnp.ones(1), jnp.full(1, 4.0), jnp.asarray(10.0))


def test_without_weight_it_is_the_policy():
    """Bit for bit, with and without normalisation; the function sees the condition before it is normalised."""
    for policy in (net_policy(), Normalised(STATS, net_policy())):
        act = jax.jit(jax.vmap(lambda p, k: p(OBS, k), (None, 0)))
        keys = jr.split(jr.key(1), 16)
        plain = act(policy, keys)
        np.testing.assert_array_equal(plain, act(steered(policy, line, 0.0), jr.split(jr.key(1), 16)))
        assert np.abs(plain - act(steered(policy, line, 3.0), jr.split(jr.key(1), 16))).max() > 1e-2
        np.testing.assert_array_equal(plain, act(searched(policy, line, 1.0, 0), jr.split(jr.key(1), 16)))
    hidden = lambda x, cond: (cond[0] != 1.0) * jnp.sum(x)  # 0 at the condition as it is
    moved = act(steered(Normalised(STATS, net_policy()), hidden, 5.0), jr.split(jr.key(1), 16))
    np.testing.assert_array_equal(plain, moved)


def test_it_is_saved_as_any_policy(tmp_path):
    from contraflow.envs.align.mixture import pair

    spec, obs = EnvSpec(2, 2, 1, None, True), jnp.ones(2)
    flow = FlowPolicy(FlowSpec(solver=Ddim(3), network=ResidualMLP(8, 1, 4)).init(jr.key(0), 2, 2))
    for i, policy in enumerate((steered(flow, pair, 2.0), searched(flow, pair, 0.5, 2))):
        save_policy(tmp_path / str(i), policy, spec, "align:mixture2d")
        loaded = load_policy(tmp_path / str(i), trust="contraflow")[0]
        np.testing.assert_array_equal(policy(obs, jr.key(0)), loaded(obs, jr.key(0)))


def affine_sampler(z):
    return M + S * z


@pytest.mark.parametrize("rate", [0.5, 1.0, 1 / S, 3.0])
def test_the_error_of_an_inversion_shrinks_by_one_minus_rate_s(rate):
    """e_n = (1 - rate S)^n e_0 at the noise, so one step is exact at rate = 1 / S."""
    y, z = jnp.array([0.9]), jnp.array([-1.0])
    right = (0.9 - M) / S
    for n in (1, 4):
        found = float(invert(affine_sampler, y, z, rate, n)[0])
        assert np.isclose(found - right, (1 - rate * S) ** n * (-1.0 - right), rtol=1e-4, atol=1e-5)


def test_an_inversion_diverges_beyond_two_over_s():
    y, z = jnp.array([0.9]), jnp.array([-1.0])
    error = lambda rate: abs(float(affine_sampler(invert(affine_sampler, y, z, rate, 40))[0]) - 0.9)
    assert error(0.9 * 2 / S) < 1e-2 < 10 < error(1.1 * 2 / S)


def test_a_search_climbs_the_reward_at_the_end():
    """On the flow itself: a bowl of curvature k contracts by 1 - rate k S an iteration."""
    rate = 0.25 / (CURVE * S)
    for n in (0, 1, 6):
        policy = searched(FLOW, bowl, rate, n)
        plain, found = FLOW(OBS, jr.key(3)), policy(OBS, jr.key(3))
        np.testing.assert_allclose(found - GOAL, 0.75**n * (plain - GOAL), rtol=3e-3)
        assert policy.cost.nfe == (n + 1) * FLOW.cost.nfe


def test_a_search_leaves_the_sampler_alone():
    """The sampler is called, never differentiated: a step function is climbed as if it were the identity."""
    step = lambda z: jnp.round(z * 100) / 100
    z = search(step, lambda x: 1.0 - x, jnp.zeros(1), 0.5, 20)
    assert abs(float(z[0]) - 1.0) < 0.02


@pytest.mark.parametrize("wrap", [steered, lambda p, f, w: searched(p, f, 1.0)])
def test_what_cannot_be_steered_is_refused(wrap):
    for spec in (FlowSpec(averaged=True), FlowSpec(clip=1.0), FlowSpec(unit_input=True)):
        with pytest.raises(UserError, match="linear path"):
            wrap(FlowPolicy(Flow(Gaussian(), spec)), line, 1.0)
    with pytest.raises(UserError, match="a policy that is a flow"):
        wrap(uniform_policy(2), line, 1.0)


def test_searches_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="Ddim"):
        searched(FlowPolicy(Flow(Gaussian(), FlowSpec(solver=Ddpm(5)))), line, 1.0)
    with pytest.raises(ValueError, match="positive rate"):
        searched(FLOW, Plain(line), 0.0)
