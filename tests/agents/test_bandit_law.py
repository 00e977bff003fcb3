"""End to end: the actions that a flow learns on bandits whose Boltzmann policy is known, and the errors of solvers.

Q / lambda = slope * sum_j a_j for two slopes. The agent's own update trains the actor against a critic that is set to
the known Q and does not move; the actor is averaged over the last half of the updates.
"""

from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.stats import norm
from tests.agents.agent_helpers import bandit

from contraflow.agents.online.rfm import RFM, Choice
from contraflow.core.optim import Optim
from contraflow.core.types import EnvSpec
from contraflow.flow.path import Linear
from contraflow.flow.solver import Euler, Midpoint
from contraflow.flow.targets import Separable
from contraflow.nets.critic import QEnsemble
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.best_of import First, Softmax
from contraflow.policy.flow import FlowPolicy
from contraflow.rl.temperature import Constant, Tuned

SLOPES, EDGE = (0.0, 2.0), 0.95
SMALL_NET = ResidualMLP(32, 2, 16)


@pytest.fixture(autouse=True)
def _keys_of_scans():
    """jax 0.10 takes the keys that a scan splits for used ones once the scan is vmapped."""
    with jax.debug_key_reuse(False):
        yield


def exact_law(slope: float) -> np.ndarray:
    """Mean, standard deviation and P(|a| > .95) of one coordinate of exp(slope a) on [-1, 1]."""
    if slope == 0:
        return np.array([0.0, 3**-0.5, 1 - EDGE])
    mean = 1 / np.tanh(slope) - 1 / slope
    second = 1 - 2 * mean / slope
    return np.array([mean, np.sqrt(second - mean**2), 1 - np.sinh(slope * EDGE) / np.sinh(slope)])


def known_critic(dim: int, slope: jax.Array, key: jax.Array) -> QEnsemble:
    """One hidden unit that never sleeps: relu(slope sum_j a_j + |slope| d) - |slope| d, on the cube slope sum a."""
    critic = QEnsemble(1, 1, dim, 1, 1, key=key)
    shift = jnp.abs(slope) * dim
    parts = lambda q: (*q.members.first.weights, q.members.first.bias, q.members.last.weight, q.members.last.bias)
    values = [jnp.full_like(x, v) for x, v in zip(parts(critic), (slope, 0.0, shift, 1.0, -shift), strict=True)]
    return eqx.tree_at(parts, critic, values)


def prepare(agent: RFM, network: ResidualMLP | None = None) -> RFM:
    """The agent with one particle and temperature, and a critic that stays where it is put."""
    frozen = replace(agent.critic, members=1, width=1, depth=1, optim=Optim(1e-30))
    flow = agent.flow if network is None else replace(agent.flow, network=network)
    one = Choice(First(), First(), First())
    return replace(agent, flow=flow, critic=frozen, temperature=Constant(0.02), choose=one)


