"""Presets swing up the cartpole, with networks of 64 and few candidates. Random actions earn 23."""

import dataclasses
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from contraflow.compare.matrix import with_networks
from contraflow.envs.control import CartpoleSwingup
from contraflow.flow.likelihood import Denoising
from contraflow.flow.posterior import Reverse
from contraflow.flow.solve import Euler
from contraflow.presets import PRESETS
from contraflow.rl.critics import Critics
from contraflow.rl.flow_policy import FlowPolicy
from contraflow.rl.select import Argmax, First, Softmax
from contraflow.train.evaluate import evaluate
from contraflow.train.loop import Carry, epoch
from contraflow.train.offpolicy import OffPolicy, first_learner

ENV = CartpoleSwingup(4)
SMALL = {"width": 64, "depth": 2, "embedding": 32, "actor_lr": 1e-3}
CRITIC = {"width": 64, "depth": 2, "lr": 1e-3, "tau": 0.02}
NAMES = "dqs", "pmd", "qsm", "rfm", "rfm-one", "sac", "sir"


def shrunk(part: Any) -> Any:
    """Settings with at most 32 candidates for an estimate (16 in PMD), 8 actions to choose from, 10 solver steps, and
    64 evaluations for a log-density by denoising."""
    if isinstance(part, Reverse):
        return replace(part, samples=min(part.samples, 32))
    if isinstance(part, Softmax | Argmax | First):
        return replace(part, particles=min(part.particles, 8))
    if isinstance(part, Euler | FlowPolicy):
        return replace(part, steps=min(part.steps, 10))
    if isinstance(part, Denoising):
        return Denoising(levels=8, probes=8)
    if isinstance(part, Critics):
        return replace(part, **CRITIC)
    if dataclasses.is_dataclass(part):
        mine = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
        few = {"candidates": min(mine["candidates"], 16)} if "candidates" in mine else {}
        return replace(part, **few, **{k: shrunk(v) for k, v in mine.items() if dataclasses.is_dataclass(v)})
    return part


@pytest.mark.learn
@pytest.mark.parametrize("name", NAMES)
def test_presets_swing_up_the_cartpole(name):
    """A return of 400 within 40 000 steps, two updates for every four of them."""
    agent = with_networks(shrunk(PRESETS[name].agent), SMALL)
    learner = jax.jit(lambda k: first_learner(agent, ENV.spec, 40_000, k))(jr.key(0))
    carry = Carry(learner, *jax.tree.map(jnp.copy, ENV.reset(jr.key(1))))
    carry, _, _ = epoch(OffPolicy(True, 0, 128), agent, ENV, carry, jr.key(2), 500)
    best = 0.0
    for _ in range(4):
        carry, _, _ = epoch(OffPolicy(False, 2, 128, 3), agent, ENV, carry, jr.key(2), 2_375)
        best = max(best, evaluate(agent, carry.learner.agent, replace(ENV, num_envs=8), jr.key(3), 8).mean())
        print(name, int(carry.learner.steps), best)
        if best >= 400:
            break
    assert best >= 400
