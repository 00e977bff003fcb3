"""`contraflow.load(folder)(obs)`: the saved policy acts as the trained one did, and damage is named."""

import json
from dataclasses import replace
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import contraflow
from contraflow.agents.online.rfm import RFM, SMALL
from contraflow.agents.online.sir import SIR
from contraflow.core.settings import SCHEMA
from contraflow.core.types import EnvSpec, UserError
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.artifact import load_policy, save_policy
from contraflow.policy.base import act_batch
from contraflow.policy.best_of import First
from contraflow.policy.uniform import BetaActions
from contraflow.rl.critics import Critics

SPEC = EnvSpec(3, 2, 4, 100, True)
CRITIC = Critics(width=8, depth=1)
AGENT = RFM(flow=replace(SMALL, network=ResidualMLP(8, 1, 4)), critic=CRITIC)
ONE = replace(AGENT, choose=replace(AGENT.choose, greedy=First()))


def saved(folder: Path, agent=AGENT, seed: int = 0, spec: EnvSpec = SPEC):
    """The policy of a fresh state, saved in the folder of a run."""
    policy = agent.policy(agent.init(jr.key(seed), spec))
    save_policy(folder / "policy", policy, spec, "probe:action")
    return policy


class Guess(eqx.Module):
    """A policy of the user's own."""

    bias: jnp.ndarray

    def __call__(self, obs, key, greedy=True):
        return jnp.tanh(self.bias)


def test_the_saved_policy_acts_as_the_trained_one(tmp_path: Path):
    network = saved(tmp_path, seed=3)
    obs = jr.normal(jr.key(1), (5, 3))
    policy = contraflow.load(tmp_path, seed=7)
    wanted = act_batch(network, obs, jr.key(7), 0)
    assert np.array_equal(policy(obs), wanted)
    assert np.array_equal(contraflow.load(tmp_path / "policy", seed=7)(obs), wanted)
    assert policy.env == "probe:action" and policy.spec == SPEC
    assert repr(policy) == "Policy(FlowPolicy for probe:action: 3 observations, 2 actions)"


def test_arrays_are_named_by_what_they_are(tmp_path: Path):
    """Not by their place: another order of fields would not swap the critic and the flow."""
    network = saved(tmp_path)
    arrays = load_file(tmp_path / "policy/model.safetensors")
    assert {name.split("/")[0] for name in arrays} == {"policy", "critic", "temperature"}
    first = network.policy.flow.net.first
    assert np.array_equal(arrays["policy/flow/net/first/weights/0"], first.weights[0])
    assert np.array_equal(arrays["critic/members/first/bias"], network.critic.members.first.bias)
    config = json.loads((tmp_path / "policy/config.json").read_text())["policy"]
    shuffled = dict(sorted(config.items(), reverse=True))
    edit(tmp_path, policy=shuffled)
    assert np.array_equal(contraflow.load(tmp_path)(np.zeros(3)), contraflow.load(saved_again(tmp_path))(np.zeros(3)))


def saved_again(folder: Path) -> Path:
    saved(folder / "again")
    return folder / "again"


def test_one_observation_or_many(tmp_path: Path):
    network = saved(tmp_path, ONE)
    policy = contraflow.load(tmp_path, seed=0)
    one = policy(np.zeros(3))
    assert one.shape == (2,) and (abs(one) <= 1).all()
    assert policy(np.zeros((6, 3))).shape == (6, 2)
    assert not np.array_equal(policy(np.zeros(3)), one), "each call draws its own noise"
    assert np.array_equal(contraflow.load(tmp_path, seed=0)(np.zeros(3)), one), "a fresh policy repeats itself"
    assert not np.array_equal(contraflow.load(tmp_path, seed=1)(np.zeros(3)), one)
    together, alone = contraflow.load(tmp_path, seed=0), contraflow.load(tmp_path, seed=0)
    actions = np.concatenate([together(np.zeros((3, 3))), together(np.zeros((2, 3)))])
    # Batches of another size are another program: float32 rounds otherwise.
    np.testing.assert_allclose(actions, [alone(np.zeros(3)) for _ in range(5)], rtol=1e-4, atol=1e-5)
    exploring = contraflow.load(tmp_path)(np.zeros((4, 3)), explore=True)
    assert np.array_equal(exploring, act_batch(network, jnp.zeros((4, 3)), jr.key(0), 0, False))


def test_a_chunk_has_a_row_for_each_action(tmp_path: Path):
    spec = EnvSpec(3, 4, 1, None, False, horizon=2, execute=1)
    saved(tmp_path, ONE, spec=spec)
    policy = contraflow.load(tmp_path)
    assert policy(np.zeros(3)).shape == (2, 2) and policy(np.zeros((5, 3))).shape == (5, 2, 2)
    assert "2 actions, chunks of 2 of which 1 are executed" in repr(policy)


