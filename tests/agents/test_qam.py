"""QAM against its closed form, behaviour tilted by exp(tau Q), and what does not touch what."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.compiled import optimised
from tests.flow.tilts import Tilt

from contraflow.agents import presets
from contraflow.agents.offline.qam import QAM, Budget
from contraflow.agents.online.rfm import SMALL as MIDPOINT
from contraflow.core.optim import Optim
from contraflow.core.types import Batch, EnvSpec
from contraflow.flow.model import Ddim, FlowSpec
from contraflow.flow.path import VP
from contraflow.nets.critic import Mean, QEnsemble
from contraflow.nets.mlp import MLPSpec
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.edit import Edited
from contraflow.policy.flow import FlowPolicy
from contraflow.rl.critics import Critics
from contraflow.rl.edits import Edits

D, K = 2, 5
SPEC = EnvSpec(1, D, 1, None, False)
CRITIC = Critics(reduce=Mean(), backup=Mean(0.5), width=8, depth=1, tau=0.1, optim=Optim(1e-3))
SMALL = QAM(
    flow=FlowSpec(solver=Ddim(K), network=ResidualMLP(16, 1, 4)),
    tau=1.0,
    normalise_q=False,
    rate=0.05,
    critic=CRITIC,
    optim=Optim(3e-3),
)
MEAN, STD = jnp.array([-0.2, 0.1]), 0.25  # of the data
GOAL, CURVE = jnp.array([0.3, 0.0]), 16.0  # Q = -CURVE |a - GOAL|^2 / 2: as narrow as the data


def batch(key, n=32, mask=None):
    k_action, k_reward = jr.split(key)
    action = MEAN[None] + STD * jr.normal(k_action, (n, D))
    mask = jnp.ones((n, D)) if mask is None else mask
    return Batch(jnp.zeros((n, 1)), action, jr.normal(k_reward, (n,)), jnp.full(n, 0.9), jnp.zeros((n, 1)), mask)


class Bowl(QEnsemble):
    """Q(s, a) = -size CURVE |a - GOAL|^2 / 2, of all members."""

    size: jax.Array

    def __init__(self, size: float):
        super().__init__(2, 1, D, 1, 1, reduce=Mean(), key=jr.key(0))
        self.size = jnp.asarray(size)

    def outputs(self, obs, action):
        return jnp.full((self.num, 1), -0.5 * self.size * CURVE * jnp.sum((action - GOAL) ** 2))


class Frozen(Critics):
    """Critics that do not learn."""

    def init(self, key, spec):
        return Bowl(1.0), Bowl(1.0), ()

    def learn(self, critic, target, opt, batch, action, key, bonus=0.0):
        return critic, target, opt, {}


FROZEN = Frozen(**vars(CRITIC))


def start(agent, seed=0):
    return jax.jit(lambda k: agent.init(k, SPEC))(jr.key(seed))


def trained(agent, updates, rows=128):
    """(state, metrics of each update)."""

    @optimised
    def run(state):
        def one(state, key):
            return agent.update(state, batch(key, rows), jr.fold_in(key, 1))

        return jax.lax.scan(one, state, jr.split(jr.key(1), updates))

    return run(start(agent))


def draws(agent, state, n=4000):
    return jax.jit(jax.vmap(lambda k: agent.policy(state)(jnp.zeros(1), k)))(jr.split(jr.key(2), n))


def exact(steps, tau=1.0):
    """Of the fixed point with so many steps, which is what training goes to: mean, std and entropy per number."""
    rows = [Tilt(float(m), STD, float(g), CURVE, tau).fixed_point(steps) for m, g in zip(MEAN, GOAL, strict=True)]
    mean, std, kl = np.array(rows).T
    return mean, std, kl.mean()


def test_the_actor_becomes_behaviour_tilted_by_the_value():
    """p_b exp(tau Q) / Z, halfway between data and goal and narrower by sqrt 2, up to what 20 steps add (.016 to the
    mean, .84 of the spread); the base stays what it was, .93 as wide. A small network and 3000 updates: a tenth of the
    shift, of the spread and of the entropy."""
    agent = replace(SMALL, flow=replace(SMALL.flow, solver=Ddim(20)), critic=FROZEN, optim=Optim(3e-3, 3000))
    state, metrics = trained(agent, 3000)
    a = draws(agent, state)
    mean, std, kl = exact(20)
    np.testing.assert_allclose(a.mean(0), mean, atol=0.1 * 0.25)
    np.testing.assert_allclose(a.std(0), std, rtol=0.1)
    np.testing.assert_allclose(metrics["path_kl"][-500:].mean(), kl, rtol=0.1)
    np.testing.assert_allclose(mean, (MEAN + GOAL) / 2, atol=0.1 * 0.25)
    base = draws(agent, replace(state, actor=state.average))
    np.testing.assert_allclose(base.mean(0), MEAN, atol=0.1 * 0.25)
    np.testing.assert_allclose(base.std(0) / STD, 0.93, rtol=0.1)


def test_the_critic_gives_the_base_no_gradient():
    """Another critic, temperature or reward moves neither the cloned flow nor the base by a bit, but the actor."""
    state, rows = start(SMALL), batch(jr.key(1))
    one, _ = jax.jit(SMALL.update)(state, rows, jr.key(2))
    other, _ = jax.jit(replace(SMALL, tau=30.0, normalise_q=True).update)(
        replace(state, lam=jnp.asarray(1 / 30.0)), replace(rows, reward=5 * rows.reward), jr.key(2)
    )
    jax.tree.map(np.testing.assert_array_equal, (one.flow, one.average), (other.flow, other.average))
    assert any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (one.actor, other.actor)), strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (one.flow, state.flow)), strict=True))


@pytest.mark.parametrize("normalise", [True, False])
def test_the_loss_of_the_actor_by_hand(normalise):
    """2 (v - v_b) / sigma + sigma a of every step, from the equations, with a by backpropagation through the steps of
    the base, and the slope of the target critic at the end of the path, within the box and 0 beyond it."""
    agent = replace(SMALL, critic=FROZEN, normalise_q=normalise, tau=2.0)
    state = start(agent)
    other = agent.flow.init(jr.key(7), D, 1)  # an actor that is not the base
    state = replace(state, actor=other, target=Bowl(3.0))
    _, metrics = jax.jit(agent.update)(state, batch(jr.key(1)), jr.key(2))

    @jax.jit
    def by_hand(state):
        _, _, _, k_start, k_path, _, _ = jr.split(jr.key(2), 7)
        h, obs = 1 / K, jnp.zeros(1)
        v, v_b = (lambda x, t, f=f: f.output(x, jnp.asarray(t, x.dtype), obs) for f in (state.actor, state.average))
        sigma = [np.sqrt(2 * (1 - i * h + h) / (i * h + h)) for i in range(K)]

        def rest(x, i, shifts):
            """x_K from x_i by steps of the base, shifted as they were."""
            for j in range(i, K - 1):
                x = x + h * (2 * v_b(x, j * h) - x / (j * h + h)) + shifts[j]
            return x + h * v_b(x, 1 - h)

        def one(x, key):
            noise, xs, shifts = jr.normal(key, (K - 1, D)), [x], []
            for i in range(K - 1):
                xs.append(x + h * (2 * v(x, i * h) - x / (i * h + h)) + h**0.5 * sigma[i] * noise[i])
                shifts.append(xs[-1] - (x + h * (2 * v_b(x, i * h) - x / (i * h + h))))
                x = xs[-1]
            end = rest(x, K - 1, shifts)
            value = lambda x: -1.5 * CURVE * jnp.sum((jnp.clip(x, -1, 1) - GOAL) ** 2)
            controls, adjoints = [], []
            for i in range(K):
                a = jax.grad(value)(end)
                if i < K - 1:
                    a = jax.vjp(lambda x, i=i: rest(x, i + 1, shifts), xs[i + 1])[1](a)[0]
                controls.append(2 * (v(xs[i], i * h) - v_b(xs[i], i * h)) / sigma[i])
                adjoints.append(-2.0 * sigma[i] * a)
            return jnp.stack(controls), jnp.stack(adjoints), value(end)

        control, adjoint, value = jax.vmap(one)(state.flow.noise(k_start, 32), jr.split(k_path, 32))
        scale = jnp.mean(jnp.abs(value)) if normalise else 1.0
        return jnp.mean((control + adjoint / scale) ** 2), jnp.mean(control**2) / 2

    loss, kl = by_hand(state)
    np.testing.assert_allclose(metrics["actor_loss"], loss, rtol=1e-3)
    np.testing.assert_allclose(metrics["path_kl"], kl, rtol=1e-3)  # sum over K steps / K, per number


def test_masked_actions_are_not_cloned():
    """Where the second number of every row is masked, no gradient reaches what the flow says of it; the loss is a mean
    over what counts."""
    update = jax.jit(SMALL.update)
    whole, part = (
        update(start(SMALL), batch(jr.key(1), mask=jnp.ones((32, D)).at[:, 1].set(second)), jr.key(2))
        for second in (1.0, 0.0)
    )
    before = start(SMALL).flow.net.last.bias
    moved = part[0].flow.net.last.bias - before
    assert moved[1] == 0 and jnp.abs(moved[0]) > 1e-4
    assert jnp.abs(whole[0].flow.net.last.bias - before)[1] > 1e-4
    np.testing.assert_allclose(part[1]["matching_loss"], whole[1]["matching_loss"], rtol=0.5)


def test_targets_are_those_of_the_policy_at_the_successor():
    """y = r + discount (mean_j - rho std_j) Q_j(s', a'), a' of the actor, edited where there is an edit."""
    for agent in (SMALL, replace(SMALL, edit=Edits(0.5, net=MLPSpec(8, 1)))):
        state = replace(start(agent), actor=agent.flow.init(jr.key(7), D, 1))
        rows = replace(batch(jr.key(1)), next_obs=jr.normal(jr.key(5), (32, 1)))
        _, metrics = jax.jit(agent.update)(state, rows, jr.key(2))
        policy = FlowPolicy(state.actor)
        policy = policy if state.edit is None else Edited(policy, state.edit.edit)

        @jax.jit
        def value(state, rows, policy=policy):
            action = jax.vmap(policy)(rows.next_obs, jr.split(jr.split(jr.key(2), 7)[0], 32))
            q = jax.vmap(state.target)(rows.next_obs, action)
            return jnp.mean(rows.reward + 0.9 * (q.mean(1) - 0.5 * q.std(1)))

        np.testing.assert_allclose(metrics["q"], value(state, rows), rtol=1e-3)


