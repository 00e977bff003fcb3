"""IQL, IFQL and IDQL against closed forms: expectiles, weighted regression, and the best of N of a normal base."""

from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.scipy.stats import norm
from tests.agents.agent_helpers import Frozen, Shift, with_slope

from contraflow.agents import presets
from contraflow.agents.offline.iql import IQL, Cloned, Regressed
from contraflow.core.optim import Optim
from contraflow.core.types import Batch, EnvSpec
from contraflow.flow.model import Ddim, Flow, FlowSpec
from contraflow.nets.mlp import MLPSpec
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.flow import FlowPolicy
from contraflow.rl.critics import Critics

SPEC = EnvSpec(1, 1, 1, None, False)
FLOW = FlowSpec(solver=Ddim(4), network=ResidualMLP(8, 1, 4))
SMALL = IQL(
    Regressed(MLPSpec(8, 1)),
    value=MLPSpec(32, 1),
    critic=Critics(width=32, depth=1, tau=0.1, optim=Optim(1e-2, decay_steps=3000)),
    optim=Optim(1e-2, decay_steps=3000),
)
FROZEN = replace(SMALL, critic=Frozen(**vars(SMALL.critic)), optim=Optim(1e-2))


def start(agent, seed=0):
    return jax.jit(lambda key: agent.init(key, SPEC))(jr.key(seed))


def rows(obs, action, reward, discount, next_obs, mask=None):
    mask = jnp.ones_like(action) if mask is None else mask
    return Batch(obs[:, None], action, reward, discount, next_obs[:, None], mask)


def two_steps(key, n=256):
    """From A, observation 0, every action leads to B, observation 1, where action a has the reward a and ends it; in
    the data actions are uniform in [0, 1]."""
    at = jnp.arange(n) % 2.0
    action = jr.uniform(key, (n, 1))
    return rows(at, action, at * action[:, 0], 0.9 * (1 - at), jnp.ones(n))


def two_actions(n=64):
    """One state that ends, actions -.5 and .5 alike."""
    sign = jnp.where(jnp.arange(n) % 2 == 0, -0.5, 0.5)
    return rows(jnp.zeros(n), sign[:, None], jnp.zeros(n), jnp.zeros(n), jnp.zeros(n))


@partial(jax.jit, static_argnums=(0, 1, 3))
def after(agent, make, state, updates):
    """The state after some updates on fresh rows."""

    def one(state, key):
        return agent.update(state, make(jr.fold_in(key, 1)), key)[0], None

    return jax.lax.scan(one, state, jr.split(jr.key(1), updates))[0]


@pytest.mark.parametrize("kappa", [0.5, 0.9])
def test_values_are_expectiles_over_the_actions_of_the_data(kappa):
    """V(B) is the expectile of U[0, 1], Q(A, a) = .9 V(B) for every a. With kappa = .5 that is SARSA, .9 E[a']."""
    agent = replace(SMALL, kappa=kappa)
    state = after(agent, two_steps, start(agent), 3000)
    expectile = np.sqrt(kappa) / (np.sqrt(kappa) + np.sqrt(1 - kappa))
    action = jnp.linspace(0.1, 0.9, 9)[:, None]
    q = jax.jit(jax.vmap(state.critic.value, (None, 0)))
    # Two critics of which the lower counts, and batches of 128 rows of each state.
    np.testing.assert_allclose(state.value(jnp.ones(1))[0], expectile, rtol=0.05)
    np.testing.assert_allclose(q(jnp.zeros(1), action), 0.9 * expectile, rtol=0.05)
    np.testing.assert_allclose(q(jnp.ones(1), action), action[:, 0], atol=0.03)


def test_a_critic_learns_what_the_value_of_the_successor_says():
    """One step is that of `Critics.learn` with target critics that say c everywhere, where V says c."""
    agent, c = replace(SMALL, optim=Optim(1e-12)), 0.7
    constant = lambda net: eqx.tree_at(lambda n: (n.last.weight, n.last.bias), net, replace_fn=jnp.zeros_like)
    state = start(agent)
    value = eqx.tree_at(lambda n: n.last.bias, constant(state.value), jnp.full(1, c))
    target = eqx.tree_at(lambda q: q.members, state.target, constant(state.target.members))
    target = eqx.tree_at(lambda q: q.members.last.bias, target, jnp.full((2, 1), c))
    batch = two_steps(jr.key(3), 8)
    state = replace(state, value=value, target=target)
    new, metrics = jax.jit(agent.update)(state, batch, jr.key(4))
    critic, *_ = jax.jit(agent.critic.learn)(state.critic, target, state.critic_opt, batch, batch.action, jr.key(5))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), new.critic, critic)
    np.testing.assert_allclose(metrics["q"], jnp.mean(batch.reward + batch.discount * c), rtol=1e-5)


@pytest.mark.parametrize(
    ("slope", "normalise", "cap", "mean"),
    [(2.0, False, 100.0, np.tanh(1.0)), (200.0, True, 100.0, np.tanh(1.0)), (2.0, False, 1.0, np.tanh(0.5))],
)
def test_the_regressed_actor_is_the_weighted_normal(slope, normalise, cap, mean):
    """Q = g a on actions -.5 and .5: V = 0 for kappa = .5, weights exp(+-1) or exp(-1) and 1; mean and deviation are
    those of two points with these weights."""
    agent = replace(FROZEN, kappa=0.5, actor=Regressed(MLPSpec(8, 1), beta=1.0, cap=cap, normalise_q=normalise))
    state = with_slope(start(agent), jnp.full(1, slope))
    state = after(agent, lambda key: two_actions(), state, 2000)
    got, wanted = state.actor.mean(jnp.zeros(1))[0], 0.5 * mean
    np.testing.assert_allclose(got, wanted, rtol=0.03)  # Adam at 1e-2
    np.testing.assert_allclose(jnp.exp(state.actor.log_std[0]), np.sqrt(0.25 - wanted**2), rtol=0.03)


