"""Policies as objects: what wraps them, what they cost, what is left of them without a part."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import special, stats

from contraflow.flow.model import Ddim, FlowSpec
from contraflow.flow.path import Linear
from contraflow.flow.solver import EulerMaruyama
from contraflow.nets.critic import QEnsemble
from contraflow.nets.mlp import MLP
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.base import Cost, Noisy, Policy, ablations, act_batch, inner, innermost
from contraflow.policy.best_of import ONE, UNIFORM, Argmax, BestOf, First, Softmax, pick
from contraflow.policy.flow import FlowPolicy
from contraflow.policy.gaussian import ClippedGaussian, Deterministic, SquashedGaussian
from contraflow.policy.normalise import Normalised, RunningMoments, normalised
from contraflow.policy.uniform import BetaActions, still_policy, uniform_policy

OBS = jnp.array([0.5, -1.0, 2.0])
STATS = RunningMoments(jnp.array([1.0, 0.0, 2.0]), jnp.array([4.0, 1.0, 0.25]), jnp.asarray(10.0))


class Leaning(eqx.Module):
    """Acts as the first two numbers it observes; exploring it acts the other way."""

    sign: jax.Array

    def __call__(self, obs, key, greedy=True):
        return self.sign * obs[:2] * (1.0 if greedy else -1.0)

    def sample(self, obs, key):
        return self(obs, key, False), obs

    @property
    def cost(self):
        return Cost(1, 7, 0)


LEANING = Leaning(jnp.ones(()))


class Sum(QEnsemble):
    """Q = sum a."""

    def outputs(self, obs, action):
        return jnp.sum(action) * jnp.ones((self.num, 1))


@pytest.fixture(scope="module")
def flow():
    return FlowSpec(solver=Ddim(3), network=ResidualMLP(8, 1, 4)).init(jr.key(0), 2, 3)


@pytest.fixture(scope="module")
def critic():
    return Sum(1, 3, 2, 1, 1, key=jr.key(1))


def test_observations_are_normalised_within_bounds():
    policy = normalised(STATS, LEANING)
    np.testing.assert_allclose(policy(OBS, jr.key(0)), [-0.25, -1.0], rtol=1e-5)
    np.testing.assert_allclose(policy.sample(OBS, jr.key(0))[1], [-0.25, -1.0, 0.0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(policy(jnp.array([1e6, -1e6, 0.0]), jr.key(0)), [10, -10], rtol=1e-6)
    assert normalised(None, LEANING) is LEANING
    start = RunningMoments.start(3)
    np.testing.assert_allclose(start(OBS), OBS, rtol=1e-6)


def test_noise_is_added_while_exploring_only():
    policy = Noisy(LEANING, jnp.asarray(0.5), 0.2)
    obs = jnp.array([0.1, 1.5, 0.0])
    np.testing.assert_allclose(policy(obs, jr.key(0)), [0.1, 1.5], rtol=1e-6)
    a = np.asarray(jax.vmap(lambda k: policy(obs, k, False))(jr.split(jr.key(1), 2000)))
    np.testing.assert_allclose(a[:, 0].mean(), -0.1, atol=4 * 0.1 / 2000**0.5)
    np.testing.assert_allclose(a[:, 0].std(), 0.1, rtol=0.06)  # four errors of a deviation
    assert (a[:, 1] == -1).all()
    unscaled = Noisy(LEANING, None, 0.2)
    a = np.asarray(jax.vmap(lambda k: unscaled(obs, k, False))(jr.split(jr.key(1), 2000)))
    np.testing.assert_allclose(a[:, 0].std(), 0.2, rtol=0.06)


def test_what_an_action_costs(flow, critic):
    best = lambda greedy: BestOf(FlowPolicy(flow), critic, jnp.ones(()), Softmax(4), greedy)
    assert best(Argmax(5)).cost == Cost(5, 3, 5)
    assert best(First()).cost == Cost(1, 3, 0) and best(First(6)).cost == Cost(6, 3, 0)
    assert FlowPolicy(flow).cost == Cost(1, 3, 0) and uniform_policy(2).cost == Cost(1, 0, 0)
    wrapped = normalised(STATS, Noisy(best(Argmax(5)), None, 0.1))
    assert wrapped.cost == Cost(5, 3, 5) and isinstance(wrapped, Policy)
    assert inner(wrapped, "flow") is flow and inner(wrapped, "stats") is STATS and inner(wrapped, "none") is None
    assert isinstance(innermost(wrapped), FlowPolicy) and inner(None, "flow") is None


def test_what_is_left_without_a_part(flow, critic):
    """One particle is the flow's own; uniform actions are as many, or 32, and the critic acts alone."""
    best = BestOf(FlowPolicy(flow), critic, jnp.ones(()), Softmax(4), Argmax(16))
    policy = normalised(STATS, Noisy(best, None, 0.1))
    left = ablations(policy)
    assert list(left) == [ONE, UNIFORM] and all(isinstance(p, Normalised) for p in left.values())
    keys = jr.split(jr.key(2), 200)
    acts = jax.jit(lambda p, keys: jax.vmap(lambda k: p(OBS, k))(keys))
    own, one, uniform = (np.asarray(acts(p, jr.clone(keys))).sum(1) for p in (policy, left[ONE], left[UNIFORM]))
    assert own.mean() > one.mean() and left[ONE].cost == Cost(1, 3, 0)
    # The best of 16 by the sum of two uniform numbers on [-1, 1]: P(sum < s) = 1 - (2 - s)^2 / 8 above 0, to the 16th.
    s = np.linspace(0, 2, 2001)
    mean = 2 - np.trapezoid((1 - (2 - s) ** 2 / 8) ** 16, s)
    np.testing.assert_allclose(uniform.mean(), mean, atol=5 * uniform.std() / 200**0.5)
    assert left[UNIFORM].cost == Cost(16, 0, 16)
    one_particle = BestOf(FlowPolicy(flow), critic, jnp.ones(()), First(), First())
    assert ablations(one_particle)[UNIFORM].cost == Cost(32, 0, 32)
    assert ablations(BestOf(uniform_policy(2), critic, jnp.ones(()), First(), Argmax(9))) == {}
    assert ablations(LEANING) == {}