def test_normalised_q_makes_the_step_free_of_its_scale():
    """With `normalise_q` critics 1000 times as large move the actor in the same way, without it they do not."""
    agent = replace(SMALL, critic=FROZEN)
    losses = {}
    for normalise in (True, False):
        for size in (1.0, 1000.0):
            update = jax.jit(replace(agent, normalise_q=normalise).update)
            losses[normalise, size] = update(replace(start(agent), target=Bowl(size)), batch(jr.key(1)), jr.key(2))[1][
                "actor_loss"
            ]
    np.testing.assert_allclose(losses[True, 1.0], losses[True, 1000.0], rtol=1e-4)
    assert losses[False, 1000.0] > 1e4 * losses[False, 1.0]


def test_a_budget_of_relative_entropy_finds_the_temperature():
    """The paths of the actor keep to it; tau is then that whose fixed point has this entropy."""
    agent = replace(SMALL, flow=replace(SMALL.flow, solver=Ddim(10)), critic=FROZEN, tau=0.1)
    agent = replace(agent, budget=Budget(0.3, rate=0.02), optim=Optim(3e-3, 3000))
    _, metrics = trained(agent, 3000)
    np.testing.assert_allclose(metrics["path_kl"][-500:].mean(), 0.3, rtol=0.1)
    tau = np.linspace(0.1, 2, 400)
    wanted = tau[np.argmin([abs(exact(10, x)[2] - 0.3) for x in tau])]
    np.testing.assert_allclose(metrics["tau"][-500:].mean(), wanted, rtol=0.15)