def test_the_loss_of_the_regression_by_hand():
    """Means over the numbers that count, with the advantage in units of its mean size."""
    k = jr.split(jr.key(0), 3)
    actor = Regressed(MLPSpec(8, 1)).init(k[0], EnvSpec(1, 2, 1, None, False))
    actor = replace(actor, log_std=jnp.array([0.3, -0.2]))
    mask = jnp.ones((6, 2)).at[::2, 1].set(0.0)
    batch = rows(jr.normal(k[1], (6,)), jr.normal(k[2], (6, 2)), jnp.zeros(6), jnp.zeros(6), jnp.zeros(6), mask)
    advantage = jnp.arange(-3.0, 3.0)
    weight = np.minimum(np.exp(2.0 * np.asarray(advantage) / 1.5), 10.0)
    logp = norm.logpdf(batch.action, jax.vmap(actor.mean)(batch.obs), jnp.exp(actor.log_std)[None])
    wanted = -np.sum(weight[:, None] * np.asarray(mask * (logp + 0.5 * np.log(2 * np.pi)))) / 9
    got = Regressed(beta=2.0, cap=10.0).loss(actor, batch, advantage, jr.key(1))
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


@pytest.mark.parametrize("n", [1, 8, 32])
def test_the_best_of_n_of_a_normal_base(n):
    """Q = a on N(m, s^2): the mean is m + s E[max of n], with E[max] 0, 1.4236 and 2.069; the divergence from the base
    log n - (n - 1) / n nats, 2.497 for 32. One particle is the clone itself."""
    agent = replace(SMALL, actor=Cloned(FLOW, n))
    state = with_slope(start(agent), jnp.ones(1))
    m, s = -0.2, 0.1
    flow = Flow(Shift(1, m, s), replace(FLOW, clock=1.0))
    policy = agent.policy(replace(state, actor=flow, average=flow))
    actions = jax.jit(jax.vmap(lambda k: policy(jnp.zeros(1), k)[0]))(jr.split(jr.key(2), 20_000))
    unit = (actions - m) / s
    np.testing.assert_allclose(
        unit.mean(), {1: 0.0, 8: 1.4236, 32: 2.069}[n], rtol=0.01, atol=0.03
    )  # 4 errors of 20000
    kl = jnp.mean(np.log(n) + (n - 1) * norm.logcdf(unit))
    np.testing.assert_allclose(kl, np.log(n) - (n - 1) / n, rtol=0.015, atol=1e-6)
    assert policy.cost.critic_calls == (n if n > 1 else 0)


def test_the_critic_does_not_enter_the_clone():
    """Other rewards and another kappa move the cloned flow in no way, and the critics do move."""
    one, other = replace(SMALL, actor=Cloned(FLOW)), replace(SMALL, actor=Cloned(FLOW), kappa=0.6)
    state, batch = start(one), two_steps(jr.key(1))
    a, _ = jax.jit(one.update)(state, batch, jr.key(2))
    b, _ = jax.jit(other.update)(state, replace(batch, reward=5 * batch.reward), jr.key(2))
    jax.tree.map(np.testing.assert_array_equal, a.actor, b.actor)
    assert not np.array_equal(a.critic.members.last.weight, b.critic.members.last.weight)
    assert not np.array_equal(a.actor.net.last.weight, state.actor.net.last.weight)


@pytest.mark.parametrize("ema", [0.0, 0.75])
def test_the_average_acts(ema):
    agent = replace(SMALL, actor=Cloned(FLOW, 1), ema=ema)
    old = start(agent)
    new, _ = jax.jit(agent.update)(old, two_steps(jr.key(1)), jr.key(2))
    wanted = jax.tree.map(lambda a, b: ema * a + (1 - ema) * b, old.average, new.actor)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), new.average, wanted)
    direct = FlowPolicy(wanted).particles(jnp.zeros(1), jr.split(jr.key(3))[0], 1)[0]
    np.testing.assert_allclose(agent.policy(new)(jnp.zeros(1), jr.key(3)), direct, rtol=1e-5, atol=1e-6)


def test_idql_has_the_noise_schedule_of_its_paper():
    """alpha^2 of level k of K is exp(-b_min k / K - (b_max - b_min) k^2 / (2 K^2)): .00641 at the noise end."""
    actor = presets()["idql"].agent.actor
    path, level = actor.flow.path, jnp.arange(6) / 5
    wanted = jnp.exp(-0.1 * level - 9.9 * level**2 / 2)
    np.testing.assert_allclose(path.alpha(1 - level) ** 2, wanted, rtol=1e-5)
    np.testing.assert_allclose(wanted[-1], 0.00641, rtol=1e-3)
    assert (actor.particles, actor.flow.predict, actor.flow.clip) == (64, "noise", 1.0)


def test_only_what_can_be_is_accepted():
    for bad, word in (({"kappa": 1.0}, "kappa"), ({"kappa": 0.0}, "kappa"), ({"ema": 1.0}, "ema")):
        with pytest.raises(ValueError, match=word):
            IQL(**bad)
    for bad, word in (({"beta": 0.0}, "beta"), ({"cap": -1.0}, "cap")):
        with pytest.raises(ValueError, match=word):
            Regressed(**bad)
    with pytest.raises(ValueError, match="particles"):
        Cloned(particles=0)
