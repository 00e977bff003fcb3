"""EXPO against order statistics, and the clone that it is without edits and candidates."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.scipy.stats import norm
from tests.agents.agent_helpers import Shift, with_slope

from contraflow.agents.offline.expo import EXPO
from contraflow.core.optim import Optim, gradient_step
from contraflow.core.types import Batch, EnvSpec
from contraflow.flow.model import Ddim, FlowSpec
from contraflow.flow.path import VP
from contraflow.nets.critic import Mean, SubsetMin
from contraflow.nets.mlp import MLPSpec
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.base import Cost, inner
from contraflow.policy.flow import FlowPolicy
from contraflow.rl.cloning import cloning_loss
from contraflow.rl.critics import Critics
from contraflow.rl.edits import Edits

SMALL = EXPO(
    flow=FlowSpec(solver=Ddim(2), clock=1.0, network=ResidualMLP(8, 1, 4)),
    edit=Edits(0.1, net=MLPSpec(8, 1)),
    critic=Critics(reduce=Mean(), backup=SubsetMin(2), width=8, depth=1, tau=0.1, optim=Optim(1e-3)),
    optim=Optim(1e-2),
)
EDITLESS = replace(SMALL, edit=None)


def start(agent, dim=2, seed=0):
    return jax.jit(lambda k: agent.init(k, EnvSpec(1, dim, 1, None, False)))(jr.key(seed))


def batch(key, n=32, dim=2):
    k_action, k_reward, k_next = jr.split(key, 3)
    action, mask = 0.3 * jr.normal(k_action, (n, dim)), jnp.ones((n, dim)).at[: n // 2, -1].set(0.0)
    next_obs = jr.normal(k_next, (n, 1))
    return Batch(jnp.zeros((n, 1)), action, jr.normal(k_reward, (n,)), jnp.full(n, 0.9), next_obs, mask)


def shifted(state, m, s):
    """The state with a base whose actions are m + s z."""
    flow = eqx.tree_at(lambda f: f.net, state.flow, Shift(1, m, s))
    return replace(state, flow=flow, average=flow)


def pushing(state, by):
    """The state with edits that are scale tanh(by), whatever they see."""
    net = jax.tree.map(jnp.zeros_like, state.edit.edit.net)
    half = net.last.bias.shape[0] // 2
    bias = jnp.concatenate([jnp.full(half, by), jnp.full(half, -10.0)])  # mean, and the lowest deviation
    net = eqx.tree_at(lambda n: n.last.bias, net, bias)
    return replace(state, edit=eqx.tree_at(lambda e: e.edit.net, state.edit, net))


@pytest.mark.parametrize(("n", "expected"), [(8, 1.4236), (32, 2.0697)])
def test_the_best_of_n_actions_by_order_statistics(n, expected):
    """Q(a) = a and a base N(m, s^2): the mean is m + s E[max of n normals], and KL to the base log n - (n - 1) / n."""
    m, s = -0.2, 0.15
    agent = replace(EDITLESS, candidates=n)
    state = with_slope(shifted(start(agent, 1), m, s), jnp.ones(1))
    policy = agent.policy(state)
    a = jax.jit(jax.vmap(lambda k: policy(jnp.zeros(1), k)))(jr.split(jr.key(1), 20_000))[:, 0]
    z = (a - m) / s
    np.testing.assert_allclose(z.mean(), expected, atol=0.02)  # its standard error is .005
    # The selected density is n F^(n-1) times that of the base; the mean of (n - 1) log F has the error 1 / 140.
    kl = np.log(n) + (n - 1) * norm.logcdf(z).mean()
    np.testing.assert_allclose(kl, np.log(n) - (n - 1) / n, atol=0.03)


def test_edits_that_push_uphill_add_their_scale():
    """m + s E[max of 8] + beta: each of the eight has its edit beside it; downhill edits change nothing."""
    m, s = -0.2, 0.15
    state = with_slope(shifted(start(SMALL, 1), m, s), jnp.ones(1))
    for by, more in ((10.0, 0.1), (-10.0, 0.0)):
        policy = SMALL.policy(pushing(state, by))
        a = jax.jit(jax.vmap(lambda k, p=policy: p(jnp.zeros(1), k)))(jr.split(jr.key(1), 20_000))[:, 0]
        np.testing.assert_allclose(a.mean(), m + 1.4236 * s + more, atol=0.02 * s)


def test_without_edits_and_candidates_it_is_a_clone_with_a_critic():
    """N = 1: acts as the averaged flow, learns as cloning does, and backs up that flow's actions; and the critic's
    choice needs no critic."""
    agent = replace(EDITLESS, candidates=1, ema=0.5)
    state, rows = start(agent), batch(jr.key(1))
    policy = agent.policy(state)
    assert policy.cost == Cost(1, 2, 0)
    k_draw = jr.split(jr.key(5))[0]
    np.testing.assert_allclose(
        policy(jnp.ones(1), jr.key(5)), FlowPolicy(state.average).particles(jnp.ones(1), k_draw, 1)[0], atol=1e-6
    )
    new, metrics = jax.jit(agent.update)(state, rows, jr.key(2))
    k_next, _, k_flow, _ = jr.split(jr.key(2), 4)
    loss = lambda flow: cloning_loss(flow, rows, k_flow)
    flow, *_ = jax.jit(lambda s: gradient_step(agent.optim.tx, loss, s.flow, s.flow_opt))(state)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, atol=1e-5), new.flow, flow)
    assert not np.array_equal(new.flow.net.last.weight, state.flow.net.last.weight)
    for got, a, b in zip(*map(jax.tree.leaves, (new.average, state.average, flow)), strict=True):
        np.testing.assert_allclose(got, 0.5 * (a + b), atol=1e-5)

    @jax.jit
    def value(state):
        action = jax.vmap(policy)(rows.next_obs, jr.split(k_next, 32))
        return jnp.mean(rows.reward + 0.9 * jax.vmap(state.target)(rows.next_obs, action).min(1))

    np.testing.assert_allclose(metrics["q"], value(state), rtol=1e-3)


def test_the_best_by_the_target_is_what_is_backed_up():
    """a' is the candidate, edited or not, of the largest mean of the target critics, in acting and in backups alike."""
    state = start(SMALL)
    state = pushing(replace(state, target=with_slope(state, jnp.array([1.0, -2.0])).target), 0.5)
    rows = batch(jr.key(1))
    policy = SMALL.policy(state)

    @jax.jit
    @jax.vmap
    def by_hand(obs, key):
        """(action, its value)."""
        k_draw, _ = jr.split(key)
        k_own, _ = jr.split(k_draw)
        own = FlowPolicy(state.average).particles(obs, k_own, 8)
        every = jnp.concatenate([own, jnp.clip(own + 0.1 * jnp.tanh(0.5), -1, 1)])
        q = every @ jnp.array([1.0, -2.0])
        return every[jnp.argmax(q)], q.max()

    keys = jr.split(jr.split(jr.key(2), 4)[0], 32)
    action, value = by_hand(rows.next_obs, keys)
    with jax.debug_key_reuse(False):
        np.testing.assert_allclose(jax.vmap(policy)(rows.next_obs, keys), action, atol=5e-3)  # the edit has a std
    _, metrics = jax.jit(SMALL.update)(state, rows, jr.key(2))
    np.testing.assert_allclose(metrics["q"], jnp.mean(rows.reward + 0.9 * value), atol=0.02)


