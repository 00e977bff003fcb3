"""A policy as a function of noise: the same actions as with a key, and N(0, I) where the key was."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import stats
from tests.closeness import assert_close
from tests.contract.cases import FAMILIES, SPEC, TABLE, Case

from contraflow.core.types import UserError
from contraflow.flow.model import Ddim, FlowSpec
from contraflow.flow.path import VE
from contraflow.flow.solver import EulerMaruyama, Heun
from contraflow.nets.critic import QEnsemble
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.best_of import Argmax, BestOf, Softmax
from contraflow.policy.flow import FlowPolicy
from contraflow.policy.noise import KEY, UNROLL, with_noise
from contraflow.policy.uniform import BetaActions

# Rounding: a sampler of a few steps of small networks, whose constants are computed beforehand here and not there.
ROUNDING = 2e-5
N = 32


def flow(**settings) -> FlowPolicy:
    return FlowPolicy(FlowSpec(**{"solver": Ddim(3), "network": ResidualMLP(8, 1, 4)} | settings).init(jr.key(0), 2, 3))


CRITIC = QEnsemble(2, 3, 2, 8, 1, key=jr.key(1))
POLICIES = {  # and how many numbers each draws
    "ode": (flow(solver=Heun(2)), 2),
    "sde": (flow(solver=EulerMaruyama(4), margin=0.05), 2 + 4 * 2),
    "long": (flow(solver=Ddim(UNROLL + 4)), 2),
    "noise that is not of unit size": (flow(path=VE()), 2),
    "best of": (BestOf(flow(), CRITIC, None, Argmax(4), Argmax(4)), 4 * 2),
    "soft choice": (BestOf(flow(), CRITIC, jnp.asarray(0.1), Argmax(4), Softmax(4)), 4 * 2 + 4),
    "uniform": (BestOf(BetaActions(jnp.zeros(2)), CRITIC, None, Argmax(4), Argmax(4)), 4 * 2),
    "beta": (BestOf(BetaActions(jnp.zeros(2), 0.5), CRITIC, None, Argmax(4), Argmax(4)), 2 * 4 * 2),
}


def both(policy, observation, n: int = N):
    """(actions of the policy, actions from noise, noise), for n observations and keys."""
    free = with_noise(policy, observation)
    obs = 2.0 * jr.normal(jr.key(2), (n, 3))
    noise = jax.jit(jax.vmap(free.draw))(jr.split(jr.key(3), n))
    wanted = jax.jit(jax.vmap(lambda obs, key: policy(obs, key, True)))(obs, jr.split(jr.key(3), n))
    return wanted, jax.jit(jax.vmap(free.act))(obs, noise), noise


@pytest.mark.parametrize("name", POLICIES)
def test_the_action_of_a_key_is_that_of_its_noise(name: str):
    policy, size = POLICIES[name]
    wanted, found, noise = both(policy, 3)
    assert noise.shape == (N, size)
    assert_close(found, wanted, ROUNDING, 1.0)
    free = with_noise(policy, 3)
    other = jax.vmap(free.act, (None, 0))(jnp.zeros(3), jr.normal(jr.key(4), (N, size)))
    assert np.std(other, axis=0).min() > 0, "the action depends on the noise"


@pytest.mark.parametrize("name", [n if n in FAMILIES else pytest.param(n, marks=pytest.mark.slow) for n in TABLE])
def test_every_agent(name: str):
    case = Case(name, TABLE[name])
    wanted, found, _ = both(case.agent.policy(case.trained(0)[0]), SPEC.observation)
    assert_close(found, wanted, ROUNDING, 1.0)


@pytest.mark.parametrize("name", ["sde", "soft choice", "beta"])
def test_the_noise_of_random_keys_is_normal(name: str):
    """Whatever the distribution was that the policy drew from. Tails of p below 1e-4 would occur by chance once in
    10 000 seeds, and the seed is fixed."""
    policy, size = POLICIES[name]
    noise = np.asarray(jax.vmap(with_noise(policy, 3).draw)(jr.split(jr.key(5), 2000)))
    for column in noise.T:
        assert stats.kstest(column, "norm").pvalue > 1e-4
    correlation = np.corrcoef(noise.T) - np.eye(size)
    assert np.abs(correlation).max() < 5 / np.sqrt(2000)


def primitives(function, *args) -> list[str]:
    """Names of the primitives of a function, those of loops included."""

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            yield eqn.primitive.name
            for value in eqn.params.values():
                if hasattr(value, "jaxpr") or hasattr(value, "eqns"):
                    yield from walk(getattr(value, "jaxpr", value))

    return list(walk(jax.make_jaxpr(function)(*args).jaxpr))


@pytest.mark.parametrize(("steps", "loops"), [(1, 0), (UNROLL, 0), (UNROLL + 1, 1)])
def test_short_loops_are_unrolled_and_no_key_is_left(steps: int, loops: int):
    free = with_noise(flow(solver=Ddim(steps)), 3)
    names = primitives(free.act, jnp.zeros(3), jnp.zeros(2))
    assert names.count("scan") == loops
    assert not any("random" in name or "threefry" in name for name in names)
    assert loops or "sin" not in names, "the features of times are computed beforehand"
    assert names.count("tanh") == 2 * (1 if loops else steps), "two hidden layers of each step"


class Coin(eqx.Module):
    def __call__(self, obs, key, greedy=True):
        return jnp.where(jr.bernoulli(key), obs[:2], -obs[:2])


class Die(eqx.Module):
    def __call__(self, obs, key, greedy=True):
        return obs[:2] * jr.randint(key, (), 0, 6)


class Walk(eqx.Module):
    """A step of noise in each of many turns, drawn in the loop."""

    turns: int = eqx.field(static=True)

    def __call__(self, obs, key, greedy=True):
        def turn(x, k):
            return x + jr.normal(k, (2,)), None

        return jnp.tanh(jax.lax.scan(turn, obs[:2], jr.split(key, self.turns))[0])


def test_draws_that_cannot_be_an_input_are_refused():
    both(Coin(), 3)  # a uniform number, compared with a half
    with jax.debug_key_reuse(False):  # it takes the keys of a loop, in a batch, for one key used twice
        assert_close(*both(Walk(UNROLL), 3)[:2], ROUNDING, 1.0)
    for policy in (Die(), Walk(UNROLL + 1)):
        with pytest.raises(UserError, match=r"jax\.random\.normal"):
            with_noise(policy, 3)
    assert repr(KEY)


def test_another_length_can_be_unrolled():
    free = with_noise(flow(solver=Ddim(4)), 3, unroll=3)
    assert primitives(free.act, jnp.zeros(3), jnp.zeros(2)).count("scan") == 1