def test_the_rule_of_a_budget():
    """Hotter above it, colder below, by `rate` per share of it; a batch counts as twice the budget at the most."""
    budget = Budget(0.5, rate=0.1, smooth=1.0, low=0.1, high=10.0)
    one = jnp.ones(())
    for kl, factor in ((0.0, np.exp(-0.1)), (0.5, 1.0), (0.75, np.exp(0.05)), (50.0, np.exp(0.1))):
        lam, average = budget.following(one, one, jnp.asarray(kl))
        np.testing.assert_allclose(lam, factor, rtol=1e-6)
        np.testing.assert_allclose(average, min(kl, 1.0))
    assert budget.following(10 * one, one, 10 * one)[0] == 10 and budget.following(0.1 * one, one, 0 * one)[0] > 0.0999
    _, average = replace(budget, smooth=0.1).following(one, jnp.asarray(0.2), jnp.asarray(0.4))
    np.testing.assert_allclose(average, 0.22, rtol=1e-6)


def test_edits_learn_at_the_actions_of_the_actor():
    """With a goal beyond their reach they push as far as they can; actor and base do not know of them."""
    edits = Edits(0.1, entropy=-2.0, net=MLPSpec(16, 1), optim=Optim(1e-2), alpha_optim=Optim(3e-2))
    agent = replace(SMALL, critic=FROZEN, edit=edits, tau=1e-3)
    state, metrics = trained(agent, 600, 32)
    plain, _ = trained(replace(agent, edit=None), 600, 32)
    for a, b in zip(*(jax.tree.leaves((s.actor, s.average)) for s in (state, plain)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3 + 1e-3 * np.abs(b).max())
    shift = draws(agent, state).mean(0) - draws(agent, replace(state, edit=None)).mean(0)
    assert 0.06 < shift[0] < 0.1 and -0.1 < shift[1] < 0.0
    np.testing.assert_allclose(metrics["entropy"][-100:].mean(), -2.0, atol=0.3)


def test_a_pretrained_flow_is_base_and_actor():
    """And settings follow its flow; those that adjoint matching cannot use are refused."""
    from contraflow.agents.offline.bc import BC

    clone = BC(FlowSpec(solver=Ddim(K), network=ResidualMLP(8, 1, 4)))
    policy = clone.policy(start(clone, 3))
    agent = SMALL.starting_from(policy)
    state = agent.adopt(start(agent), policy)
    for net in (state.flow, state.average, state.actor):
        jax.tree.map(np.testing.assert_array_equal, net, policy.policy.flow)
    assert agent.normalise_obs == "frozen" and state.stats is not None
    leaves = jax.tree.leaves(state)
    assert len({id(x) for x in leaves}) == len(leaves)
    with pytest.raises(ValueError, match="linear path"):
        QAM(flow=FlowSpec(path=VP()))
    with pytest.raises(ValueError, match="equal steps"):
        QAM(flow=MIDPOINT)


def test_presets_are_those_of_the_papers():
    agents = {name: presets()[name].agent for name in ("qam", "qam-e", "trqam")}
    assert agents["qam"].critic.members == 10 and agents["qam"].critic.backup == Mean(0.5)
    assert agents["qam-e"].edit is not None and agents["qam-e"].critic.members == 2
    assert agents["trqam"].budget is not None and agents["qam"].budget is None
    assert all(presets()[name].run["horizon"] == 5 for name in agents)
