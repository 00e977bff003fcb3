"""Compositions of Gaussians against closed forms, and one parent with all the weight."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from contraflow.core.types import EnvSpec, UserError
from contraflow.flow.model import Ddim, Flow, FlowSpec
from contraflow.flow.path import VP
from contraflow.flow.support import Real
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.artifact import load_policy, save_policy
from contraflow.policy.base import Cost
from contraflow.policy.composed import composed
from contraflow.policy.flow import FlowPolicy
from contraflow.policy.guided import guided
from contraflow.policy.normalise import Normalised, RunningMoments
from contraflow.policy.uniform import uniform_policy

OBS = jnp.array([0.5, -1.0, 2.0])


class Gaussian(eqx.Module):
    """The velocity of data N(mean, std^2)."""

    mean: jnp.ndarray
    std: jnp.ndarray
    dim: int = eqx.field(static=True, default=2)

    def __call__(self, x, t, cond):
        t = t / 5.0  # the clock of the flow
        var = t**2 * self.std**2 + (1 - t) ** 2
        return self.mean + (t * self.std**2 - (1 - t)) / var * (x - t * self.mean)


def gaussian(mean, std, steps=200):
    spec = FlowSpec(solver=Ddim(steps), support=Real())
    return FlowPolicy(Flow(Gaussian(jnp.asarray(mean), jnp.asarray(std)), spec))


def draws(policy, n=4000):
    return np.asarray(jax.jit(jax.vmap(lambda k: policy(OBS, k)))(jr.split(jr.key(1), n)))


def moments(weights, gaussians, rest=0.0, steps=20_000):
    """Mean and deviation at the end of dx = sum w_i v_i + rest v_0, an affine flow in one dimension, by small steps."""
    mean, std = 0.0, 1.0
    for k in range(steps):
        t = k / steps
        slope, shift = rest * (2 * t - 1) / (t**2 + (1 - t) ** 2), 0.0
        for w, (m, s) in zip(weights, gaussians, strict=True):
            a = (t * s**2 - (1 - t)) / (t**2 * s**2 + (1 - t) ** 2)
            slope, shift = slope + w * a, shift + w * (m - a * t * m)
        mean, std = mean + (slope * mean + shift) / steps, std * (1 + slope / steps)
    return mean, std


def test_a_convex_sum_of_equal_spreads_has_the_mean_of_means():
    x = draws(composed((gaussian(-1.0, 0.5), gaussian(2.0, 0.5)), (0.3, 0.7)))
    np.testing.assert_allclose(x.mean(0), 1.1, atol=0.03)
    np.testing.assert_allclose(x.std(0), 0.5, rtol=0.04)


@pytest.mark.parametrize(("rule", "weights"), [("convex", (0.3, 0.7)), ("and", (1.0, 1.0))])
def test_what_a_sum_of_fields_is_and_is_not(rule, weights):
    """It is the end of a linear equation; it is not the product of powers of the densities."""
    parents = ((-1.0, 0.5), (2.0, 0.8))
    x = draws(composed(tuple(gaussian(*p) for p in parents), weights, rule))
    mean, std = moments(weights, parents, 1.0 - sum(weights))
    np.testing.assert_allclose(x.mean(0), mean, atol=0.04)
    np.testing.assert_allclose(x.std(0), std, rtol=0.05)
    precisions = [w / s**2 for w, (_, s) in zip(weights, parents, strict=True)]
    total = sum(precisions) + 1.0 - sum(weights)
    product = sum(p * m for p, (m, _) in zip(precisions, parents, strict=True)) / total
    assert abs(mean - product) > 0.05


def test_either_of_two_is_their_mixture():
    """The share of each, and its mean and spread."""
    x = draws(composed((gaussian(-1.0, 0.3), gaussian(1.5, 0.2)), (0.3, 0.7), "or"))
    left = x[:, 0] < 0.5
    assert (left == (x[:, 1] < 0.5)).all()
    np.testing.assert_allclose(left.mean(), 0.3, atol=0.03)
    for side, (mean, std) in ((left, (-1.0, 0.3)), (~left, (1.5, 0.2))):
        np.testing.assert_allclose(x[side].mean(0), mean, atol=0.03)
        np.testing.assert_allclose(x[side].std(0), std, rtol=0.08)


def test_a_wide_and_a_narrow_one_around_the_same_point():
    """Here the densities differ by their spread alone, which only the divergence of the fields knows."""
    x = draws(composed((gaussian(0.0, 1.0), gaussian(0.0, 0.2)), (0.5, 0.5), "or"))
    radius = np.linalg.norm(x, axis=1)
    for r in (0.2, 0.5, 1.0):
        share = np.mean([1 - np.exp(-(r**2) / (2 * std**2)) for std in (1.0, 0.2)])
        np.testing.assert_allclose((radius < r).mean(), share, atol=0.03)


@pytest.mark.parametrize("rule", ["convex", "or", "and"])
def test_all_the_weight_is_the_parent(rule, tmp_path):
    """From the same noise, with its own normalisation; and it is saved as any policy."""
    flows = [FlowSpec(solver=Ddim(4), network=ResidualMLP(8, 1, 4)).init(jr.key(i), 2, 3) for i in range(2)]
    stats = [RunningMoments(jnp.full(3, i), jnp.ones(3), jnp.asarray(9.0)) for i in (1.0, 2.0)]
    parents = tuple(Normalised(s, FlowPolicy(f)) for s, f in zip(stats, flows, strict=True))
    for weights, parent in (((1.0, 0.0), parents[0]), ((0.0, 1.0), parents[1])):
        policy = composed(parents, weights, rule)
        np.testing.assert_allclose(draws(policy, 8), draws(parent, 8), rtol=0, atol=1e-6)
    save_policy(tmp_path, policy, EnvSpec(3, 2, 1, None, False), "probe:action")
    np.testing.assert_array_equal(draws(policy, 8), draws(load_policy(tmp_path)[0], 8))
    assert policy.cost == Cost(1, 8, 0)


def test_bad_use():
    one, other = gaussian(0.0, 1.0), gaussian(1.0, 1.0)
    for weights in ((1.0,), (1.5, -0.5)):
        with pytest.raises(UserError, match="one weight"):
            composed((one, other), weights)
    with pytest.raises(UserError, match="add up to 1"):
        composed((one, other), (0.5, 0.6))
    with pytest.raises(UserError, match="flow policies"):
        composed((one, uniform_policy(2)), (0.5, 0.5))
    with pytest.raises(UserError, match="flow policies"):
        composed((one, FlowPolicy(Flow(Gaussian(jnp.zeros(()), jnp.ones(())), FlowSpec(path=VP())))), (0.5, 0.5))
    with pytest.raises(UserError, match="same size"):
        composed((one, FlowPolicy(FlowSpec().init(jr.key(0), 3, 3))), (0.5, 0.5))
    with pytest.raises(UserError, match="lose the guidance"):
        composed((one, guided(other, 1.0, lambda a, obs: a.sum())), (0.5, 0.5))
