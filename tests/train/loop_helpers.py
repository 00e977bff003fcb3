"""A quick agent, and the loop's carry before its first step."""

import jax
import jax.numpy as jnp
import jax.random as jr

from contraflow.agents.online.sir import SIR
from contraflow.policy.select import Argmax, Softmax
from contraflow.rl.critics import Critics
from contraflow.train.loop import Carry
from contraflow.train.offpolicy import OffPolicy, first_learner

WARM = OffPolicy(True, 0, 16)
CRITIC = Critics(width=8, depth=1, lr=1e-2, tau=0.1)
QUICK = SIR(explore=Softmax(4), backup=Softmax(4), greedy=Argmax(8), critic=CRITIC)


def begin(agent, env, key, buffer_size=64):
    k_agent, k_env = jr.split(key)
    learner = jax.jit(lambda k: first_learner(agent, env.spec, buffer_size, k))(k_agent)
    state, obs = env.reset(k_env)
    # `obs` may be part of the state, and a donated carry must not hold one buffer twice.
    return Carry(learner, state, jnp.copy(obs) if env.spec.jittable else obs)
