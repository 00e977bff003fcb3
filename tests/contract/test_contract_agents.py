"""What every agent promises, checked over the table in `cases.py`."""

import json
import typing
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.contract.cases import FAMILIES, SPEC, TABLE, B, Case, batch

from contraflow.agents import AGENTS, AnyAgent, OffPolicyAgent
from contraflow.core.settings import from_json, to_json
from contraflow.policy.select import First
from contraflow.rl.critics import Critics
from contraflow.runtime.policy import Policy
from contraflow.training.artifact import load_policy, save_policy


@pytest.fixture(scope="module")
def cases():
    return {name: Case(name, agent) for name, agent in TABLE.items()}


BATTERY = [name if name in FAMILIES else pytest.param(name, marks=pytest.mark.slow) for name in TABLE]


@pytest.fixture(params=BATTERY)
def case(request, cases):
    return cases[request.param]


@pytest.mark.parametrize("name", FAMILIES)
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


def test_the_table_knows_every_agent():
    assert {type(agent) for agent in TABLE.values()} == set(typing.get_args(OffPolicyAgent))
    assert set(typing.get_args(AnyAgent)) == set(AGENTS.values())


def test_state_is_arrays_without_keys(case):
    # Outside jit for one of each family: only there can `init` return one array twice.
    state = case.agent.init(jr.key(0), SPEC) if case.name in FAMILIES else case.init(jr.key(0))
    leaves = jax.tree.leaves(state)
    assert all(isinstance(leaf, jax.Array) and not is_key(leaf) and not leaf.weak_type for leaf in leaves)
    assert shapes(state) == shapes(case.init(jr.key(0)))
    assert case.agent.acting and all(hasattr(state, name) for name in case.agent.acting)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in leaves if leaf.size > 1]
    assert len(set(pointers)) == len(pointers)  # no array twice: a donated one would be given away twice


def test_update_keeps_shapes_traces_once_and_takes_a_donated_state(case):
    state = case.init(jr.key(0))
    want = shapes(state)
    for i in range(10):
        old, (state, metrics) = state, case.update(state, batch(jr.key(i)), jr.key(100 + i))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old) if leaf.size > 1)
        assert shapes(state) == want
    assert case.traces["update"] == 1
    assert int(state.step) == 10
    assert metrics and all(np.shape(m) == () and np.isfinite(m) for m in metrics.values())


def test_actions_are_in_range_and_traced_once(case):
    state, _ = case.trained(0)
    for i in range(10):
        obs = 10.0 * jr.normal(jr.key(i), (5, 3))
        action = case.act(state, obs, jr.key(i), True)
        assert action.shape == (5, 2) and action.dtype == jnp.float32
        assert np.abs(action).max() <= 1 and np.isfinite(action).all()
        greedy = case.act(state, obs, jr.key(i), False)
        assert greedy.shape == (5, 2) and np.abs(greedy).max() <= 1
    assert case.traces["act"] == 2  # one for each value of `explore`


def test_same_key_same_result_other_key_other_result(case):
    a, b, c = case.trained(1), case.trained(1), case.trained(2)
    assert_same(a, b)
    for name in [f for f in ("actor", "critic") if hasattr(a[0], f)]:
        assert differs(getattr(a[0], name), getattr(c[0], name))
    # One update from one state: only its key differs.
    data = batch(jr.key(3))
    first, second = (case.update(case.trained(1)[0], data, jr.key(i))[0] for i in (4, 5))
    assert differs(first, second)
    obs = jr.normal(jr.key(6), (4, 3))
    state = a[0]
    assert_same(case.act(state, obs, jr.key(7), True), case.act(state, obs, jr.key(7), True))
    assert differs(case.act(state, obs, jr.key(7), True), case.act(state, obs, jr.key(8), True))


def test_actions_of_equal_observations_differ(case):
    state, _ = case.trained(0)
    actions = np.asarray(case.act(state, jnp.ones((5, 3)), jr.key(0), True))
    assert len(np.unique(actions[:, 0])) > 1
    assert not np.allclose(actions, actions[0])


@pytest.mark.parametrize("name", ["sac", *(pytest.param(n, marks=pytest.mark.slow) for n in TABLE if n != "sac")])
def test_vmapped_seeds_equal_single_runs(name, cases):
    """Three seeds in one program against three runs; float32 reassociation moves them by some 1e-6 per update."""
    case = cases[name]

    k_init, k_run = jax.vmap(lambda seed: jr.split(jr.key(seed)), out_axes=1)(jnp.arange(3))
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[case.init(k) for k in k_init])
    update = jax.jit(jax.vmap(case.agent.update))
    for i in range(3):
        k_batch, k_update = jax.vmap(lambda k, i=i: jr.split(jr.fold_in(k, i)), out_axes=1)(k_run)
        states, _ = update(states, jax.vmap(batch)(k_batch), k_update)
    for s in range(3):
        single, _ = case.trained(s)
        jax.tree.map(
            lambda many, one, s=s: np.testing.assert_allclose(many[s], one, rtol=2e-3, atol=2e-4), states, single
        )


