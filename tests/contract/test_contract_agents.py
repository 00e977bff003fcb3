"""What every agent promises, checked over the table in `cases.py`: off-policy, on-policy, offline, and a user's own."""

import json
from dataclasses import fields, replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.contract.cases import DRAWS_NOTHING, FAMILIES, FOREIGN, SPEC, TABLE, Case, batch

from contraflow.agents import classes, needs, presets
from contraflow.agents.base import Agent
from contraflow.core.settings import from_json, to_json
from contraflow.policy.artifact import load_policy, save_policy
from contraflow.policy.base import Cost, Policy
from contraflow.policy.best_of import First
from contraflow.runtime import policy as runtime


@pytest.fixture(scope="module")
def cases():
    return {name: Case(name, agent) for name, agent in TABLE.items()}


BATTERY = [name if name in FAMILIES else pytest.param(name, marks=pytest.mark.slow) for name in TABLE]
LIBRARY = [name for name in TABLE if name not in FOREIGN]


@pytest.fixture(params=BATTERY)
def case(request, cases):
    return cases[request.param]


@pytest.mark.parametrize("name", LIBRARY)
def test_initialisation_calls_no_lapack(name):
    """Two batched LAPACK calls at once wait for each other on two cores: the program would hang now and then."""
    text = jax.jit(jax.vmap(lambda k: TABLE[name].init(k, SPEC))).lower(jr.split(jr.key(0), 2)).as_text()
    assert "stablehlo" in text and "lapack" not in text and "Qr" not in text


def shapes(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def differs(a, b) -> bool:
    return any(not np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def is_key(leaf) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def learned(tree) -> list[str]:
    """The parts that hold what a policy has learned."""
    return [name for name in ("actor", "flow", "critic", "mean") if hasattr(tree, name)]


def test_the_table_knows_every_agent():
    assert {type(agent) for agent in TABLE.values()} >= set(classes().values())
    assert {needs(agent) for agent in TABLE.values()} == {"replay", "rollout", "dataset", "conditions"}
    assert all(isinstance(agent, Agent) for agent in TABLE.values())
    assert all(needs(preset.agent) == preset.needs for preset in presets().values())


def test_state_is_arrays_without_keys(case):
    state = case.init(jr.key(0))
    leaves = jax.tree.leaves(state)
    assert all(isinstance(leaf, jax.Array) and not is_key(leaf) and not leaf.weak_type for leaf in leaves)
    # No array twice: outside of jit a donated state would give it away twice.
    returned = jax.make_jaxpr(lambda key: case.agent.init(key, SPEC))(jr.key(0)).jaxpr.outvars
    assert len({id(v) for v in returned}) == len(returned) == len(leaves)


def test_the_policy_is_put_together_from_the_state(case):
    """Without any computation: its leaves are leaves of the state; and those that were learned are really read."""
    state, *_ = case.trained(0)
    policy = case.agent.policy(state)
    assert isinstance(policy, Policy)
    assert {id(leaf) for leaf in jax.tree.leaves(policy)} <= {id(leaf) for leaf in jax.tree.leaves(state)}
    obs = jr.normal(jr.key(1), (5, 3))
    acts = case.act(policy, obs, jr.key(2), True)
    used = {id(leaf) for leaf in jax.tree.leaves(policy)}
    read = [f.name for f in fields(state) if {id(x) for x in jax.tree.leaves(getattr(state, f.name))} & used]
    networks = set(read) & {"actor", "average", "critic", "flow", "mean"}
    assert networks, "what a policy reads is a field of its state by one of these names"
    for name in networks:
        bare = replace(state, **{name: jax.tree.map(jnp.zeros_like, getattr(state, name))})
        assert differs(acts, case.act(case.agent.policy(bare), obs, jr.key(2), True)), name
    if case.name not in FOREIGN:
        assert isinstance(policy.cost, Cost)


def test_update_keeps_shapes_traces_once_and_takes_a_donated_state(case):
    state = case.init(jr.key(0))
    want = shapes(state)
    for i in range(5):
        data = case.data(state, jr.key(i))
        old, (state, metrics) = state, case.update(state, data, jr.key(100 + i))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old) if leaf.size > 1)
        assert shapes(state) == want
    assert case.traces["update"] == 1
    assert case.name in FOREIGN or int(state.step) == 5
    assert metrics and all(np.shape(m) == () and np.isfinite(m) for m in metrics.values())


