"""Agents for datasets, with their default weights, on data of two modes of which one is better: which do they take?"""

from dataclasses import fields, is_dataclass, replace

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from contraflow.agents import presets
from contraflow.core.optim import Optim
from contraflow.core.types import Batch, EnvSpec
from contraflow.nets.mlp import MLPSpec
from contraflow.nets.velocity import ResidualMLP
from contraflow.rl.critics import Critics

SPEC = EnvSpec(1, 2, 1, None, False)
SIZES = {ResidualMLP: ResidualMLP(32, 1, 8), MLPSpec: MLPSpec(32, 2), Optim: Optim(3e-3)}


def small(settings):
    """The settings with small networks and a fast rate."""
    if type(settings) in SIZES:
        return SIZES[type(settings)]
    if not is_dataclass(settings):
        return settings
    parts = {f.name: small(getattr(settings, f.name)) for f in fields(settings) if f.init}
    parts |= {"width": 32, "depth": 2} if isinstance(settings, Critics) else {}
    return replace(settings, **parts | ({"ema": 0.99} if parts.get("ema") else {}))


def data(key, n=256):
    """Actions N((+-.5, 0), .1^2), the sign at random; those of the positive mode have reward 1, and every one ends."""
    k = jr.split(key)
    sign = jnp.where(jr.bernoulli(k[0], 0.5, (n,)), 1.0, -1.0)
    action = jnp.clip(jnp.stack([0.5 * sign, jnp.zeros(n)], 1) + 0.1 * jr.normal(k[1], (n, 2)), -1, 1)
    zeros, none = jnp.zeros((n, 1)), jnp.zeros(n)
    return Batch(zeros, action, (sign > 0).astype(jnp.float32), none, zeros, jnp.ones((n, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bc", "iql", "ifql", "idql", "qc", "gfp"])
def test_the_better_of_two_modes(name):
    """A clone takes each half of the time; who chooses, or clones the better rows, takes the better one mostly."""
    agent = small(presets()[name].agent)

    @jax.jit
    def run(state):
        def one(state, key):
            return agent.update(state, data(key), jr.fold_in(key, 1))[0], None

        return jax.lax.scan(one, state, jr.split(jr.key(1), 2000))[0]

    policy = agent.policy(run(agent.init(jr.key(0), SPEC)))
    action = jax.jit(jax.vmap(lambda key: policy(jnp.zeros(1), key)))(jr.split(jr.key(2), 500))
    share = float((jnp.abs(action - jnp.array([[0.5, 0.0]])) < 0.3).all(1).mean())
    # Critics are flat within a mode, so the best of n are taken at its edge too.
    assert 0.4 < share < 0.6 if name == "bc" else share > 0.65, share
