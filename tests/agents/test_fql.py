"""FQL against its closed forms: a proximal step between a cloned flow and the critic."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.agents.agent_helpers import Frozen, with_slope

from contraflow.agents.offline.fql import ANCHORS, FQL
from contraflow.core.optim import Optim
from contraflow.core.types import Batch, EnvSpec
from contraflow.flow.model import Ddim, Flow, FlowSpec
from contraflow.flow.support import Real
from contraflow.nets.critic import Mean
from contraflow.nets.mlp import MLPSpec
from contraflow.nets.velocity import ResidualMLP
from contraflow.rl.cloning import cloning_loss
from contraflow.rl.critics import Critics

D = 3
SPEC = EnvSpec(1, D, 1, None, False)
SMALL = FQL(
    flow=FlowSpec(solver=Ddim(5), network=ResidualMLP(8, 1, 4)),
    actor=MLPSpec(16, 1),
    alpha=10.0,
    normalise_q=False,
    critic=Critics(reduce=Mean(), backup=Mean(), width=8, depth=1, tau=0.1, optim=Optim(1e-3)),
    optim=Optim(1e-2),
)


def batch(key, n=32, mask=None):
    k_action, k_reward = jr.split(key)
    action = jnp.clip(0.3 + 0.2 * jr.normal(k_action, (n, D)), -1, 1)
    mask = jnp.ones((n, D)) if mask is None else mask
    return Batch(jnp.zeros((n, 1)), action, jr.normal(k_reward, (n,)), jnp.full(n, 0.9), jnp.zeros((n, 1)), mask)


FROZEN = Frozen(**vars(SMALL.critic))


@pytest.mark.parametrize("alpha", [1.0, 4.0])
def test_the_actor_is_the_flow_shifted_by_the_slope_over_the_pull(alpha):
    """Q = g.a and a frozen flow: mu(s, z) = x_1(s, z) + g / w with w = 2 alpha / d, for every z."""
    slope = jnp.array([0.2, -0.1, 0.05])
    agent = replace(SMALL, alpha=alpha, critic=FROZEN, optim=Optim(3e-3))
    state = with_slope(jax.jit(lambda k: agent.init(k, SPEC))(jr.key(0)), slope)
    # A flow that does not move anything: x_1 = z, kept by giving its own state back after each update.
    still = jax.tree.map(jnp.zeros_like, state.flow)
    state = eqx.tree_at(lambda s: s.flow, state, still)

    @jax.jit
    def run(state):
        def one(state, key):
            new, _ = agent.update(state, batch(key, 64), jr.fold_in(key, 1))
            return eqx.tree_at(lambda s: (s.flow, s.flow_opt), new, (state.flow, state.flow_opt)), None

        return jax.lax.scan(one, state, jr.split(jr.key(1), 3000))[0]

    state = run(state)
    z = 0.3 * jr.normal(jr.key(2), (256, D))  # within the box, where the gradient of Q passes
    mu = jax.vmap(lambda z: state.actor.mu(jnp.zeros(1), z))(z)
    # A small network fits z + g / w to a few hundredths of the shift's size at alpha = 1 (.3, .15, .075).
    np.testing.assert_allclose(jnp.mean(mu - z, 0), slope * D / (2 * alpha), atol=0.15 * 0.3 / alpha)


@pytest.mark.parametrize("anchor", ["end", "velocity"])
def test_the_critic_gives_the_flow_no_gradient(anchor):
    """d(loss) / d(flow) is that of matching alone: another critic, alpha or reward moves the flow in no way."""
    agent = replace(SMALL, anchor=anchor)
    state = jax.jit(lambda k: agent.init(k, SPEC))(jr.key(0))
    rows = batch(jr.key(1))
    one, _ = jax.jit(agent.update)(state, rows, jr.key(2))
    other, _ = jax.jit(replace(agent, alpha=1e3, normalise_q=True).update)(
        state, replace(rows, reward=5 * rows.reward), jr.key(2)
    )
    jax.tree.map(np.testing.assert_array_equal, one.flow, other.flow)
    assert any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (one.actor, other.actor)), strict=True))


def test_masked_actions_are_neither_cloned_nor_distilled():
    """Where the third action of every row is masked, and critics are flat, nothing moves what the networks say of it;
    and losses are means over what counts."""
    agent = replace(SMALL, critic=FROZEN)
    state = with_slope(jax.jit(lambda k: agent.init(k, SPEC))(jr.key(0)), jnp.zeros(D))
    update = jax.jit(agent.update)
    whole, part = (
        update(state, batch(jr.key(1), mask=jnp.ones((32, D)).at[:, 2].set(third)), jr.key(2)) for third in (1.0, 0.0)
    )
    for net in (lambda s: s.flow.net, lambda s: s.actor.net):
        moved = net(part[0]).last.bias - net(state).last.bias
        assert moved[2] == 0 and jnp.abs(moved[:2]).min() > 1e-3
        assert jnp.abs(net(whole[0]).last.bias - net(state).last.bias)[2] > 1e-3
    np.testing.assert_allclose(part[1]["matching_loss"], whole[1]["matching_loss"], rtol=0.5)


@pytest.mark.parametrize("anchor", ["end", "velocity"])
def test_the_loss_of_the_actor_by_hand(anchor):
    """alpha |mu(s, z) - x_1(s, z)|^2 - Q(s, mu(s, z)), x_1 the end of the flow from the same z; or in place of the
    square |mu - z - v((1 - t) z + t mu, t)|^2."""
    slope = jnp.array([0.5, -1.0, 2.0])
    agent = replace(SMALL, critic=FROZEN, anchor=anchor)
    state = with_slope(jax.jit(lambda k: agent.init(k, SPEC))(jr.key(0)), slope)
    _, metrics = jax.jit(agent.update)(state, batch(jr.key(1)), jr.key(2))

    @jax.jit
    def by_hand(state, key):
        z = jr.normal(jr.split(key, 4)[3], (32, D))
        obs = jnp.zeros((32, 1))
        mu = jax.vmap(state.actor.mu)(obs, z)
        error = mu - jnp.clip(jax.vmap(state.flow.sample)(z, obs), -1.0, 1.0)
        if anchor == "velocity":
            t = jr.uniform(jr.fold_in(jr.split(jr.clone(key), 4)[3], 1), (32,), minval=1e-3, maxval=1 - 1e-3)
            x_t = (1 - t)[:, None] * z + t[:, None] * mu
            error = mu - z - jax.vmap(state.flow.velocity)(x_t, t, obs)
        return agent.alpha * jnp.mean(error**2) - jnp.mean(jnp.clip(mu, -1.0, 1.0) @ slope)

    np.testing.assert_allclose(metrics["actor_loss"], by_hand(state, jr.key(2)), rtol=1e-4)


def test_targets_are_those_of_the_actor_at_the_successor():
    """y = r + discount mean_j Q_j(s', mu(s', z')), with a key of its own for every row."""
    state = jax.jit(lambda k: SMALL.init(k, SPEC))(jr.key(0))
    state = with_slope(state, jnp.array([0.5, -1.0, 2.0]))
    rows = replace(batch(jr.key(1)), next_obs=jr.normal(jr.key(5), (32, 1)))
    _, metrics = jax.jit(SMALL.update)(state, rows, jr.key(2))

    @jax.jit
    def value(state, rows, key):
        keys = jr.split(jr.split(key, 4)[0], 32)
        action = jax.vmap(lambda o, k: state.actor.from_noise(o, jr.normal(k, (D,))))(rows.next_obs, keys)
        return jnp.mean(rows.reward + 0.9 * action @ jnp.array([0.5, -1.0, 2.0]))

    np.testing.assert_allclose(metrics["q"], value(state, rows, jr.key(2)), rtol=1e-3)


def test_teacher_and_actor_see_the_same_noise():
    """Without it the actor would regress on the mean of the flow: its spread would vanish as alpha grows."""
    agent = replace(SMALL, alpha=100.0)
    state = jax.jit(lambda k: agent.init(k, SPEC))(jr.key(0))

    @jax.jit
    def run(state):
        def one(state, key):
            return agent.update(state, batch(key, 64), jr.fold_in(key, 1))[0], None

        return jax.lax.scan(one, state, jr.split(jr.key(1), 3000))[0]

    state = run(state)
    z = jr.normal(jr.key(2), (512, D))
    ends = state.flow.action(jax.vmap(lambda z: state.flow.sample(z, jnp.zeros(1)))(z))
    actions = jax.vmap(lambda z: state.actor.from_noise(jnp.zeros(1), z))(z)
    # Both are of the data, N(.3, .2^2): five steps of Euler leave a spread of .74 to 1 of it, alpha = 100 a pull that
    # the critic's slope (of order one) moves by a hundredth.
    np.testing.assert_allclose(ends.mean(), 0.3, rtol=0.15)
    assert jnp.sqrt(jnp.mean((actions - ends) ** 2)) < 0.3 * ends.std()
    assert 0.6 * 0.2 < float(actions.std(0).mean()) < 1.2 * 0.2


def test_normalised_q_makes_the_gradient_free_of_its_scale():
    """With `normalise_q` critics 1000 times as large move the actor in the same way, without it they do not."""
    moved = {}
    for normalise in (True, False):
        for scale in (1.0, 1000.0):
            agent = replace(SMALL, critic=FROZEN, normalise_q=normalise, optim=Optim(1e-2))
            state = with_slope(jax.jit(lambda k, a=agent: a.init(k, SPEC))(jr.key(0)), scale * jnp.ones(D))
            _, metrics = jax.jit(agent.update)(state, batch(jr.key(1)), jr.key(2))
            moved[normalise, scale] = float(metrics["actor_grad_norm"])
    np.testing.assert_allclose(moved[True, 1.0], moved[True, 1000.0], rtol=1e-4)  # float32 sums
    assert moved[False, 1000.0] > 100 * moved[False, 1.0]


class NormalField(eqx.Module):
    """The velocity of data N(m, s^2), straight paths: m + A (x - t m), A = (t s^2 - 1 + t) / (t^2 s^2 + (1 - t)^2)."""

    dim: int = eqx.field(static=True)
    m: float = eqx.field(static=True)
    s: float = eqx.field(static=True)

    def __call__(self, x, t, cond):
        return self.m + (t * self.s**2 - 1 + t) / (t**2 * self.s**2 + (1 - t) ** 2) * (x - t * self.m)


@pytest.mark.parametrize("s", [0.2, 0.5])
def test_what_each_anchor_makes_of_normal_data(s):
    """Of actors mu = m + a z the exact flow of N(m, s^2) prefers a = s at its end, and (2 / pi) s by its velocities.

    With D = t^2 s^2 + (1 - t)^2 the velocity's error is (a (1 - t) - t s^2) z / D, so the best a is
    s^2 int t (1 - t) / D^2 / int (1 - t)^2 / D^2; with u = t / (1 - t) the integrals are 1 / (2 s^2) and pi / (4 s).
    """
    n, m, steps = 200_000, 0.1, 400
    flow = Flow(NormalField(1, m, s), FlowSpec(clock=1.0, support=Real(), solver=Ddim(steps)))
    obs, z = jnp.zeros((n, 1)), jr.normal(jr.key(0), (n, 1))

    def best(anchor, n):
        """Least squares over a: the error is linear in it."""
        error = ANCHORS[anchor](flow, obs[:n], z[:n], jr.key(1))
        offset, slope = error(m + 0 * z[:n]), error(m + z[:n]) - error(m + 0 * z[:n])
        return -jnp.sum(offset * slope) / jnp.sum(slope**2)

    # Euler's 400 steps leave the spread at .98 of it or more; a mean of 200000 varies by half a percent.
    np.testing.assert_allclose(best("end", 100), s, rtol=0.03)
    np.testing.assert_allclose(best("velocity", n), 2 / np.pi * s, rtol=0.02)


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e4])
def test_guidance_clones_the_better_rows(temperature):
    """Weights are sigmoid of the lead of the data's action over the actor's in units of mean |Q| and the temperature:
    all rows by half where it is high, only the better ones where it is low."""
    slope = jnp.array([0.5, -1.0, 2.0])
    agent = replace(SMALL, critic=FROZEN, guidance=temperature)
    state = with_slope(jax.jit(lambda k: agent.init(k, SPEC))(jr.key(0)), slope)
    rows = batch(jr.key(1))
    _, metrics = jax.jit(agent.update)(state, rows, jr.key(2))
    *_, k_flow, k_actor = jr.split(jr.key(2), 4)
    ours = jax.vmap(state.actor.from_noise)(jnp.zeros((32, 1)), jr.normal(k_actor, (32, D))) @ slope
    lead = (rows.action @ slope - ours) / jnp.abs(ours).mean()
    weight = {1e-3: lead > 0, 1.0: jax.nn.sigmoid(lead), 1e4: jnp.full(32, 0.5)}[temperature]
    assert 5 < (lead > 0).sum() < 27 and jnp.abs(lead).min() > 5e-3
    wanted = jax.jit(cloning_loss)(state.flow, rows, k_flow, weight.astype(jnp.float32))
    np.testing.assert_allclose(metrics["matching_loss"], wanted, rtol=2e-3)  # sigmoid(+-5) is within .7 % of a step


def test_only_what_can_be_is_accepted():
    for bad in ({"alpha": 0.0}, {"guidance": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            FQL(**bad)
    with pytest.raises(ValueError, match="predict='velocity'"):
        FQL(FlowSpec(predict="data"), anchor="velocity")
