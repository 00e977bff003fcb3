"""Diagnostics of action distributions, values and targets that are known."""

from dataclasses import dataclass, replace
from functools import cache

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from contraflow.agents.online.rfm import RFM, SMALL, PosteriorTarget
from contraflow.core.types import EnvSpec
from contraflow.flow.posterior.control import Fixed
from contraflow.flow.posterior.importance import Reverse
from contraflow.flow.posterior.proposal import Mixture, Noise, UniformAction
from contraflow.nets.critic import QEnsemble
from contraflow.nets.velocity import ResidualMLP
from contraflow.rl.diagnostics import TIMES
from contraflow.rl.temperature import Constant
from contraflow.training.diagnostics import diagnose

SPEC = EnvSpec(3, 2, 1, 100, True)
OBS = jnp.ones((20, 3))  # of which the first 16 are used
PARTS = 256, Mixture((Noise(), UniformAction()), (0.5, 0.5)), Fixed(0.0)
GOOD = Reverse(*PARTS)


class Known(eqx.Module):
    """A policy whose actions are a corner of the box, or uniform."""

    corners: bool = eqx.field(static=True)

    def __call__(self, obs, key, greedy=True):
        assert not greedy and obs.shape == (3,)
        return jnp.ones(2) if self.corners else jr.uniform(key, (2,), minval=-1.0, maxval=1.0)


@dataclass(frozen=True)
class Acting:
    """An agent that always has that policy."""

    corners: bool = False

    def init(self, key, spec):
        return None

    def policy(self, state):
        return Known(self.corners)

    def update(self, state, batch, key):
        return state, {}


def test_the_distribution_of_uniform_actions():
    told = diagnose(Acting(), None, OBS, jr.key(0))
    assert told["diagnostics/action_mean"] == pytest.approx(0.0, abs=0.03)
    assert told["diagnostics/action_std"] == pytest.approx(3**-0.5, abs=0.02)
    assert told["diagnostics/saturated"] == pytest.approx(0.05, abs=0.015)
    # A histogram of n draws in m bins is short of the entropy by (m - 1) / 2n (Miller and Madow).
    assert told["diagnostics/action_entropy"] == pytest.approx(np.log(2) - 31 / 256, abs=0.02)
    shares = [told[f"diagnostics/action_share/{i}"] for i in range(16)]
    np.testing.assert_allclose(shares, 1 / 16, atol=0.02)


def test_the_distribution_of_a_corner():
    told = diagnose(Acting(corners=True), None, OBS, jr.key(0))
    assert told["diagnostics/action_mean"] == told["diagnostics/saturated"] == 1
    assert told["diagnostics/action_std"] == 0
    assert told["diagnostics/action_entropy"] == pytest.approx(-np.log(16), abs=1e-5)  # one bin of width 1/16
    assert [told[f"diagnostics/action_share/{i}"] for i in (0, 14, 15)] == [0, 0, 1]


class Rising(QEnsemble):
    """Q(s, a) = 3 a_0."""

    def outputs(self, obs, action):
        return jnp.stack([3 * action[0]] * 2)[:, None]


@dataclass(frozen=True)
class Shifted(Reverse):
    """The estimator, its mean moved; by as much to either side, each with probability a half, if it is `fair`."""

    by: float = 1.0
    fair: bool = False

    def __call__(self, key, *args, **kwargs):
        post = super().__call__(key, *args, **kwargs)
        sign = jr.rademacher(jr.fold_in(key, 1), (), jnp.float32) if self.fair else 1.0
        return replace(post, mean=post.mean + self.by * sign)


@cache
def told_of(estimator, lam: float) -> dict[str, float]:
    flow = replace(SMALL, network=ResidualMLP(8, 1, 4))
    agent = RFM(flow, PosteriorTarget(estimator), temperature=Constant(lam))
    critic = Rising(2, 3, 2, 8, 1, key=jr.key(2))
    state = eqx.tree_at(lambda s: s.critic, agent.init(jr.key(0), SPEC), critic)
    return diagnose(agent, state, OBS, jr.key(1))


@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_the_bias_of_a_target_is_its_distance_to_the_posterior_mean(bias):
    told = told_of(Shifted(*PARTS, by=bias) if bias else GOOD, 3.0)
    np.testing.assert_allclose([told[f"diagnostics/target_bias/{t}"] for t in TIMES], bias, atol=0.06)


def test_variance_is_no_bias():
    """The mean of 16 signs has a deviation of a quarter."""
    told = told_of(Shifted(*PARTS, fair=True), 3.0)
    np.testing.assert_allclose([told[f"diagnostics/target_bias/{t}"] for t in TIMES], 0.25, atol=0.15)


def test_a_reference_of_few_candidates_says_so():
    warm, cold = told_of(GOOD, 3.0), told_of(GOOD, 3e-5)
    for t in (0.1, 0.3):
        assert warm[f"diagnostics/reference_ess/{t}"] > 1000
        assert cold[f"diagnostics/reference_ess/{t}"] < 50


def test_the_gap_of_values_is_in_units_of_the_temperature():
    """The range of n uniform draws on [-1, 1] is 2 (n - 1) / (n + 1) on average."""
    told = told_of(GOOD, 0.5)
    assert told["diagnostics/q_gap"] == pytest.approx(3 / 0.5 * 2 * 63 / 65, rel=0.02)
    assert told["diagnostics/eta/0.5"] == 0
