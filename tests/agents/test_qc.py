"""Q-chunking: what chunks change about values, in closed form; the best of N in the target; single steps as before."""

from dataclasses import replace
from itertools import product

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.agents.agent_helpers import Shift, with_slope

from contraflow.agents.offline.qc import QC
from contraflow.core.optim import Optim
from contraflow.core.types import Batch, EnvSpec
from contraflow.data.datasets.dataset import build
from contraflow.data.rows import Rows
from contraflow.data.samplers import Chunk, NStep, Uniform
from contraflow.flow.model import Ddim, Flow, FlowSpec
from contraflow.nets.critic import Mean
from contraflow.nets.velocity import ResidualMLP
from contraflow.presets import PRESETS
from contraflow.rl.critics import Critics

GAMMA, H = 0.9, 3
SPEC = EnvSpec(1, 2, 1, None, False)
SMALL = QC(
    FlowSpec(solver=Ddim(2), network=ResidualMLP(8, 1, 4)),
    particles=4,
    critic=Critics(reduce=Mean(), backup=Mean(), width=8, depth=1, tau=0.1, optim=Optim(1e-2)),
    optim=Optim(1e-2),
)


def start(agent, spec=SPEC):
    return jax.jit(lambda key: agent.init(key, spec))(jr.key(0))


def chain() -> Rows:
    """Two states. A good action (1) leads to state 1, a bad one (-1) to state 0; a good one in state 1 has reward 1.
    Each state is followed by all 8 sequences of three actions alike: a behaviour that is good half of the time.
    Observations are (state, time)."""
    steps = []
    for state, *actions in product((0, 1), *[(-1, 1)] * H):
        for time, action in enumerate(actions):
            after = int(action > 0)
            steps.append((state, time, action, float(state and after), after, time == H - 1))
            state = after
    state, time, action, reward, after, end = map(np.array, zip(*steps, strict=True))
    arrays = {
        "obs": np.stack([state, time], 1), "next_obs": np.stack([after, time + 1], 1), "action": action[:, None],
        "reward": reward, "terminated": np.zeros(len(end), bool), "end": end,
    }  # fmt: skip
    arrays = {name: x.astype(bool if x.dtype == bool else np.float32) for name, x in arrays.items()}
    return Rows.of(build(arrays, name="chain", low=-1, high=1))


def tabular(sampler) -> dict[tuple[float, ...], float]:
    """Q(s, a...) of TD with the best action or chunk as the next one, until nothing changes: every sequence that begins
    with the first step of a trajectory counts alike."""
    batch = jax.tree.map(np.asarray, jax.jit(sampler, static_argnums=2)(chain(), jr.key(0), 4000))
    first = batch.obs[:, 1] == 0
    columns = batch.obs[:, :1], batch.action, batch.reward, batch.discount, batch.next_obs[:, 0]
    rows = np.unique(np.column_stack(columns)[first], axis=0)
    values: dict[tuple[float, ...], float] = {}
    for _ in range(200):
        best = {s: max([v for k, v in values.items() if k[0] == s], default=0.0) for s in (0.0, 1.0)}
        targets: dict[tuple[float, ...], list[float]] = {}
        for *pair, reward, discount, after in rows.tolist():
            targets.setdefault(tuple(pair), []).append(reward + discount * best[after])
        values = {pair: float(np.mean(y)) for pair, y in targets.items()}
    return values


