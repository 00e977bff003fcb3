"""Returns of whole episodes, on environments of their own."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.random as jr
import numpy as np

from contraflow.agents.base import Agent
from contraflow.envs.base import Env
from contraflow.types import PRNGKey, UserError


@partial(jax.jit, static_argnames=("agent", "explore"))
def act_batch(agent: Agent, state: Any, obs: Any, key: PRNGKey, i: Any, explore: bool = False) -> Any:
    """Actions [N, a] for observations [N, o]; the key of step i is folded from `key`."""
    keys = jr.split(jr.fold_in(key, i), obs.shape[0])
    return jax.vmap(lambda o, k: agent.act(state, o, k, explore))(obs, keys)


def evaluate(
    agent: Agent,
    state: Any,
    env: Env,
    key: PRNGKey,
    episodes: int,
    explore: bool = False,
    each_step: Callable[[], None] = lambda: None,
    max_steps: int = 100_000,
) -> np.ndarray:
    """Undiscounted returns [episodes] of the evaluation policy; the first episodes started are the ones counted.

    Each of the N environments contributes the same number of episodes (rounded up), so that short episodes are not
    favoured. Raises UserError if an episode does not end within `max_steps`.
    """
    n = env.spec.num_envs
    quota = -(-episodes // n)
    k_reset, k_act = jr.split(key)
    env_state, obs = env.reset(k_reset)
    running = np.zeros(n)
    finished: list[list[float]] = [[] for _ in range(n)]
    step_fn = jax.jit(env.step) if env.spec.jittable else env.step
    for i in range(max_steps * quota):
        action = act_batch(agent, state, obs, k_act, i, explore)
        env_state, step = step_fn(env_state, action)
        obs = step.obs
        running += np.where(step.valid, step.reward, 0.0)
        done = np.asarray((step.terminated | step.truncated) & step.valid)
        for j in np.flatnonzero(done):
            finished[j].append(float(running[j]))
            running[j] = 0.0
        each_step()
        if min(map(len, finished)) >= quota:
            # Episode by episode over the environments, so that `episodes` not a multiple of n drops late ones.
            return np.array([f[e] for e in range(quota) for f in finished])[:episodes]
    raise UserError(f"no episode ended within {max_steps} steps: give the environment a time limit")
