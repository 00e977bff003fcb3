"""`contraflow.load(folder)(obs)`: the saved policy acts as the trained one did, and damage is named."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.random as jr
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.cli_helpers import Guess

import contraflow
from contraflow import RFM, SIR, EnvSpec, UserError
from contraflow.agents import AGENTS
from contraflow.core.settings import SCHEMA
from contraflow.policy.select import First
from contraflow.rl.critics import Critics
from contraflow.training.artifact import load_policy, save_policy
from contraflow.training.evaluate import act_batch

SPEC = EnvSpec(3, 2, 4, 100, True)
CRITIC = Critics(width=8, depth=1)
FLOW = RFM(width=8, depth=1, critic=CRITIC)


def saved(folder: Path, agent=FLOW, seed: int = 0):
    state = agent.init(jr.key(seed), SPEC)
    save_policy(folder / "policy", agent, SPEC, "probe:action", state)
    return state


@pytest.mark.parametrize("name", AGENTS)
def test_the_saved_policy_acts_as_the_trained_one(name: str, tmp_path: Path):
    small = {"width": 8, "depth": 1, "critic": CRITIC}
    agent = AGENTS[name](**{k: v for k, v in small.items() if k in AGENTS[name].__dataclass_fields__})
    state = saved(tmp_path, agent, seed=3)
    obs = jr.normal(jr.key(1), (5, 3))
    policy = contraflow.load(tmp_path, seed=7)
    wanted = act_batch(agent, state, obs, jr.key(7), 0)
    assert np.array_equal(policy(obs), wanted)
    assert np.array_equal(contraflow.load(tmp_path / "policy", seed=7)(obs), wanted)
    assert policy.env == "probe:action" and policy.spec == SPEC and policy.agent == agent
    names = set(load_file(tmp_path / "policy/model.safetensors"))
    assert {name.split("/")[0] for name in names} <= set(agent.acting)


def test_one_observation_or_many(tmp_path: Path):
    state = saved(tmp_path, replace(FLOW, greedy=First()))
    policy = contraflow.load(tmp_path, seed=0)
    one = policy(np.zeros(3))
    assert one.shape == (2,) and (abs(one) <= 1).all()
    assert policy(np.zeros((6, 3))).shape == (6, 2)
    assert not np.array_equal(policy(np.zeros(3)), one), "each call draws its own noise"
    assert np.array_equal(contraflow.load(tmp_path, seed=0)(np.zeros(3)), one), "a fresh policy repeats itself"
    assert not np.array_equal(contraflow.load(tmp_path, seed=1)(np.zeros(3)), one)
    together, alone = contraflow.load(tmp_path, seed=0), contraflow.load(tmp_path, seed=0)
    actions = np.concatenate([together(np.zeros((3, 3))), together(np.zeros((2, 3)))])
    np.testing.assert_allclose(actions, [alone(np.zeros(3)) for _ in range(5)], atol=1e-5)
    exploring = contraflow.load(tmp_path)(np.zeros((4, 3)), explore=True)
    wanted = act_batch(policy.agent, state, jax.numpy.zeros((4, 3)), jr.key(0), 0, True)
    assert np.array_equal(exploring, wanted)


def test_actions_in_the_range_of_the_robot(tmp_path: Path):
    """The range is saved with the policy, and one of a chunk is that of each of its actions."""
    spec = EnvSpec(3, 4, 1, None, False, horizon=2, execute=1, low=(-2.0, 0.1), high=(2.0, 0.7))
    save_policy(tmp_path / "policy", FLOW, spec, "", FLOW.init(jr.key(0), spec))
    policy = contraflow.load(tmp_path)
    assert policy.spec == spec
    unit = np.array([[-1.0, -1.0, 1.0, 1.0], [0.0, 0.5, 0.5, -0.5]], np.float32)
    np.testing.assert_allclose(policy.raw(unit), [[-2, 0.1, 2, 0.7], [0, 0.55, 1, 0.25]], rtol=1e-6)
    assert np.array_equal(policy.raw(unit[1]), policy.raw(unit)[1])
    saved(tmp_path / "unit")
    assert np.array_equal(contraflow.load(tmp_path / "unit").raw(unit), unit)


@pytest.mark.parametrize("shape", [(2,), (4,), (), (2, 4), (1, 1, 3)])
def test_an_observation_of_another_size_is_refused(shape: tuple[int, ...], tmp_path: Path):
    saved(tmp_path)
    with pytest.raises(UserError, match="observations of size 3"):
        contraflow.load(tmp_path)(np.zeros(shape))


def test_a_policy_of_foreign_code_takes_trust(tmp_path: Path):
    saved(tmp_path, Guess())
    with pytest.raises(UserError, match="--trust"):
        contraflow.load(tmp_path)
    assert contraflow.load(tmp_path, trust=True)(np.zeros(3)).shape == (2,)


def cut(folder: Path):
    file = folder / "policy/model.safetensors"
    file.write_bytes(file.read_bytes()[:-20])


def edit(folder: Path, **change):
    file = folder / "policy/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


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
        (lambda f: (f / "policy/config.json").write_text('{"schema": 1}'), "does not describe a policy"),
        (cut, "damaged"),
        (reshape, r"of shape \(3, 3, 3\), its settings need"),
        (lambda f: edit(f, schema=SCHEMA + 1), "upgrade contraflow"),
        (lambda f: edit(f, schema=None), "names no schema"),
        (lambda f: saved(f, SIR(critic=CRITIC)), None),
    ],
)
def test_damage_is_named(damage, message: str | None, tmp_path: Path):
    saved(tmp_path)
    damage(tmp_path)
    if message is None:  # a whole policy of another agent over the old one is no damage
        assert contraflow.load(tmp_path).agent == SIR(critic=CRITIC)
    else:
        with pytest.raises(UserError, match=message):
            contraflow.load(tmp_path)


def test_arrays_of_another_agent_are_named(tmp_path: Path):
    saved(tmp_path)
    config = (tmp_path / "policy/config.json").read_text()
    saved(tmp_path, SIR(critic=CRITIC))
    (tmp_path / "policy/config.json").write_text(config)
    with pytest.raises(UserError, match="lacks the array actor"):
        load_policy(tmp_path / "policy")


def test_no_folder(tmp_path: Path):
    with pytest.raises(UserError, match="holds no policy"):
        contraflow.load(tmp_path / "nothing")
