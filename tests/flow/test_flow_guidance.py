"""Classifier-free guidance, where both flows are Gaussian and known."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from contraflow.agents.offline.bc import BC
from contraflow.core.optim import Optim
from contraflow.core.types import Batch, EnvSpec
from contraflow.flow.model import Ddim, Flow, FlowSpec
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.flow import FlowPolicy

MEAN, STD = 0.6, 0.5
ALL = (MEAN**2 + STD**2) ** 0.5  # deviation over all conditions c ~ N(0, 1)


class Exact(eqx.Module):
    """The velocity to N(MEAN c, STD^2); without a condition (c = 0) to N(0, ALL^2), the marginal of c ~ N(0, 1)."""

    dim: int = eqx.field(static=True, default=1)

    def __call__(self, x, t, cond):
        t, std = t / 5.0, jnp.where(cond[0] == 0.0, ALL, STD)  # the network sees 5 t
        mean = MEAN * cond[0]
        spread = (t * std) ** 2 + (1 - t) ** 2
        return ((t * std**2 - (1 - t)) * (x - t * mean)) / spread + mean


def ends(weight: float) -> tuple[float, float]:
    """Mean and standard deviation of the guided flow under c = 1, which maps Gaussians linearly."""
    flow = Flow(Exact(), FlowSpec(solver=Ddim(2000), guidance=weight))
    low, high = (float(flow.sample(jnp.full(1, x0), jnp.ones(1))[0]) for x0 in (-1.0, 1.0))
    return (low + high) / 2, (high - low) / 2


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.0, 3.0])
def test_guidance_moves_and_narrows_a_gaussian(weight: float):
    """Each velocity has the slope (log g)' with g^2 = t^2 std^2 + (1 - t)^2, so guidance ends in STD^w ALL^(1 - w)."""
    mean, std = ends(weight)
    assert std == pytest.approx(STD**weight * ALL ** (1 - weight), rel=2e-3)  # of Euler's 2000 steps
    if weight in (0.0, 1.0):
        assert mean == pytest.approx(weight * MEAN, abs=2e-3)
    else:
        assert mean > ends(weight - 1.0)[0] + 0.05  # further from the mean of all data


def test_a_weight_of_one_is_the_flow_itself():
    spec = FlowSpec(network=ResidualMLP(8, 1, 8), solver=Ddim(3))
    flow = spec.init(jr.key(0), 2, 3)
    same = replace(flow, spec=replace(spec, guidance=1.0))
    x0, cond = jr.normal(jr.key(1), (2,)), jr.normal(jr.key(2), (3,))
    assert np.array_equal(same.sample(x0, cond), flow.sample(x0, cond))
    assert str(jax.make_jaxpr(same.sample)(x0, cond)) == str(jax.make_jaxpr(flow.sample)(x0, cond))
    twice = replace(flow, spec=replace(spec, guidance=2.0))
    assert FlowPolicy(twice).cost.nfe == 2 * FlowPolicy(flow).cost.nfe
    assert float(jnp.abs(twice.sample(x0, cond) - flow.sample(x0, cond)).max()) > 1e-4


def test_cloning_with_dropped_conditions_learns_both_flows():
    """Actions are the sign of the condition: with it the mean is +-.6, without it 0."""
    spec = EnvSpec(1, 1, 1, 1, jittable=True)
    flow = FlowSpec(network=ResidualMLP(32, 1, 16), solver=Ddim(5))
    agent = BC(flow, drop_condition=0.3, guidance=1.5, ema=0.9, optim=Optim(3e-3))
    state = jax.jit(agent.init, static_argnums=1)(jr.key(0), spec)

    def body(state, key):
        k_sign, k_update = jr.split(key)
        obs = jr.rademacher(k_sign, (128, 1), jnp.float32)
        zeros, ones = jnp.zeros(128), jnp.ones((128, 1))
        return agent.update(state, Batch(obs, 0.6 * obs, zeros, zeros, obs, ones), k_update)[0], None

    state, _ = jax.jit(lambda state: jax.lax.scan(body, state, jr.split(jr.key(1), 400)))(state)
    average = state.average
    mean = lambda cond: float(jnp.mean(average.particles(jnp.array([cond]), jr.key(2), 256)[1]))
    assert mean(1.0) == pytest.approx(0.6, abs=0.1) and mean(-1.0) == pytest.approx(-0.6, abs=0.1)
    assert abs(mean(0.0)) < 0.15
    policy = agent.policy(state)
    assert average.spec.guidance == 1.0 and policy.policy.flow.spec.guidance == 1.5  # pyright: ignore[reportAttributeAccessIssue]
    assert agent.starting_from(policy).flow.guidance == 1.0


def test_settings_of_guidance_are_checked():
    with pytest.raises(ValueError, match="set drop_condition"):
        BC(guidance=2.0)
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        BC(drop_condition=1.0)
