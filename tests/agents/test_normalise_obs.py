"""Normalised observations: what every agent learns and does is the same whatever their scale and offset."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from contraflow.agents.online.dacer import DACER
from contraflow.agents.online.pmd import PMD, Candidates, Selection
from contraflow.agents.online.rfm import RFM, SMALL, Choice, PosteriorTarget
from contraflow.agents.online.sac import SAC
from contraflow.agents.online.sir import SIR
from contraflow.agents.online.td3 import TD3
from contraflow.core.optim import Optim
from contraflow.core.types import Batch, EnvSpec
from contraflow.flow.model import Ddim, FlowSpec
from contraflow.flow.posterior.control import Fixed
from contraflow.flow.posterior.importance import Reverse
from contraflow.flow.posterior.proposal import Noise
from contraflow.flow.solver import Euler
from contraflow.nets.mlp import MLPSpec
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.best_of import Argmax, First, Softmax
from contraflow.policy.normalise import RunningMoments
from contraflow.rl.critics import Critics
from contraflow.rl.normalise import update_and_normalise
from contraflow.rl.temperature import Constant

SPEC = EnvSpec(3, 2, 4, 10, True)
SCALE, OFFSET = jnp.array([100.0, 0.01, 1.0]), jnp.array([5.0, -3.0, 0.0])
CRITIC = Critics(width=8, depth=1, optim=Optim(1e-2, max_grad_norm=10.0))
NET = ResidualMLP(8, 1, 4)
FLOW = FlowSpec(solver=Ddim(2), network=NET)
PLAIN = {"actor": MLPSpec(8, 1), "critic": CRITIC}
AGENTS = {
    "rfm": RFM(
        flow=replace(SMALL, network=NET, solver=Euler(2)), target=PosteriorTarget(Reverse(4, Noise(), Fixed(0.0))),
        choose=Choice(Softmax(3), First(), Argmax(3)), temperature=Constant(0.02), critic=CRITIC,
    ),
    "pmd": PMD(
        flow=FLOW, candidates=Candidates(own=4), choose=Selection(explore=Softmax(3), greedy=Argmax(3)), critic=CRITIC
    ),
    "sir": SIR(explore=Softmax(64), backup=Softmax(3), greedy=Argmax(64), critic=CRITIC),
    "sac": SAC(**PLAIN),
    "td3": TD3(**PLAIN),
    "dacer": DACER(flow=FLOW, draws=4, critic=CRITIC),
}  # fmt: skip


def batch(n: int) -> Batch:
    k = jr.split(jr.key(0), 5)
    discount = jnp.where(jr.bernoulli(k[4], 0.2, (n,)), 0.0, 0.99)
    row = lambda k: jr.normal(k, (n, 3))
    return Batch(row(k[0]), jnp.tanh(row(k[1])[:, :2]), row(k[2])[:, 0], discount, row(k[3]), jnp.ones((n, 2)))


@pytest.mark.parametrize(
    "name", [name if name in ("rfm", "sac") else pytest.param(name, marks=pytest.mark.slow) for name in AGENTS]
)
def test_scale_and_offset_do_not_matter(name: str):
    agent = replace(AGENTS[name], normalise_obs="running")
    rows = batch(64)
    state = agent.init(jr.key(1), SPEC)

    @jax.jit
    def run(scale, offset):
        """(actions at the first rows, exploring and not; rows counted) after three updates."""
        move = lambda obs: offset[None] + scale[None] * obs
        moved = eqx.tree_at(lambda b: (b.obs, b.next_obs), rows, (move(rows.obs), move(rows.next_obs)))
        # Old rows of the same kind, for the statistics begin with a row of mean 0 and variance 1.
        past = RunningMoments(offset + scale * rows.obs.mean(0), scale**2 * rows.obs.var(0), jnp.asarray(1e6))
        new = eqx.tree_at(lambda s: s.stats, state, past)
        new, _ = jax.lax.scan(lambda s, k: agent.update(s, moved, k), new, jr.split(jr.key(2), 3))
        act = lambda greedy: jax.vmap(lambda o: agent.policy(new)(o, jr.key(3), greedy))(moved.obs[:8])
        return act(False), act(True), new.stats.count

    with jax.debug_key_reuse(False):  # one key for all rows, on purpose
        plain, other = run(jnp.ones(3), jnp.zeros(3)), run(SCALE, OFFSET)
    for a, b in zip(plain, other, strict=True):
        # float32 keeps five digits of 100 x + 5 and of .01 x - 3, and Adam makes more of small gradients.
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)
    assert plain[2] == 1e6 + 3 * 64
    assert np.ptp(plain[0], axis=0).max() > 1e-2  # observations do matter


def test_statistics_are_those_of_the_rows_replayed():
    rows = batch(500)
    stats, out = jax.jit(lambda s, b: update_and_normalise(s, b, "running"))(RunningMoments.start(3), rows)
    assert stats is not None
    # The row of mean 0 and variance 1 that they start with is one of 501.
    np.testing.assert_allclose(stats.mean, rows.obs.mean(0) * 500 / 501, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stats.var, rows.obs.var(0), rtol=0.01)
    for have, raw in ((out.obs, rows.obs), (out.next_obs, rows.next_obs)):
        want = (np.asarray(raw) - np.asarray(stats.mean)) / np.sqrt(np.asarray(stats.var))
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-5)
    assert update_and_normalise(None, rows, "running")[1] is rows


def test_frozen_statistics_stay():
    """What came with a pretrained policy normalises, and does not move."""
    given = RunningMoments(jnp.array([1.0, 0.0, -1.0]), jnp.array([4.0, 1.0, 0.25]), jnp.asarray(9.0))
    stats, out = update_and_normalise(given, batch(20), "frozen")
    assert stats is given
    np.testing.assert_allclose(out.obs[:, 0], (batch(20).obs[:, 0] - 1) / 2, rtol=1e-4, atol=1e-6)


def test_two_pieces_make_one_whole():
    """Joined moments are those of all rows at once: the distance of the means counts as often as there are rows."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(0, 1, (30, 2)), rng.normal(5, 2, (90, 2))
    valid = np.arange(90) % 3 > 0
    stats = RunningMoments(*(jnp.asarray(x, jnp.float32) for x in (first.mean(0), first.var(0), 30.0)))
    joined = jax.jit(lambda s: s.update(jnp.asarray(second, jnp.float32), jnp.asarray(valid)))(stats)
    whole = np.concatenate([first, second[valid]])
    np.testing.assert_allclose(joined.mean, whole.mean(0), rtol=1e-5)
    np.testing.assert_allclose(joined.var, whole.var(0), rtol=1e-5)
    assert joined.count == len(whole)