def test_target_moves_by_tau_towards_the_new_critic(case):
    old, _ = case.trained(0)
    old = jax.tree.map(np.array, old)
    new, _ = case.update(case.trained(0)[0], batch(jr.key(9)), jr.key(10))
    assert int(new.step) == int(old.step) + 1
    assert differs(new.critic, old.critic) and differs(new.target, old.target)
    tau = case.agent.critic.tau
    jax.tree.map(
        lambda t, c, n: np.testing.assert_allclose(n, (1 - tau) * t + tau * np.asarray(c), rtol=1e-5, atol=1e-6),
        old.target, new.critic, new.target,
    )  # fmt: skip


def test_finite_under_extreme_rewards(case):
    state = case.init(jr.key(0))
    for i in range(50):
        reward = 1e4 * jr.rademacher(jr.key(1000 + i), (B,), dtype=jnp.float32)
        state, metrics = case.update(state, batch(jr.key(i), reward=reward), jr.key(100 + i))
    for leaf in jax.tree.leaves((state, metrics)):
        assert np.isfinite(leaf).all()
    assert np.isfinite(case.act(state, jnp.ones((5, 3)), jr.key(0), True)).all()


def test_acting_fields_suffice_and_all_are_needed(case):
    state, _ = case.trained(0)
    obs = jr.normal(jr.key(1), (5, 3))
    fields = list(type(state).__dataclass_fields__)

    def without(names):
        parts = {f: getattr(state, f) for f in fields}
        return type(state)(**parts | {f: jax.tree.map(jnp.zeros_like, parts[f]) for f in names})

    bare = without([f for f in fields if f not in case.agent.acting])
    for explore in (True, False):
        assert_same(case.act(state, obs, jr.key(2), explore), case.act(bare, obs, jr.key(2), explore))
    # The learned ones are really read; the counter matters only to schedules, and `action` carries a shape.
    for name in set(case.agent.acting) & {"actor", "critic"}:
        assert differs(case.act(state, obs, jr.key(2), False), case.act(without([name]), obs, jr.key(2), False))


def test_saved_policy_acts_the_same(case, tmp_path):
    state, _ = case.trained(0)
    save_policy(tmp_path, case.agent, SPEC, "probe:action", state)
    agent, spec, env, loaded = load_policy(tmp_path)
    assert (agent, spec, env) == (case.agent, SPEC, "probe:action")
    obs = jr.normal(jr.key(1), (5, 3))
    for explore in (True, False):
        assert_same(case.act(state, obs, jr.key(2), explore), case.act(loaded, obs, jr.key(2), explore))
    if case.name in FAMILIES:
        many = Policy(agent, spec, env, loaded, seed=3)(np.asarray(obs))
        assert_same(many, Policy(agent, spec, env, state, seed=3)(np.asarray(obs)))
        assert many.shape == (5, 2)


def test_settings_are_hashable_and_survive_json(case):
    agent = case.agent
    again = from_json(json.loads(json.dumps(to_json(agent))), AnyAgent)
    assert again == agent and hash(again) == hash(agent) and type(again) is type(agent)
    assert replace(agent, critic=Critics()) != agent
    with pytest.raises(AttributeError):
        agent.critic = Critics()
    for field in {"width", "depth", "actor_lr"} & set(vars(agent)):
        with pytest.raises(ValueError, match=field):
            replace(agent, **{field: -1})


@pytest.mark.parametrize("name", ["sac", *(pytest.param(n, marks=pytest.mark.slow) for n in ("sir", "rfm"))])
def test_noise_is_drawn_for_every_sample_of_a_batch(name):
    """The mean over 64 equal rows must vary 64 times less than one row; with one key for all it would vary as much."""
    agent = TABLE[name] if name == "sac" else replace(TABLE[name], explore=First(), backup=First())
    state = jax.jit(lambda k: agent.init(k, SPEC))(jr.key(0))
    rows = jax.tree.map(lambda x: jnp.repeat(x, 64, axis=0), batch(jr.key(1), 1, jnp.zeros(1)))
    rows = eqx.tree_at(lambda r: r.terminated, rows, jnp.zeros(64, bool))
    metrics = jax.jit(jax.vmap(lambda state, data, key: agent.update(state, data, key)[1], (None, None, 0)))
    spread = {}
    for n in (1, 64):
        data = jax.tree.map(lambda x, n=n: x[:n], rows)
        spread[n] = {m: float(np.var(v)) for m, v in metrics(state, data, jr.split(jr.key(2), 48)).items()}
    for metric in {"q", "actor_loss", "entropy"} & set(spread[1]):
        assert spread[1][metric] > 0
        # 48 draws: the ratio of two such variances stays within a factor 3 of the true 1/64.
        assert spread[64][metric] < 0.1 * spread[1][metric], metric
