"""SAC: the density of its actions, its optimum on a bandit with a known Q, its entropy control."""

from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import integrate, optimize, stats
from tests.agents.agent_helpers import bandit

from contraflow.agents.online.sac import SAC
from contraflow.core.optim import Optim
from contraflow.core.types import EnvSpec
from contraflow.nets.critic import QEnsemble
from contraflow.nets.mlp import MLPSpec
from contraflow.rl.critics import Critics

SPEC = EnvSpec(1, 1, 1, 1, True)
CRITIC = Critics(width=8, depth=1, tau=0.1, optim=Optim(1e-2))
PLAIN = SAC(actor=MLPSpec(8, 1))
AGENT = SAC(actor=MLPSpec(8, 1), optim=Optim(1e-2), alpha_optim=Optim(1e-2), critic=CRITIC)
STEEPNESS, PEAK = 5.0, 0.4


class Parabola(QEnsemble):
    """Q(a) = -k |a - m|^2 whatever its parameters."""

    def outputs(self, obs, action):
        return -STEEPNESS * jnp.sum((action - PEAK) ** 2) * jnp.ones((self.num, 1))


def gaussian_state(mean, std):
    """A state whose actor is tanh N(mean, std^2) everywhere."""
    state = AGENT.init(jr.key(0), SPEC)
    head = (jnp.zeros_like(state.actor.last.weight), jnp.array([mean, np.log(std)], jnp.float32))
    return eqx.tree_at(lambda s: (s.actor.last.weight, s.actor.last.bias), state, head)


def density(a, mean, std):
    """p(a) by the change of variables u = atanh a."""
    return stats.norm.pdf(np.arctanh(a), mean, std) / (1 - a**2)


@pytest.mark.parametrize(("mean", "std"), [(0.3, 0.5), (-1.0, 1.2)])
def test_log_prob_is_the_density_of_the_action(mean, std):
    state = gaussian_state(mean, std)
    sample = jax.jit(jax.vmap(lambda k: AGENT.policy(state).draw(jnp.zeros(1), k)))
    a, log_prob = (np.asarray(x, float) for x in sample(jr.split(jr.key(1), 4000)))
    inside = np.abs(a[:, 0]) < 0.999  # atanh of a rounded action is useless beyond
    # .002 nats, two thousandths of the density: what rounding `a` to float32 does to atanh.
    np.testing.assert_allclose(log_prob[inside], np.log(density(a[inside, 0], mean, std)), atol=2e-3)
    # That density integrates to 1, its entropy is the one that SAC sees, and the actions follow it.
    p = partial(density, mean=mean, std=std)
    np.testing.assert_allclose(integrate.quad(p, -1, 1)[0], 1, rtol=1e-6)
    entropy = integrate.quad(lambda x: -p(x) * np.log(max(p(x), 1e-300)), -1, 1)[0]
    assert abs(-log_prob.mean() - entropy) < 4 * log_prob.std() / np.sqrt(4000)
    below = integrate.quad(p, -1, 0)[0]
    assert abs(np.mean(a < 0) - below) < 4 * np.sqrt(below * (1 - below) / 4000)


def test_acting():
    state = gaussian_state(0.5, 0.3)
    policy = AGENT.policy(state)
    greedy = jax.jit(lambda p: p(jnp.zeros(1), jr.key(0)))(policy)
    np.testing.assert_allclose(greedy, np.tanh([0.5]), rtol=1e-6)
    many = jax.jit(jax.vmap(lambda k: policy(jnp.zeros(1), k, False)))(jr.split(jr.key(1), 1000))
    np.testing.assert_allclose(np.arctanh(many).std(), 0.3, rtol=0.1)


def train(agent, updates):
    """The state after training on the parabola, and the metrics of every update."""
    state = agent.init(jr.key(0), SPEC)
    q = lambda key: Parabola(2, 1, 1, 1, 1, key=key)
    critic, target = q(jr.key(1)), q(jr.key(2))
    opt = jax.vmap(agent.critic.optim.tx.init)(critic.members)
    state = eqx.tree_at(lambda s: (s.critic, s.target, s.critic_opt), state, (critic, target, opt))
    return run(agent, state, jr.split(jr.key(3), updates))


@partial(jax.jit, static_argnums=0)
def run(agent, state, keys):
    return jax.lax.scan(lambda s, k: agent.update(s, bandit(64), k), state, keys)


@pytest.fixture(scope="module")
def fixed_alpha():
    return train(replace(AGENT, alpha_optim=Optim(1e-30), init_alpha=0.1), 800)


