"""Presets swing up the cartpole, with networks of 64 and few candidates. Random actions earn 23."""

import importlib
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from contraflow.envs.control import CartpoleSwingup
from contraflow.experiments.bridge import with_networks
from contraflow.presets import PRESETS
from contraflow.training.evaluate import evaluate
from contraflow.training.loop import Carry, epoch
from contraflow.training.offpolicy import OffPolicy, first_learner

ENV = CartpoleSwingup(4)
SMALL = {"width": 64, "depth": 2, "embedding": 32, "actor_lr": 1e-3}
CRITIC = {"width": 64, "depth": 2, "lr": 1e-3, "tau": 0.02}
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = (
    "dacer",
    "dpmd",
    "dqs",
    "flame",
    "flame-m",
    "fpmd",
    "fpmd-m",
    "maxentdp",
    "mfpo",
    "pmd",
    "qsm",
    "qvpo",
    "rfm",
    "rfm-max",
    "rfm-one",
    "sac",
    "sdac",
    "sir",
    "td3",
)


@pytest.fixture(scope="module")
def shrunk():
    """That of benchmarks/shrink.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("shrink").shrunk


@pytest.mark.learn
@pytest.mark.parametrize("name", NAMES)
def test_presets_swing_up_the_cartpole(name, shrunk):
    """A return of 400 (TD3: 200) within 40 000 steps, two updates for every four of them."""
    bar = 200 if name == "td3" else 400
    agent = shrunk(PRESETS[name].agent)
    agent = with_networks(agent, SMALL | {"critic": replace(agent.critic, **CRITIC)})
    learner = jax.jit(lambda k: first_learner(agent, ENV.spec, 40_000, k))(jr.key(0))
    carry = Carry(learner, *jax.tree.map(jnp.copy, ENV.reset(jr.key(1))))
    carry, _, _ = epoch(OffPolicy(True, 0, 128), agent, ENV, carry, jr.key(2), 500)
    best = 0.0
    for _ in range(4):
        carry, _, _ = epoch(OffPolicy(False, 2, 128, 3), agent, ENV, carry, jr.key(2), 2_375)
        best = max(best, evaluate(agent, carry.learner.agent, replace(ENV, num_envs=8), jr.key(3), 8).mean())
        print(name, int(carry.learner.steps), best)
        if best >= bar:
            break
    assert best >= bar