def test_exploring_and_greedy_follow_their_own_rules(flow, critic):
    cold = BestOf(FlowPolicy(flow), critic, jnp.asarray(1e-6), Argmax(8), First())
    both = jax.jit(lambda k: (cold(OBS, k, False), cold(OBS, jr.clone(k)), cold.policy.particles(OBS, *draw(k))))
    draw = lambda key: (jr.split(jr.clone(key))[0], 8)
    explored, greedy, particles = both(jr.key(3))
    np.testing.assert_allclose(explored, particles[jnp.argmax(particles.sum(1))], rtol=1e-5)
    one = FlowPolicy(flow).particles(OBS, jr.split(jr.key(3))[0], 1)[0]
    np.testing.assert_allclose(greedy, one, rtol=1e-5)


def test_particles_are_picked_by_their_value_over_the_temperature(critic):
    actions = jnp.array([[0.0, 0.0], [0.3, 0.1], [-0.2, 0.9]])
    one = lambda key: pick(Softmax(3), key, critic, OBS, actions, jnp.asarray(0.5))
    picks = np.bincount(jax.vmap(one)(jr.split(jr.key(4), 4000)), minlength=3)
    assert stats.chisquare(picks, 4000 * special.softmax(np.asarray(actions, float).sum(1) / 0.5)).pvalue > 1e-3


def test_the_temperature_reaches_a_flow_that_is_told():
    spec = FlowSpec(solver=Ddim(2), network=ResidualMLP(8, 1, 4))
    flow = spec.init(jr.key(0), 2, 3 + 4)
    act = jax.jit(lambda lam: FlowPolicy(flow, lam)(OBS, jr.key(1)))
    assert FlowPolicy(flow, jnp.asarray(0.1)).condition(OBS).shape == (7,)
    assert np.abs(act(jnp.asarray(0.1)) - act(jnp.asarray(5.0))).max() > 1e-4