def test_optimum_at_fixed_temperature(fixed_alpha):
    """The best tanh-Gaussian for E[k (a - m)^2] / alpha - entropy; its actions have precision 2 k / alpha = 100."""
    state, _ = fixed_alpha
    mean, log_std = np.asarray(state.actor(jnp.zeros(1)))
    x, w = np.polynomial.hermite_e.hermegauss(60)
    w = w / w.sum()

    def objective(p):
        u = p[0] + np.exp(p[1]) * x
        entropy = p[1] + w @ (-2 * np.log(np.cosh(u)))
        return STEEPNESS * (w @ (np.tanh(u) - PEAK) ** 2) - 0.1 * entropy

    best = optimize.minimize(objective, [0.0, -1.0]).x
    np.testing.assert_allclose([mean, log_std], best, atol=0.08)
    a = np.tanh(mean + np.exp(log_std) * x)
    spread = np.sqrt(w @ (a - w @ a) ** 2)
    np.testing.assert_allclose([w @ a, spread], [PEAK, np.sqrt(0.1 / (2 * STEEPNESS))], atol=0.02)
    np.testing.assert_allclose(np.exp(state.log_alpha), 0.1, rtol=1e-4)


def test_backup_subtracts_the_entropy_cost(fixed_alpha):
    """y = r + gamma (min Q' - alpha log pi): with Q' = 0 and r = 0 it is gamma alpha times the entropy."""
    state, _ = fixed_alpha
    flat = jax.tree.map(jnp.zeros_like, jax.jit(lambda k: QEnsemble(2, 1, 1, 1, 1, key=k))(jr.key(0)))
    agent = PLAIN
    opt = jax.jit(jax.vmap(agent.critic.optim.tx.init))(flat.members)
    state = eqx.tree_at(lambda s: (s.critic, s.target, s.critic_opt), state, (flat, jax.tree.map(jnp.copy, flat), opt))
    _, metrics = jax.jit(agent.update)(state, bandit(512, discount=0.99), jr.key(1))
    assert abs(metrics["q"]) > 0.02
    # Two means of 512 draws each of alpha log pi, whose deviation is about .07.
    np.testing.assert_allclose(metrics["q"], 0.99 * 0.1 * metrics["entropy"], atol=0.02)


def test_entropy_hits_its_target():
    agent = replace(AGENT, alpha_optim=Optim(5e-3), init_alpha=1.0, target_entropy=-1.5)
    _, metrics = train(agent, 4000)
    entropy, alpha = np.asarray(metrics["entropy"]), np.asarray(metrics["temperature"])
    np.testing.assert_allclose(entropy[-1000:].mean(), -1.5, atol=0.05)
    assert entropy[:20].mean() > -0.8  # it had to come down
    # At the optimum the standard deviation exp(-1.5) / sqrt(2 pi e) needs alpha = 2 k std^2.
    np.testing.assert_allclose(alpha[-1000:].mean(), 2 * STEEPNESS * np.exp(-3) / (2 * np.pi * np.e), rtol=0.15)


def test_default_target_entropy_is_minus_the_action_dimension():
    agent = replace(PLAIN, alpha_optim=Optim(0.1))
    spec = EnvSpec(1, 2, 1, 1, True)
    state = agent.init(jr.key(0), spec)
    for std, rises in ((0.05, True), (1.0, False)):  # entropy 2 log(std sqrt(2 pi e)) = -3.2 and about 2 - log det
        bias = jnp.concatenate([jnp.zeros(2), jnp.full(2, np.log(std))])
        head = (jnp.zeros_like(state.actor.last.weight), bias)
        narrow = eqx.tree_at(lambda s: (s.actor.last.weight, s.actor.last.bias), state, head)
        new, metrics = jax.jit(agent.update)(narrow, bandit(64, 2), jr.key(1))
        assert bool(new.log_alpha > state.log_alpha) == rises == bool(metrics["entropy"] < -2)


@pytest.mark.slow
def test_actor_step_leaves_the_critic_alone():
    """Two updates that differ only in how the actor moves give the same critic."""
    slow, fast = (replace(PLAIN, optim=Optim(rate)) for rate in (1e-4, 1e-1))
    data = bandit(16)
    data = eqx.tree_at(lambda b: (b.obs, b.reward), data, (jr.normal(jr.key(0), (16, 1)), jr.normal(jr.key(1), (16,))))
    states = [jax.jit(lambda k, a=a: a.update(a.init(k, SPEC), data, jr.clone(k))[0])(jr.key(2)) for a in (slow, fast)]
    jax.tree.map(np.testing.assert_array_equal, states[0].critic, states[1].critic)
    jax.tree.map(np.testing.assert_array_equal, states[0].target, states[1].target)
    assert not np.array_equal(states[0].actor.last.bias, states[1].actor.last.bias)