@partial(jax.jit, static_argnums=(0, 1, 3, 4))
def learn(agent: RFM, dim: int, key: jax.Array, updates: int, batch_size: int):
    """The averaged actors, one for each slope."""

    def one(slope, key):
        k_start, k_learn = jr.split(key)
        state = agent.init(k_start, EnvSpec(1, dim, 1, 1, True))
        critic = known_critic(dim, slope * state.temperature, k_start)
        state = eqx.tree_at(lambda s: (s.critic, s.target), state, (critic, jax.tree.map(jnp.copy, critic)))

        def step(carry, inputs):
            state, average = carry
            key, weight = inputs
            state, _ = agent.update(state, bandit(batch_size, dim), key)
            return (state, jax.tree.map(lambda a, b: a + weight * (b - a), average, state.actor)), None

        weights = 1.0 / jnp.maximum(1.0, jnp.arange(updates) - updates // 2)
        return jax.lax.scan(step, (state, state.actor), (jr.split(k_learn, updates), weights))[0][1]

    return jax.vmap(one)(jnp.asarray(SLOPES), jr.split(key, len(SLOPES)))


@partial(jax.jit, static_argnums=2)
def action_law(actors, key, samples: int):
    """[slope, 3]: mean, standard deviation, P(|a| > .95) of the flow's actions, averaged over dimensions."""

    def one(actor, key):
        a = FlowPolicy(actor).particles(jnp.zeros(1), key, samples)
        return jnp.stack([a.mean(), a.std(0).mean(), jnp.mean(jnp.abs(a) > EDGE)])

    return jax.vmap(one)(actors, jr.split(key, len(SLOPES)))


def test_exact_law_and_known_critic():
    grid = (np.arange(200_000) + 0.5) / 100_000 - 1
    for slope in SLOPES:
        w = np.exp(slope * grid)
        w /= w.sum()
        mean = w @ grid
        want = [mean, np.sqrt(w @ (grid - mean) ** 2), w[np.abs(grid) > EDGE].sum()]
        np.testing.assert_allclose(exact_law(slope), want, atol=1e-4)  # of quantities of order 1: the grid
        a = jr.uniform(jr.key(0), (50, 3), minval=-1.0, maxval=1.0)
        q = jax.jit(lambda s: known_critic(3, s, jr.key(1)))(jnp.asarray(slope))
        np.testing.assert_allclose(jax.vmap(lambda a, q=q: q.value(jnp.zeros(1), a))(a), slope * a.sum(1), atol=1e-5)


@pytest.mark.parametrize("slope", [0.0, 2.0])
def test_default_solver_follows_the_exact_field(slope):
    """Within .03 (here .015) on the exact field in one dimension; ten Euler steps, at more calls, are not."""
    target = Separable.linear(jnp.array([slope]))
    path, agent = Linear(), RFM()
    x0 = jnp.asarray(norm.ppf((np.arange(200) + 0.5) / 200), jnp.float32)[:, None]

    def law(solver):
        def one(x):
            drift = lambda x, t: path.velocity(target.posterior_mean(path, x, t), x, t)
            return jnp.tanh(solver(drift, x, agent.flow.margin, 1 - agent.flow.margin))

        # One at a time: the quadrature of every x takes 4001 points.
        a = jax.lax.map(one, x0, batch_size=50)[:, 0]
        return jnp.stack([a.mean(), a.std(), jnp.mean(jnp.abs(a) > EDGE)])

    laws = [np.asarray(jax.jit(law, static_argnums=0)(s)) for s in (agent.flow.solver, Euler(10))]
    errors = [np.abs(x - exact_law(slope)).max() for x in laws]
    assert agent.flow.solver.nfe <= 10
    assert errors[0] < 0.02 and errors[1] > 0.03


@pytest.mark.learn
@pytest.mark.parametrize("dim", [1, 2])
def test_default_agent_learns_the_law_quickly(dim):
    """A twentieth of the benchmark's updates, at a higher rate and with a smaller network: within .06."""
    agent = prepare(replace(RFM(), optim=Optim(2e-3, max_grad_norm=10.0)), SMALL_NET)
    actors = learn(agent, dim, jr.key(0), 400, 128)
    laws = np.asarray(action_law(actors, jr.key(1), 2000))
    want = np.stack([exact_law(s) for s in SLOPES])
    np.testing.assert_allclose(laws, want, atol=0.06)
    assert np.abs(laws[0, 0] - laws[1, 0]) > 0.4  # the second Q is really seen


@pytest.mark.learn
@pytest.mark.parametrize("dim", [1, 2, 6, 20])
def test_law_at_10_and_100_solver_steps(dim):
    """Mean, standard deviation and P(|a| > .95) within .03 for both Q's."""
    actors = learn(prepare(RFM()), dim, jr.key(0), 4000, 256)
    want = np.stack([exact_law(s) for s in SLOPES])
    for steps in (2, 10, 100):
        solved = replace(actors, spec=replace(actors.spec, solver=Midpoint(steps)))
        laws = np.asarray(action_law(solved, jr.key(1), 4000))
        assert np.abs(laws - want).max() < 0.03, (steps, laws, want)


def entropy(slope: float, sides: int) -> float:
    """Of exp(slope a) on [-1, 1] (one side) or exp(slope |a|) (two), by quadrature."""
    a = np.linspace(-1, 1, 100_001)
    p = np.exp(slope * ((a if sides == 1 else np.abs(a)) - 1))
    p /= np.trapezoid(p, a)
    return float(-np.trapezoid(p * np.log(p), a))


@pytest.mark.learn
@pytest.mark.parametrize("sides", [1, 2])
def test_the_tuned_temperature_is_that_of_the_entropy(sides):
    """Q = a or |a|: -.5 nats at lambda = .22 and .11; seen .20 and .07, as four particles tell too much of two modes.

    Told by `gaussian_entropy` lambda is .16 for a, and for |a| still falling after as many updates.
    """
    agent = prepare(replace(RFM(), optim=Optim(2e-3, max_grad_norm=10.0)), SMALL_NET)
    two = replace(agent.critic, width=2)  # hidden units, for relu(a) -+ relu(-a)
    agent = replace(agent, choose=Choice(backup=Softmax(4)), temperature=Tuned(-0.5, start=1.0, rate=1e-2), critic=two)
    state = agent.init(jr.key(0), EnvSpec(1, 1, 1, 1, True))
    parts = lambda q: (*q.members.first.weights, q.members.first.bias, q.members.last.weight, q.members.last.bias)
    values = (1.0, -1.0), (0.0, 0.0), (0.0, 0.0), (1.0, 1.0 if sides == 2 else -1.0), (0.0,)
    arrays = [jnp.reshape(jnp.array(v), x.shape) for x, v in zip(parts(state.critic), values, strict=True)]
    critic = eqx.tree_at(parts, state.critic, arrays)
    np.testing.assert_allclose(critic.value(jnp.zeros(1), jnp.array([-0.5])), 0.5 if sides == 2 else -0.5)
    state = eqx.tree_at(lambda s: (s.critic, s.target), state, (critic, jax.tree.map(jnp.copy, critic)))
    run = jax.jit(lambda state, keys: jax.lax.scan(lambda s, k: agent.update(s, bandit(128), k), state, keys))
    _, metrics = run(state, jr.split(jr.key(2), 1500))
    found = float(metrics["temperature"][-300:].mean())
    grid = np.geomspace(0.01, 1, 400)
    wanted = grid[np.argmin([abs(entropy(1 / lam, sides) + 0.5) for lam in grid])]
    np.testing.assert_allclose(metrics["entropy"][-300:].mean(), -0.5, atol=0.05)
    assert abs(np.log(found / wanted)) < (0.25 if sides == 1 else 0.7)