def test_actions_are_in_range_and_traced_once(case):
    state, *_ = case.trained(0)
    policy = case.agent.policy(state)
    for i in range(5):
        obs = 10.0 * jr.normal(jr.key(i), (5, 3))
        for greedy in (True, False):
            action = case.act(policy, obs, jr.key(i), greedy)
            assert action.shape == (5, 2) and action.dtype == jnp.float32
            assert np.abs(action).max() <= 1 and np.isfinite(action).all()
        if case.onpolicy:
            assert np.abs(case.sample(policy, obs, jr.key(i))[0]).max() <= 1
    assert case.traces["act"] == 2  # one for each value of `greedy`


def test_same_key_same_result_other_key_other_result(case):
    (a, first, _), (b, second, _), (c, *_) = case.trained(1), case.trained(1), case.trained(2)
    assert_same((a, first), (b, second))
    assert all(differs(getattr(a, name), getattr(c, name)) for name in learned(a))
    # One update from one state: only its key differs.
    if case.name not in FOREIGN:
        data = case.data(a, jr.key(3))
        one, two = (case.update(case.trained(1)[0], data, jr.key(i))[0] for i in (4, 5))
        assert differs(one, two) == (case.name not in DRAWS_NOTHING)
    obs = jr.normal(jr.key(6), (4, 3))
    policy = case.agent.policy(a)
    assert_same(case.act(policy, obs, jr.key(7), False), case.act(policy, obs, jr.key(7), False))
    assert differs(case.act(policy, obs, jr.key(7), False), case.act(policy, obs, jr.key(8), False))


def test_actions_of_equal_observations_differ(case):
    policy = case.agent.policy(case.trained(0)[0])
    actions = np.asarray(case.act(policy, jnp.ones((5, 3)), jr.key(0), False))
    assert len(np.unique(actions, axis=0)) > 1  # rows: one number may lie at the edge of the box
    assert not np.allclose(actions, actions[0])


def test_what_is_sampled_is_the_exploring_action(cases):
    """With what learning needs beside it: every leaf of `extras` has a row for each action."""
    for name in ("reinflow",):
        case = cases[name]
        policy = case.agent.policy(case.init(jr.key(0)))
        obs = jr.normal(jr.key(1), (5, 3))
        action, extras = case.sample(policy, obs, jr.key(2))
        # Compiled apart: float32 rounds the same sums in another order.
        np.testing.assert_allclose(action, case.act(policy, obs, jr.key(2), False), rtol=1e-5, atol=1e-6)
        assert all(leaf.shape[0] == 5 for leaf in jax.tree.leaves(extras))


def assert_near(got: Any, want: Any, share: float):
    """Leaf by leaf, in units of the leaf's largest number."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x, y = np.asarray(x, float), np.asarray(y, float)
        np.testing.assert_allclose(x, y, rtol=0, atol=share * max(np.abs(y).max(), 1e-6))


VMAPPED = ("sac", "reinflow", "bc")


@pytest.mark.parametrize("name", [n if n in VMAPPED else pytest.param(n, marks=pytest.mark.slow) for n in TABLE])
def test_vmapped_seeds_equal_single_runs(name, cases):
    """Three seeds in one program against three runs, on the same data. float32 sums in another order differ by 1e-6,
    which Adam's division by the size of the gradient makes more of where that is small."""
    case, seeds = cases[name], range(3)
    single = [case.trained(s) for s in seeds]
    stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    states = stack([case.init(jr.split(jr.key(s))[0]) for s in seeds])
    update = jax.jit(jax.vmap(case.agent.update))
    for i in range(3):
        with jax.debug_key_reuse(False):  # the same keys as in the single runs
            states, _ = update(states, *stack([single[s][2][i] for s in seeds]))
    for s in seeds:
        assert_near(jax.tree.map(lambda x, s=s: x[s], states), single[s][0], 5e-3)


WITH_TARGET = [p for p in BATTERY if hasattr(TABLE[p if isinstance(p, str) else p.values[0]], "critic")]