def test_a_solver_that_adds_noise_has_a_key_of_its_own():
    """Used for the start too, it would add what it started from."""
    still = FlowSpec(solver=EulerMaruyama(1, path=Linear()), network=ResidualMLP(8, 1, 4))
    flow = still.init(jr.key(0), 2, 3)

    def ends(key):
        end = flow.sample(flow.noise(jr.clone(key)), OBS, jr.fold_in(key, 1))
        return end, FlowPolicy(flow)(OBS, jr.clone(key))

    end, action = jax.jit(jax.vmap(ends))(jr.split(jr.key(1), 50))
    np.testing.assert_allclose(action, jnp.clip(end, -1, 1), rtol=1e-5, atol=1e-6)


def test_rows_of_a_batch_are_numbered():
    """The noise of a row depends on its number alone: two batches of two are one of four."""
    policy = BetaActions(jnp.zeros(2), 0.5)
    obs = jnp.ones((4, 3))
    together = act_batch(policy, obs, jr.key(0), 10)
    apart = [act_batch(policy, obs[:2], jr.key(0), first) for first in (10, 12)]
    np.testing.assert_allclose(together, np.concatenate(apart), rtol=1e-6)
    assert len(np.unique(together[:, 0])) == 4


def test_gaussian_policies():
    net = jax.jit(lambda k: MLP(3, 2, 8, 1, key=k))(jr.key(0))
    mean, log_std = np.asarray(net(OBS)), jnp.log(jnp.array([0.3, 2.0]))
    policy = ClippedGaussian(net, log_std)
    action, draw = policy.sample(OBS, jr.key(1))
    want = stats.norm(mean, [0.3, 2.0]).logpdf(np.asarray(draw.action)).sum()
    np.testing.assert_allclose([draw.log_prob, policy.log_prob(OBS, draw.action)], want, rtol=1e-5)
    np.testing.assert_allclose(action, np.clip(draw.action, -1, 1))
    np.testing.assert_allclose(policy(OBS, jr.key(2)), np.clip(mean, -1, 1), rtol=1e-6)
    np.testing.assert_allclose(policy(OBS, jr.key(1), False), action, rtol=1e-6)
    x = np.asarray(jax.vmap(lambda k: policy.sample(OBS, k)[1].action)(jr.split(jr.key(3), 4000)))
    np.testing.assert_allclose(x.std(0), [0.3, 2.0], rtol=0.05)

    still = Deterministic(net, 0.1)
    np.testing.assert_allclose(still(OBS, jr.key(0)), np.tanh(mean), rtol=1e-5)
    explored = np.asarray(jax.vmap(lambda k: still(OBS, k, False))(jr.split(jr.key(4), 2000)))
    inside = np.abs(np.tanh(mean)) < 0.6
    np.testing.assert_allclose(explored.std(0)[inside], 0.1, rtol=0.06)
    assert np.abs(explored).max() <= 1

    wide = eqx.tree_at(
        lambda n: n.last.bias, jax.jit(lambda k: MLP(3, 4, 8, 1, key=k))(jr.key(5)), jnp.array([0, 0, 9.0, -9])
    )
    _, std = SquashedGaussian(wide, (-5.0, 2.0)).moments(jnp.zeros(3))
    np.testing.assert_allclose(std, np.exp([2.0, -5.0]), rtol=1e-5)


def test_uniform_actions_fill_the_box():
    a = np.asarray(uniform_policy(2).particles(OBS, jr.key(0), 4000))
    assert stats.kstest(a[:, 0], stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(a.T)[0, 1]) < 0.07


def test_no_action_is_zero_whatever_is_asked():
    for greedy in (True, False):
        np.testing.assert_array_equal(still_policy(3)(OBS, jr.key(0), greedy), jnp.zeros(3))
    assert np.shape(act_batch(still_policy(3), OBS[None], jr.key(0), 0)) == (1, 3)
