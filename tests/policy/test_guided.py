"""Guidance against closed forms: the guided steps of a Gaussian flow by hand, and none at weight 0."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.cli_helpers import cli

from contraflow.agents.offline.dql import DIFFUSION
from contraflow.agents.offline.iql import IQL, Cloned
from contraflow.core.types import EnvSpec, UserError
from contraflow.flow.model import Ddim, Ddpm, Flow, FlowSpec
from contraflow.flow.solver import EulerMaruyama
from contraflow.nets.critic import QEnsemble
from contraflow.nets.mlp import MLPSpec
from contraflow.nets.transformer import ChunkTransformer
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.artifact import load_policy, save_policy
from contraflow.policy.base import Cost
from contraflow.policy.best_of import ONE, Argmax, BestOf, First
from contraflow.policy.flow import FlowPolicy
from contraflow.policy.guided import Guided, guided
from contraflow.policy.normalise import Normalised, RunningMoments
from contraflow.policy.uniform import uniform_policy
from contraflow.policy.value import Judge, own_critic, value_scale
from contraflow.rl.critics import Critics

D, K, MEAN, STD = 2, 8, 0.2, 0.15
SLOPE, GOAL = np.array([0.5, -0.8]), np.array([0.6, -0.3])
OBS = jnp.array([0.5, -1.0, 2.0])
STATS = RunningMoments(jnp.array([1.0, 0.0, 2.0]), jnp.array([4.0, 1.0, 0.25]), jnp.asarray(10.0))


class Plane(QEnsemble):
    """Q = g.a."""

    def outputs(self, obs, action):
        return (action @ jnp.asarray(SLOPE, jnp.float32)) * jnp.ones((self.num, 1))


class Bowl(QEnsemble):
    """Q = -|a - goal|^2 / 2."""

    def outputs(self, obs, action):
        return -0.5 * jnp.sum((action - jnp.asarray(GOAL, jnp.float32)) ** 2) * jnp.ones((self.num, 1))


class Gaussian(eqx.Module):
    """The velocity of data N(MEAN, STD^2)."""

    dim: int = eqx.field(static=True, default=D)

    def __call__(self, x, t, cond):
        return velocity(x, t / 5.0)  # the clock of the flow


def velocity(x, t):
    var = t**2 * STD**2 + (1 - t) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / var * (x - t * MEAN)


def policy_of(critic, n=1):
    flow = Flow(Gaussian(), FlowSpec(solver=Ddim(K)))
    best = BestOf(FlowPolicy(flow), critic(1, 3, D, 1, 1, key=jr.key(0)), jnp.ones(()), First(), Argmax(n))
    return Normalised(STATS, best)


def by_hand(x, weight, slope_at):
    """The guided steps of Euler, and the end in the box."""
    for k in range(K):
        t = k / K
        v = velocity(x, t)
        x = x + (v + weight * slope_at(np.clip(x + (1 - t) * v, -1, 1))) / K
    return np.clip(x, -1, 1)


def test_a_plane_moves_all_actions_by_the_same():
    """A Gaussian flow and Q = g.a: x_K = A x_0 + B + w C g, with C of the affine steps of Euler alone."""
    policy, weight = policy_of(Plane), 0.3
    a = jax.jit(jax.vmap(lambda k: guided(policy, weight)(OBS, k)))(jr.split(jr.key(1), 64))
    plain = jax.jit(jax.vmap(lambda k: policy(OBS, k)))(jr.split(jr.key(1), 64))
    c = 0.0
    for k in range(K):
        t = k / K
        c = c * (1 + (t * STD**2 - (1 - t)) / (t**2 * STD**2 + (1 - t) ** 2) / K) + 1 / K
    assert 0.1 < c < 1 and np.abs(a).max() < 1  # nothing is cut off
    np.testing.assert_allclose(a - plain, np.broadcast_to(weight * c * SLOPE, (64, D)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_the_slope_is_that_at_the_predicted_end_within_the_box(weight):
    """A bowl: each step is pulled by w (goal - clip(x_t + (1 - t) v)); not by the slope at x_t, and not through v."""
    flow = FlowPolicy(Flow(Gaussian(), FlowSpec(solver=Ddim(K))))
    policy = guided(flow, weight, Judge(policy_of(Bowl).policy.critic))
    x0 = np.asarray(jax.vmap(lambda k: jr.normal(k, (D,)))(jr.split(jr.key(1), 256)))
    a = jax.jit(jax.vmap(lambda k: policy(OBS, k)))(jr.split(jr.key(1), 256))
    want = by_hand(x0, weight, lambda end: GOAL - end)
    np.testing.assert_allclose(a, want, atol=1e-5)
    assert np.abs(want - GOAL).mean() < np.abs(by_hand(x0, 0.0, lambda end: GOAL - end) - GOAL).mean()


@pytest.mark.parametrize("network", [ResidualMLP(8, 1, 4), ChunkTransformer(8, 1, 2)], ids=["mlp", "transformer"])
def test_without_weight_it_is_the_policy(network):
    """Bit for bit, behind its wrappers, greedily and exploring, as one action and as candidates."""
    flow = FlowSpec(solver=Ddim(3), network=network).init(jr.key(0), 4, 3, horizon=2)
    best = BestOf(FlowPolicy(flow), QEnsemble(2, 3, 4, 8, 1, key=jr.key(1)), jnp.ones(()), First(), Argmax(5))
    policy = Normalised(STATS, best)
    for greedy in (True, False):
        act = jax.jit(jax.vmap(lambda p, k, greedy=greedy: p(OBS, k, greedy), (None, 0)))
        keys = jr.split(jr.key(2), 16)
        plain = act(policy, keys)
        np.testing.assert_array_equal(plain, act(guided(policy, 0.0), jr.split(jr.key(2), 16)))
        assert np.abs(plain - act(guided(policy, 5.0), jr.split(jr.key(2), 16))).max() > 1e-3
    assert guided(policy, 1.0).cost == Cost(5, 3, 5 + 5 * 3)
    one = guided(policy, 1.0).ablations()[ONE]
    assert isinstance(one, Guided) and one.cost == Cost(1, 3, 3)


def test_the_policy_of_ifql_is_guided():
    """By its own critic, with the best of its guided actions."""
    spec = FlowSpec(solver=Ddim(2), network=ResidualMLP(8, 1, 4))
    agent = IQL(Cloned(spec, 3), value=MLPSpec(8, 1), critic=Critics(width=8, depth=1), normalise_obs="frozen")
    policy = agent.policy(agent.init(jr.key(0), EnvSpec(3, 2, 1, None, False)))
    part = guided(policy, 5.0)
    assert part.value.critic is policy.policy.critic and part.value.stats is policy.stats
    assert np.abs(part(OBS, jr.key(1)) - policy(OBS, jr.key(1))).max() > 1e-4


def test_it_is_saved_as_any_policy(tmp_path):
    flow = FlowSpec(solver=Ddim(3), network=ResidualMLP(8, 1, 4)).init(jr.key(0), 2, 3)
    best = BestOf(FlowPolicy(flow), QEnsemble(2, 3, 2, 8, 1, key=jr.key(1)), jnp.ones(()), First(), Argmax(5))
    policy = guided(Normalised(STATS, best), 2.0)
    save_policy(tmp_path, policy, EnvSpec(3, 2, 1, None, False), "probe:action")
    loaded = load_policy(tmp_path)[0]
    np.testing.assert_array_equal(policy(OBS, jr.key(0)), loaded(OBS, jr.key(0)))


def test_the_scale_of_values_is_that_of_the_policys_actions():
    policy = policy_of(Bowl)
    obs, keys = jr.normal(jr.key(1), (64, 3)), jr.split(jr.key(2), 64)
    actions = jax.vmap(policy)(obs, keys)
    want = jnp.mean(0.5 * jnp.sum((actions - jnp.asarray(GOAL, jnp.float32)[None]) ** 2, -1))
    np.testing.assert_allclose(value_scale(policy, own_critic(policy), obs, jr.key(2)), want, rtol=1e-5)


@pytest.mark.parametrize(
    "spec",
    [
        DIFFUSION,
        FlowSpec(solver=EulerMaruyama(5)),
        FlowSpec(solver=Ddpm(5)),
        FlowSpec(averaged=True),
    ],
    ids=["diffusion", "stochastic", "ancestral", "averaged"],
)
def test_what_cannot_be_guided_is_refused(spec):
    policy = policy_of(Plane)
    policy = eqx.tree_at(lambda p: p.policy.policy.flow, policy, Flow(Gaussian(), spec))
    with pytest.raises(UserError, match="linear path"):
        guided(policy, 1.0)
    with pytest.raises(UserError, match="no critic"):
        guided(FlowPolicy(Flow(Gaussian(), FlowSpec())), 1.0)
    with pytest.raises(UserError, match="is a flow"):
        guided(uniform_policy(2), 1.0)


def test_weights_on_the_command_line(tmp_path):
    """A line for each on the same episodes; at weight 0 the policy's own."""
    flow = FlowSpec(solver=Ddim(2), network=ResidualMLP(8, 1, 4)).init(jr.key(0), 1, 1)
    best = BestOf(FlowPolicy(flow), QEnsemble(2, 1, 1, 8, 1, key=jr.key(1)), jnp.ones(()), First(), First())
    spec = EnvSpec(1, 1, 1, None, True)
    save_policy(tmp_path / "a", best, spec, "probe:obs-action")
    code, out, err = cli("eval", tmp_path / "a", "--episodes", "4", "--guide", "0", "3")
    assert code == 0, err
    own, *_, none, guided_ = out.splitlines()[1:]
    assert "mean |Q|" in out and none == f"0      {own}" and guided_.startswith("3      ") and guided_[7:] != own
    save_policy(tmp_path / "b", replace(best, policy=uniform_policy(1)), spec, "probe:obs-action")
    code, _, err = cli("eval", tmp_path / "b", "--guide", "1")
    assert code == 2 and "is a flow" in err
