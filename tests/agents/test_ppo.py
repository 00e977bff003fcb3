"""PPO, ReinFlow, DPPO, FPO: exact ratios, closed forms of their chains, reductions to each other."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from contraflow.agents.dppo import DPPO
from contraflow.agents.fpo import FPO
from contraflow.agents.ppo import PPO
from contraflow.agents.reinflow import ReinFlow
from contraflow.flow.chain import chain_log_prob, run_chain
from contraflow.rl.advantage import gae
from contraflow.rl.flow_policy import FlowPolicy
from contraflow.rl.ppo import Samples, ratio_metrics
from contraflow.types import EnvSpec, Rollout

SPEC = EnvSpec(3, 2, 4, 10, True)
SMALL = {"width": 16, "depth": 1, "minibatches": 2, "epochs": 2}
POLICY = FlowPolicy(width=16, depth=1, embedding=8)
AGENTS = {
    "ppo": PPO(**SMALL),
    "reinflow": ReinFlow(POLICY, **SMALL),
    "reinflow-sum": ReinFlow(POLICY, ratio="sum", steps=2, anchor=0.1, **SMALL),
    "dppo": DPPO(replace(POLICY, path=DPPO().policy.path, predict="noise", steps=6, clip=1.0), learned=3, **SMALL),
    "fpo": FPO(POLICY, **SMALL),
}


def rollout(agent, state, key, T=6, N=4):
    k = jr.split(key, 5)
    obs = jr.normal(k[0], (T, N, 3))
    keys = jr.split(k[1], (T, N))
    action, extras = jax.vmap(jax.vmap(lambda o, k: agent.sample(state, o, k)))(obs, keys)
    end = jr.bernoulli(k[2], 0.2, (2, T, N))
    reward = jr.normal(k[3], (T, N))
    return action, Rollout(obs, extras, reward, jr.normal(k[4], (T, N, 3)), end[0], end[1], jnp.ones((T, N), bool))


def samples(state, r):
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (r.obs, r.extras, r.reward))
    obs, extras, advantage = flat
    return Samples(jax.vmap(state.stats)(obs), extras, advantage, advantage, jnp.ones(len(advantage)))


@pytest.mark.parametrize("name", AGENTS)
def test_the_first_ratio_is_one(name: str):
    """What acting remembered is what the update computes anew: any other grid, clip or clamp would show here."""
    agent = AGENTS[name]
    state = jax.jit(lambda k: agent.init(k, SPEC))(jr.key(0))
    _, r = jax.jit(lambda s, k: rollout(agent, s, k))(state, jr.key(1))
    args = (state.reference,) if name.startswith("reinflow") else ()
    loss, metrics = jax.jit(lambda a, b, k: agent._surrogate(a, b, k, *args))(state.actor, samples(state, r), jr.key(2))
    assert metrics["clip_share"] == 0 and abs(float(metrics["kl"])) < 1e-6
    assert np.isfinite(loss)


@pytest.mark.parametrize("name", AGENTS)
def test_an_update_moves_what_it_should(name: str):
    agent = AGENTS[name]
    state = jax.jit(lambda k: agent.init(k, SPEC))(jr.key(0))
    _, r = jax.jit(lambda s, k: rollout(agent, s, k))(state, jr.key(1))
    new, metrics = jax.jit(agent.update)(state, r, jr.key(2))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state, new)
    assert all(x > 0 for x in jax.tree.leaves(moved.critic)) and max(jax.tree.leaves(moved.actor)) > 0
    assert new.step == 1 and all(np.isfinite(float(x)) for x in metrics.values())
    assert metrics["updates"] == 4
    if new.reference is not None:
        assert max(jax.tree.leaves(moved.reference)) == 0
    assert (max(jax.tree.leaves(moved.stats)) > 0) == agent.normalise_obs
