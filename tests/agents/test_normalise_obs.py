"""Normalised observations: what every off-policy agent learns and does is the same whatever their scale and offset."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from contraflow.agents import DACER, PMD, RFM, SAC, SIR, TD3
from contraflow.core.types import EnvSpec, Transition
from contraflow.flow.posterior.control import Fixed
from contraflow.flow.posterior.importance import Reverse
from contraflow.flow.posterior.proposal import Noise
from contraflow.flow.solver import Euler
from contraflow.policy.select import Argmax, First, Softmax
from contraflow.rl.critics import Critics
from contraflow.rl.flow_policy import FlowPolicy
from contraflow.rl.normalise import RunningMoments, look
from contraflow.rl.temperature import Constant

SPEC = EnvSpec(3, 2, 4, 10, True)
SCALE, OFFSET = jnp.array([100.0, 0.01, 1.0]), jnp.array([5.0, -3.0, 0.0])
CRITIC = Critics(width=8, depth=1, lr=1e-2)
SMALL = {"width": 8, "depth": 1, "critic": CRITIC}
SAMPLER = FlowPolicy(steps=2, width=8, depth=1, embedding=4)
AGENTS = {
    "rfm": RFM(
        embedding=4, estimator=Reverse(4, Noise(), Fixed(0.0)), solver=Euler(2), backup=First(), explore=Softmax(3),
        greedy=Argmax(3), temperature=Constant(0.02), **SMALL,
    ),
    "pmd": PMD(policy=SAMPLER, candidates=4, explore=Softmax(3), greedy=Argmax(3), critic=CRITIC),
    "sir": SIR(explore=Softmax(64), backup=Softmax(3), greedy=Argmax(64), critic=CRITIC),
    "sac": SAC(**SMALL),
    "td3": TD3(**SMALL),
    "dacer": DACER(policy=SAMPLER, draws=4, critic=CRITIC),
}  # fmt: skip


def batch(n: int) -> Transition:
    k = jr.split(jr.key(0), 5)
    ended = jr.bernoulli(k[4], 0.2, (n,))
    row = lambda k: jr.normal(k, (n, 3))
    return Transition(
        row(k[0]), jnp.tanh(row(k[1])[:, :2]), row(k[2])[:, 0], row(k[3]), ended, ~ended, jnp.ones(n, int)
    )


@pytest.mark.parametrize(
    "name", [name if name in ("rfm", "sac") else pytest.param(name, marks=pytest.mark.slow) for name in AGENTS]
)
def test_scale_and_offset_do_not_matter(name: str):
    agent = replace(AGENTS[name], normalise_obs=True)
    rows = batch(64)
    state = jax.jit(lambda k: agent.init(k, SPEC))(jr.key(1))

    @jax.jit
    def run(scale, offset):
        """(actions at the first rows, exploring and not; rows counted) after three updates."""
        move = lambda obs: offset[None] + scale[None] * obs
        moved = eqx.tree_at(lambda b: (b.obs, b.next_obs), rows, (move(rows.obs), move(rows.next_obs)))
        # Old rows of the same kind, for the statistics begin with a row of mean 0 and variance 1.
        past = RunningMoments(offset + scale * rows.obs.mean(0), scale**2 * rows.obs.var(0), jnp.asarray(1e6))
        new = eqx.tree_at(lambda s: s.stats, state, past)
        new, _ = jax.lax.scan(lambda s, k: agent.update(s, moved, k), new, jr.split(jr.key(2), 3))
        act = lambda explore: jax.vmap(lambda o: agent.act(new, o, jr.key(3), explore))(moved.obs[:8])
        return act(True), act(False), new.stats.count

    with jax.debug_key_reuse(False):  # one key for all rows, on purpose
        plain, other = run(jnp.ones(3), jnp.zeros(3)), run(SCALE, OFFSET)
    for a, b in zip(plain, other, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)
    assert plain[2] == 1e6 + 3 * 64
    assert np.ptp(plain[0], axis=0).max() > 1e-2  # observations do matter


def test_statistics_are_those_of_the_rows_replayed():
    rows = batch(500)
    stats, out = jax.jit(look)(RunningMoments.start(3), rows)
    assert stats is not None
    np.testing.assert_allclose(stats.mean, rows.obs.mean(0), atol=5e-3)
    np.testing.assert_allclose(stats.var, rows.obs.var(0), rtol=0.01)
    for have, raw in ((out.obs, rows.obs), (out.next_obs, rows.next_obs)):
        want = (np.asarray(raw) - np.asarray(stats.mean)) / np.sqrt(np.asarray(stats.var))
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-5)
    assert look(None, rows)[1] is rows