@pytest.mark.parametrize("case", WITH_TARGET, indirect=True)
def test_target_moves_by_tau_towards_the_new_critic(case):
    old = jax.tree.map(np.array, case.trained(0)[0])
    new, _ = case.update(case.trained(0)[0], batch(jr.key(9)), jr.key(10))
    assert int(new.step) == int(old.step) + 1
    assert differs(new.critic, old.critic) and differs(new.target, old.target)
    tau = case.agent.critic.tau
    wanted = jax.tree.map(lambda t, c: (1 - tau) * t + tau * np.asarray(c), old.target, new.critic)
    assert_near(new.target, wanted, 1e-5)  # a few roundings of float32


def test_finite_under_extreme_rewards(case):
    state, metrics = case.init(jr.key(0)), {}
    for i in range(30):
        state, metrics = case.update(state, case.data(state, jr.key(i), scale=1e4), jr.key(100 + i))
    for leaf in jax.tree.leaves((state, metrics)):
        assert np.isfinite(leaf).all()
    assert np.isfinite(case.act(case.agent.policy(state), jnp.ones((5, 3)), jr.key(0), False)).all()


def test_saved_policy_acts_the_same(case, tmp_path):
    """Greedily and exploring; so what a policy is made of suffices, and nothing of the agent is needed."""
    state, *_ = case.trained(0)
    policy = case.agent.policy(state)
    save_policy(tmp_path, policy, SPEC, "probe:action")
    loaded, spec, env = load_policy(tmp_path, trust="custom_agent" * (case.name in FOREIGN))
    assert (spec, env) == (SPEC, "probe:action")
    assert jax.tree.structure(loaded) == jax.tree.structure(policy)
    obs = jr.normal(jr.key(1), (5, 3))
    for greedy in (True, False):
        assert_same(case.act(policy, obs, jr.key(2), greedy), case.act(loaded, obs, jr.key(2), greedy))
    if case.onpolicy:
        assert_same(case.sample(policy, obs, jr.key(2)), case.sample(loaded, obs, jr.key(2)))
    if case.name in FAMILIES:
        many = runtime.Policy(loaded, spec, env, seed=3)(np.asarray(obs))
        assert_same(many, runtime.Policy(policy, spec, env, seed=3)(np.asarray(obs)))
        assert many.shape == (5, 2)


@pytest.mark.parametrize("name", TABLE)
def test_settings_are_hashable_and_survive_json(name):
    agent = TABLE[name]
    written = json.loads(json.dumps(to_json(agent)))
    again = from_json(written, Agent, trust="custom_agent" * (name in FOREIGN), classes=classes())
    assert again == agent and hash(again) == hash(agent) and type(again) is type(agent)
    first = fields(agent)[0].name
    with pytest.raises(AttributeError):
        setattr(agent, first, None)


@pytest.mark.parametrize("name", ["sac", *(pytest.param(n, marks=pytest.mark.slow) for n in ("sir", "rfm"))])
def test_noise_is_drawn_for_every_sample_of_a_batch(name):
    """The mean over 64 equal rows must vary 64 times less than one row; with one key for all it would vary as much."""
    agent = TABLE[name]
    if name == "rfm":
        agent = replace(agent, choose=replace(agent.choose, explore=First(), backup=First()))
    if name == "sir":
        agent = replace(agent, explore=First(), backup=First())
    state = agent.init(jr.key(0), SPEC)
    rows = jax.tree.map(lambda x: jnp.repeat(x, 64, axis=0), batch(jr.key(1), 1, jnp.zeros(1)))
    rows = eqx.tree_at(lambda r: r.discount, rows, jnp.full(64, 0.99))
    metrics = jax.jit(jax.vmap(lambda state, data, key: agent.update(state, data, key)[1], (None, None, 0)))
    spread = {}
    for n in (1, 64):
        data = jax.tree.map(lambda x, n=n: x[:n], rows)
        spread[n] = {m: float(np.var(v)) for m, v in metrics(state, data, jr.split(jr.key(2), 48)).items()}
    for metric in {"q", "actor_loss", "entropy"} & set(spread[1]):
        assert spread[1][metric] > 0
        # 48 draws: the ratio of two such variances stays within a factor 3 of the true 1/64.
        assert spread[64][metric] < 0.1 * spread[1][metric], metric