def test_chunks_are_valued_exactly_where_several_steps_are_not():
    """Good for ever is worth 1 / (1 - g) in state 1 and g of that in state 0. A chunk is worth its rewards and what
    its last state is worth. Of three steps of single actions the behaviour takes the last two, in expectation: after a
    good action rewards 1/2 and 1/4 in them, and the state after is 1 half of the time; so with V the values it finds,
    V1 = 1 + g/2 + g^2/4 + g^3 (V1 + V0) / 2 and V0 = V1 - 1."""
    best = 1 / (1 - GAMMA)
    chunks = tabular(Chunk(H, GAMMA))
    assert len(chunks) == 16
    for (state, *actions), q in chunks.items():
        at, rewards = state > 0, []
        for action in actions:
            rewards.append(float(at and action > 0))
            at = action > 0
        ahead = best if at else GAMMA * best
        exact = sum(GAMMA**i * r for i, r in enumerate(rewards)) + GAMMA**H * ahead
        np.testing.assert_allclose(q, exact, rtol=1e-5)  # float32 rewards and discounts
    single = tabular(NStep(H, GAMMA))
    v1 = (1 + GAMMA / 2 + GAMMA**2 / 4 - GAMMA**3 / 2) / (1 - GAMMA**3)
    np.testing.assert_allclose([single[1.0, 1.0], single[0.0, 1.0]], [v1, v1 - 1], rtol=1e-5)
    assert v1 < 0.5 * best
    # One step at a time is right again.
    one = tabular(Uniform(GAMMA))
    np.testing.assert_allclose([one[1.0, 1.0], one[0.0, 1.0]], [best, GAMMA * best], rtol=1e-5)


def test_a_chunk_of_one_step_is_a_step():
    """Bit by bit, through an update."""
    spec = EnvSpec(2, 1, 1, None, False)
    rows, agent = chain(), replace(SMALL, critic=replace(SMALL.critic, gamma=GAMMA))

    @jax.jit
    def learned(state, batch):
        return agent.update(state, batch, jr.key(2))

    draws = [jax.jit(s, static_argnums=2)(rows, jr.key(1), 32) for s in (Uniform(GAMMA), Chunk(1, GAMMA))]
    one, other = (learned(start(agent, spec), batch) for batch in draws)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def batch_of(key, n=512, mask=None):
    k = jr.split(key, 3)
    action = jnp.clip(0.3 * jr.normal(k[0], (n, 2)), -1, 1)
    mask = jnp.ones((n, 2)) if mask is None else mask
    return Batch(jnp.zeros((n, 1)), action, jr.normal(k[1], (n,)), jnp.full(n, 0.8), jnp.zeros((n, 1)), mask)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_targets_value_the_chunk_that_the_critics_choose(sign):
    """Flow N(m, s^2) in each number, critics g.a, targets +-g.a, g = (1, 0): y = r + discount +-(m + s E[max of 4]),
    E[max] = 1.0294; targets that chose themselves would find + in both cases."""
    state, m, s = start(SMALL), -0.1, 0.15
    flow = Flow(Shift(2, m, s), replace(SMALL.flow, clock=1.0))
    slope = jnp.array([1.0, 0.0])
    state = replace(with_slope(state, slope), target=with_slope(state, sign * slope).critic)
    state = replace(state, flow=flow, flow_opt=SMALL.optim.init(flow))
    batch = batch_of(jr.key(1), 20_000)
    _, metrics = jax.jit(SMALL.update)(state, batch, jr.key(2))
    ahead = (metrics["q"] - batch.reward.mean()) / 0.8
    # s / sqrt(n) times .7, the deviation of the maximum, is .0007.
    np.testing.assert_allclose(ahead, sign * (m + s * 1.0294), atol=0.003)
    acts = jax.vmap(lambda k: SMALL.policy(state)(jnp.zeros(1), k))(jr.split(jr.key(3), 4000))
    np.testing.assert_allclose(acts.mean(0), [m + s * 1.0294, m], atol=0.01)


def test_masked_actions_are_not_cloned():
    state = start(SMALL)
    mask = jnp.ones((32, 2)).at[:, 1].set(0.0)
    new, _ = jax.jit(SMALL.update)(state, batch_of(jr.key(1), 32, mask), jr.key(2))
    moved = new.flow.net.last.bias - state.flow.net.last.bias
    assert moved[1] == 0 and jnp.abs(moved[0]) > 1e-3


def test_the_preset_learns_and_acts_in_chunks_of_five():
    assert (PRESETS["qc"].source.horizon, PRESETS["qc"].source.execute) == (5, 5)
    with pytest.raises(ValueError, match="particles"):
        QC(particles=0)