def test_no_gradient_of_the_critic_reaches_the_base():
    """Other rewards and critics leave the flow as it is to a bit, and change the edit."""
    state, rows = start(SMALL), batch(jr.key(1))
    steep = with_slope(state, 100 * jnp.ones(2))
    one, _ = jax.jit(SMALL.update)(state, rows, jr.key(2))
    other, _ = jax.jit(SMALL.update)(steep, replace(rows, reward=5 * rows.reward), jr.key(2))
    jax.tree.map(np.testing.assert_array_equal, (one.flow, one.average), (other.flow, other.average))
    differ = [not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (one.edit, other.edit)), strict=True)]
    assert any(differ)


def test_edits_learn_at_the_actions_of_the_batch():
    """Not at those of the base: another base, the same edit after an update."""
    state, rows = start(SMALL), batch(jr.key(1))
    update = jax.jit(SMALL.update)
    one, metrics = update(state, rows, jr.key(2))
    # The target's part in the critic differs; where every episode ends it has none.
    ended = replace(rows, discount=jnp.zeros(32))
    one, _ = update(state, ended, jr.key(2))
    other, _ = update(replace(state, average=start(SMALL, seed=5).flow), ended, jr.key(2))
    jax.tree.map(np.testing.assert_array_equal, one.edit, other.edit)
    assert {"entropy", "temperature", "edit_loss"} <= set(metrics)
    moved, _ = update(state, replace(ended, action=-ended.action), jr.key(2))
    assert not np.array_equal(moved.edit.edit.net.last.weight, one.edit.edit.net.last.weight)


def test_base_and_edit_may_move_less_often():
    """`delay` updates of the critics for one of them."""
    agent = replace(SMALL, delay=3)
    update, state = jax.jit(agent.update), start(agent)
    moved = []
    for i in range(6):
        new, _ = update(state, batch(jr.key(i)), jr.key(10 + i))
        parts = [
            (new.flow, state.flow),
            (new.average, state.average),
            (new.edit, state.edit),
            (new.critic, state.critic),
        ]
        moved.append(
            [any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, p), strict=True)) for p in parts]
        )
        state = new
    assert [m[:3] for m in moved] == [[i % 3 == 2] * 3 for i in range(6)]
    assert all(m[3] for m in moved)


def test_a_pretrained_policy_is_the_base():
    """A diffusion policy too; what is found of the policy is the flow that acts."""
    from contraflow.agents.offline.bc import BC

    spec = FlowSpec(path=VP(), predict="noise", clip=1.0, solver=Ddim(3), network=ResidualMLP(8, 1, 4))
    policy = BC(spec).policy(jax.jit(lambda k: BC(spec).init(k, EnvSpec(1, 2, 1, None, False)))(jr.key(3)))
    agent = SMALL.starting_from(policy)
    state = agent.adopt(start(agent), policy)
    for net in (state.flow, state.average, inner(agent.policy(state), "flow")):
        jax.tree.map(np.testing.assert_array_equal, net, policy.policy.flow)
    assert agent.flow == spec and agent.normalise_obs == "frozen"
    assert agent.policy(state).policy.cost == Cost(16, 2, 16)  # 8 x 3 of the flow and 8 of the edit
    new, metrics = jax.jit(agent.update)(state, batch(jr.key(1)), jr.key(2))
    assert np.isfinite(metrics["matching_loss"]) and int(new.step) == 1
