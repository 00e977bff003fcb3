"""A quick agent, and the loop's carry before its first step."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from contraflow.agents.online.sir import SIR
from contraflow.data.samplers import Uniform
from contraflow.policy.best_of import Argmax, Softmax
from contraflow.rl.critics import Critics
from contraflow.training.loop import Carry, World, epoch, of_seed, stacked
from contraflow.training.sources.base import first_learner
from contraflow.training.sources.replay import Interact

WARM = Interact(True, 0, 16, Uniform(0.99))
CRITIC = Critics(width=8, depth=1, tau=0.1)
QUICK = SIR(explore=Softmax(4), backup=Softmax(4), greedy=Argmax(8), critic=CRITIC)


def begin(agent, env, key, buffer_size=64):
    k_agent, k_env = jr.split(key)
    learner = first_learner(agent, env.spec, k_agent, buffer_size)
    state, obs = env.reset(k_env)
    if not env.spec.jittable:
        return Carry(learner, state, obs)
    # `obs` may be part of the state, and a donated carry must not hold one buffer twice.
    return stacked([Carry(learner, state, jnp.copy(obs))])


def run_epoch(stage, agent, env, carry, key, n, iterated=lambda: False):
    """`epoch` of one seed: (carry, metrics, error)."""
    carry, (metrics,), error = epoch(stage, agent, World(env.spec, env), carry, key[None], n, iterated)
    return carry, metrics, error


def learner_of(carry):
    """The learner of the only seed."""
    return carry.learner if carry.learner.steps.ndim == 0 else of_seed(carry.learner, 0)


@dataclass(frozen=True)
class OnHost:
    """An environment of ours as a host environment: NumPy in, NumPy out."""

    env: Any

    @property
    def spec(self):
        return replace(self.env.spec, jittable=False)

    def reset(self, key):
        return jax.tree.map(
            lambda x: x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray(x), self.env.reset(key)
        )

    def step(self, state, action):
        state, step = self.env.step(state, jnp.asarray(action))
        return state, jax.tree.map(np.asarray, step)
