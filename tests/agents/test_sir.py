"""SIR: with many particles its actions follow the exact Boltzmann law; its Beta base is the base measure of RFM."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import stats
from tests.agents.agent_helpers import bandit

from contraflow.agents.online.sir import SIR
from contraflow.core.types import EnvSpec
from contraflow.nets.critic import QEnsemble
from contraflow.policy.best_of import Argmax, First, Softmax
from contraflow.policy.uniform import symmetric_beta
from contraflow.rl.critics import Critics
from contraflow.rl.energy import boltzmann
from contraflow.rl.temperature import Constant

SPEC = EnvSpec(1, 1, 1, 1, True)
LAM = 0.5
CRITIC = Critics(width=8, depth=1)


class Waves(QEnsemble):
    """Two members, of which the lower one counts: sin(3 a) and sin(3 a) + .4 a."""

    def outputs(self, obs, action):
        q = jnp.sum(jnp.sin(3.0 * action))
        return jnp.stack([q, q + 0.4 * action[0]])[:, None]


def q(a):
    return np.sin(3 * a) + np.minimum(0, 0.4 * a)


def state_of(agent, kind=Waves):
    state = agent.init(jr.key(0), SPEC)
    critic, target = (kind(2, 1, 1, 1, 1, key=jr.key(i)) for i in (1, 2))
    opt = jax.vmap(agent.critic.optim.tx.init)(critic.members)
    return eqx.tree_at(lambda s: (s.critic, s.target, s.critic_opt), state, (critic, target, opt))


def law(base):
    """Grid of actions and exact probabilities, through the density over u that RFM uses."""
    u = np.linspace(-14, 14, 8001)
    log_p = jax.vmap(boltzmann(lambda a: jnp.asarray(q_jnp(a)), jnp.asarray(LAM), base))(jnp.asarray(u)[:, None])
    p = np.exp(np.asarray(log_p, float) - float(log_p.max()))
    return np.tanh(u), p / p.sum()


def q_jnp(a):
    return jnp.sin(3 * a[0]) + jnp.minimum(0.0, 0.4 * a[0])


@pytest.mark.slow
@pytest.mark.parametrize("base", [0.5, 1.0, 3.0])
def test_many_particles_give_the_boltzmann_law(base):
    agent = SIR(critic=CRITIC, explore=Softmax(400), kappa=base, temperature=Constant(LAM))
    state = state_of(agent)
    act = jax.jit(jax.vmap(lambda k: agent.policy(state)(jnp.zeros(1), k, False)))
    a = np.asarray(act(jr.split(jr.key(3), 4000)), float)[:, 0]
    grid, p = law(base)
    # 400 candidates leave a bias of a few thousandths; the Kolmogorov-Smirnov 99.9 % bound for 4000 draws is .031.
    cdf = np.interp(a, grid, np.cumsum(p))
    assert stats.kstest(cdf, "uniform").statistic < 0.031
    mean = p @ grid
    assert abs(a.mean() - mean) < 4 * np.sqrt(p @ (grid - mean) ** 2 / 4000) + 5e-3


@pytest.mark.parametrize("kappa", [0.5, 2.0])
def test_first_shows_the_base_and_argmax_the_best(kappa):
    base = SIR(critic=CRITIC, explore=First(), greedy=Argmax(500), kappa=kappa)
    state = state_of(base)
    act = jax.jit(jax.vmap(lambda k: base.policy(state)(jnp.zeros(1), k, False)))
    a = np.asarray(act(jr.split(jr.key(3), 2000)), float)[:, 0]
    assert stats.kstest(a, stats.beta(kappa, kappa, -1, 2).cdf).pvalue > 1e-3
    best = base.policy(state)(jnp.zeros(1), jr.key(4))
    np.testing.assert_allclose(best, [np.pi / 6], rtol=0.1)  # the best of 500


class Slope(QEnsemble):
    """Members a and 2: the minimum is a, the maximum 2."""

    def outputs(self, obs, action):
        return jnp.stack([action[0], jnp.full((), 2.0)])[:, None]


def test_backup_takes_the_minimum_of_the_target_under_the_backup_rule():
    agent = SIR(critic=CRITIC, backup=Argmax(200), temperature=Constant(LAM))
    state = state_of(agent, Slope)
    state = eqx.tree_at(lambda s: s.critic, state, Slope(2, 1, 1, 1, 1, key=jr.key(5)))
    discount = jnp.array([0.99, 0.0, 0.99, 0.0])
    batch = eqx.tree_at(lambda b: (b.reward, b.discount), bandit(4), (jnp.arange(4.0), discount))
    _, metrics = jax.jit(agent.update)(state, batch, jr.key(6))
    # The best of 200 uniform actions is .99, so the rows are worth 0 + .98, 1, 2 + .98, 3.
    np.testing.assert_allclose(metrics["q"], (0.98 + 1 + 2.98 + 3) / 4, rtol=0.005)


def test_a_base_on_the_faces_is_finite():
    a = np.asarray(symmetric_beta(jr.key(0), 0.02, (4000,)))
    assert np.isfinite(a).all() and (np.abs(a) > 0.99).mean() > 0.85
