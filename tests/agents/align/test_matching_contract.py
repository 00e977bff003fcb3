"""What the methods of matching promise as agents: they draw, update a donated state, and refuse flows they spoil."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.contract.cases import shrunk

from contraflow.agents import presets
from contraflow.agents.align.base import Scored
from contraflow.agents.offline.bc import BC
from contraflow.core.types import EnvSpec
from contraflow.flow.fewstep import MeanFlow
from contraflow.flow.model import FlowSpec
from contraflow.nets.velocity import ResidualMLP

SPEC = EnvSpec(3, 2, 4, 1, True)
NAMES = ("nft", "mean-flow-nft", "awm", "rwr", "orw-cfm-w2", "best-of-group", "ac-flow", "flow-dpo")


def pretrained(averaged):
    flow = FlowSpec(network=ResidualMLP(8, 1, 4))
    agent = BC(flow, MeanFlow()) if averaged else BC(flow)
    return agent.policy(agent.init(jr.key(7), SPEC))


@pytest.mark.parametrize("name", NAMES)
def test_a_method_starts_from_a_flow_and_learns(name):
    agent, averaged = shrunk(presets()[name].agent), name == "mean-flow-nft"
    policy = pretrained(averaged)
    agent = agent.starting_from(policy)
    state = agent.adopt(agent.init(jr.key(0), SPEC), policy)
    first = jax.tree.map(np.asarray, state.flow)
    start = agent.policy(state)(jnp.ones(3), jr.key(1))
    np.testing.assert_allclose(start, policy(jnp.ones(3), jr.key(1)), rtol=1e-5, atol=1e-6)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    update = jax.jit(agent.update, donate_argnums=0)
    for i in range(25 if name == "ac-flow" else 2):
        cond = jr.normal(jr.key(i), (4, 3))
        draws = agent.explore(state, cond, 6, jr.key(100 + i))
        assert draws.end.shape == (4, 6, 2)
        state, metrics = update(state, Scored(cond, draws, draws.end[..., :1]), jr.key(200 + i))
        assert all(np.shape(m) == () and np.isfinite(m) for m in metrics.values())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), first, state.flow)
    assert all(jax.tree.leaves(moved))
    if state.reference is not None:
        jax.tree.map(np.testing.assert_array_equal, first, state.reference)
    assert np.abs(agent.policy(state)(jnp.ones(3), jr.key(1))).max() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_flows_of_the_other_kind_are_refused(name):
    """Matching velocities alone would spoil the long steps of an averaged flow."""
    averaged = name == "mean-flow-nft"
    with pytest.raises(ValueError, match="bc agent.objective:mean-flow" if averaged else "use mean-flow-nft"):
        presets()[name].agent.starting_from(pretrained(not averaged))


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("nft", {"beta": 0.0}),
        ("nft", {"instant": 1.5}),
        ("nft", {"cap": 1.0}),
        ("awm", {"trust": -1.0}),
        ("rwr", {"temperature": 0.0}),
        ("rwr", {"anchor": -1.0}),
        ("rwr", {"normalise": False}),
        ("ac-flow", {"clip": -1.0}),
        ("flow-dpo", {"pairs": 0}),
    ],
)
def test_settings_out_of_range_are_refused(name, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        replace(presets()[name].agent, **bad)