def test_actions_in_the_range_of_the_robot(tmp_path: Path):
    """The range is saved with the policy, and one of a chunk is that of each of its actions."""
    spec = EnvSpec(3, 4, 1, None, False, horizon=2, execute=1, low=(-2.0, 0.1), high=(2.0, 0.7))
    saved(tmp_path, spec=spec)
    policy = contraflow.load(tmp_path)
    assert policy.spec == spec
    unit = np.array([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.5], [0.5, -0.5]], np.float32)
    np.testing.assert_allclose(policy.raw(unit), [[-2, 0.1], [2, 0.7], [0, 0.55], [1, 0.25]], rtol=1e-6)
    assert np.array_equal(policy.raw(unit[1]), policy.raw(unit)[1])
    saved(tmp_path / "unit")
    assert np.array_equal(contraflow.load(tmp_path / "unit").raw(unit), unit)


@pytest.mark.parametrize("shape", [(2,), (4,), (), (2, 4), (1, 1, 3)])
def test_an_observation_of_another_size_is_refused(shape: tuple[int, ...], tmp_path: Path):
    saved(tmp_path)
    with pytest.raises(UserError, match="observations of size 3"):
        contraflow.load(tmp_path)(np.zeros(shape))


def test_a_policy_of_foreign_code_takes_trust(tmp_path: Path):
    save_policy(tmp_path / "policy", Guess(jnp.ones(2)), SPEC, "probe:action")
    with pytest.raises(UserError, match="--trust"):
        contraflow.load(tmp_path)
    assert contraflow.load(tmp_path, trust="all")(np.zeros(3)).shape == (2,)


def cut(folder: Path):
    file = folder / "policy/model.safetensors"
    file.write_bytes(file.read_bytes()[:-20])


def edit(folder: Path, **change):
    file = folder / "policy/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def swap(folder: Path, name: str, value: object):
    """One field of the outermost part of the policy."""
    policy = json.loads((folder / "policy/config.json").read_text())["policy"]
    edit(folder, policy=policy | {name: value})


def reshape(folder: Path):
    file = folder / "policy/model.safetensors"
    arrays = load_file(file)
    name = next(name for name in arrays if arrays[name].ndim == 2)
    save_file(arrays | {name: np.zeros((3, 3, 3), np.float32)}, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "policy/model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda f: (f / "policy/config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "policy/config.json").write_text("{"), "damaged"),
        (lambda f: (f / "policy/config.json").write_text("[1, 2]"), "not written by contraflow"),
        (lambda f: (f / "policy/config.json").write_text(json.dumps({"schema": SCHEMA})), "does not describe a policy"),
        (cut, "damaged"),
        (reshape, r"of shape \(3, 3, 3\), its settings need"),
        (lambda f: edit(f, schema=SCHEMA + 1), "upgrade contraflow"),
        (lambda f: edit(f, schema=None), "has no schema"),
        (lambda f: saved(f, SIR(critic=CRITIC)), None),
        (lambda f: edit(f, policy="all of it"), "no part of a policy"),
        (lambda f: edit(f, policy={"kind": "policy.flow:Missing"}), "--trust"),
        (lambda f: edit(f, policy={"kind": "policy.flow:FlowPolicy", "flow": None}), "other fields"),
        (lambda f: edit(f, policy=[]), "does not mention"),
        (lambda f: edit(f, policy={"array": ["a"], "shape": [1]}), "no name and shape"),
        (lambda f: edit(f, policy={"array": "a", "shape": 3}), "no name and shape"),
        (lambda f: edit(f, policy={"array": "a"}), "no name and shape"),
        (lambda f: swap(f, "explore", 3), "BestOf.explore by 3, which are no settings"),
        (lambda f: swap(f, "explore", {}), "BestOf.explore by {}, which are no settings"),
    ],
)
def test_damage_is_named(damage, message: str | None, tmp_path: Path):
    saved(tmp_path)
    damage(tmp_path)
    if message is None:  # a whole policy of another agent over the old one is no damage
        assert isinstance(contraflow.load(tmp_path).network.policy, BetaActions)
    else:
        with pytest.raises(UserError, match=message):
            contraflow.load(tmp_path)


def test_arrays_of_another_agent_are_named(tmp_path: Path):
    saved(tmp_path)
    config = (tmp_path / "policy/config.json").read_text()
    saved(tmp_path, SIR(critic=CRITIC))
    (tmp_path / "policy/config.json").write_text(config)
    with pytest.raises(UserError, match="lacks the array policy/flow"):
        load_policy(tmp_path / "policy")


def test_no_folder(tmp_path: Path):
    with pytest.raises(UserError, match="holds no policy"):
        contraflow.load(tmp_path / "nothing")
