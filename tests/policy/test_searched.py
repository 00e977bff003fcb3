"""A search for the start noise of a Gaussian flow, whose map from noise is affine."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.flow.tilts import affine

from contraflow.core.types import EnvSpec, UserError
from contraflow.flow.model import Ddim, Ddpm, Flow, FlowSpec
from contraflow.flow.solver import RK4
from contraflow.flow.support import Real
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.artifact import load_policy, save_policy
from contraflow.policy.flow import FlowPolicy
from contraflow.policy.normalise import Normalised, RunningMoments
from contraflow.policy.searched import invert, search, searched
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


def net_policy():
    return FlowPolicy(FlowSpec(solver=Ddim(3), network=ResidualMLP(8, 1, 4)).init(jr.key(0), 2, 1))


STATS = RunningMoments(jnp.ones(1), jnp.full(1, 4.0), jnp.asarray(10.0))


def test_without_iterations_it_is_the_policy():
    for policy in (net_policy(), Normalised(STATS, net_policy())):
        act = jax.jit(jax.vmap(lambda p, k: p(OBS, k), (None, 0)))
        plain = act(policy, jr.split(jr.key(1), 16))
        np.testing.assert_array_equal(plain, act(searched(policy, line, 1.0, 0), jr.split(jr.key(1), 16)))


def test_it_is_saved_as_any_policy(tmp_path):
    from contraflow.envs.align.mixture import pair

    flow = FlowPolicy(FlowSpec(solver=Ddim(3), network=ResidualMLP(8, 1, 4)).init(jr.key(0), 2, 2))
    policy, obs = searched(flow, pair, 0.5, 2), jnp.ones(2)
    save_policy(tmp_path, policy, EnvSpec(2, 2, 1, None, True), "align:mixture2d")
    loaded = load_policy(tmp_path, trust="contraflow")[0]
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


def test_what_cannot_be_searched_is_refused():
    for spec in (FlowSpec(averaged=True), FlowSpec(clip=1.0), FlowSpec(unit_input=True), FlowSpec(solver=Ddpm(5))):
        with pytest.raises(UserError, match="linear path"):
            searched(FlowPolicy(Flow(Gaussian(), spec)), line, 1.0)
    with pytest.raises(UserError, match="a policy that is a flow"):
        searched(uniform_policy(2), line, 1.0)
    with pytest.raises(ValueError, match="positive rate"):
        searched(FLOW, line, 0.0)
