"""Returns of whole episodes, on environments of their own; of one policy, or of those of many seeds at once."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from contraflow.core.types import PRNGKey, PRNGKeys, UserError
from contraflow.envs.base import Env
from contraflow.policy.base import Policy, act_batch

CHUNK = 100  # steps of a jittable environment between two looks at what has ended


def _advance(policy: Policy, env: Env, greedy: bool, carry: Any, key: PRNGKey, i: Any) -> tuple[Any, Any]:
    """Step i: (environment state, observations), and what counts of it: (reward, end, valid), [N] each."""
    env_state, obs = carry
    env_state, step = env.step(env_state, act_batch(policy, obs, key, i * obs.shape[0], greedy))
    return (env_state, step.obs), (step.reward, step.terminated | step.truncated, step.valid)


@partial(jax.jit, static_argnames=("env", "greedy", "n"))
def _roll(policy: Policy, env: Env, greedy: bool, carry: Any, key: PRNGKey, i: Any, n: int) -> tuple[Any, Any]:
    """n steps from step i on in one compiled scan; what counts is [n, N]."""
    return jax.lax.scan(lambda c, j: _advance(policy, env, greedy, c, key, j), carry, i + jnp.arange(n))


@partial(jax.jit, static_argnames=("env", "greedy", "n"))
def _roll_seeds(
    policies: Policy, env: Env, greedy: bool, carry: Any, keys: PRNGKeys, i: Any, n: int
) -> tuple[Any, Any]:
    """`_roll` for S seeds: policies, carry and keys have a leading [S], so has what counts."""
    return jax.vmap(lambda p, c, k: _roll(p, env, greedy, c, k, i, n))(policies, carry, keys)


def evaluate(
    policy: Policy,
    env: Env,
    key: PRNGKey,
    episodes: int,
    greedy: bool = True,
    max_steps: int = 100_000,
) -> np.ndarray:
    """Undiscounted returns [episodes] of the evaluation policy; the first episodes started are the ones counted.

    Each of the N environments contributes the same number of episodes (rounded up), so that short episodes are not
    favoured. Raises UserError if an episode does not end within `max_steps`.
    """
    k_reset, k_act = jr.split(key)
    carry = env.reset(k_reset)
    n = _chunk(env)

    def advance(i: int) -> Any:
        nonlocal carry
        if env.spec.jittable:
            carry, outcome = _roll(policy, env, greedy, carry, k_act, i, n)
            return [x[None] for x in outcome]
        carry, outcome = _advance(policy, env, greedy, carry, k_act, i)
        return [x[None, None] for x in outcome]

    return _count(advance, env.spec.num_envs, 1, episodes, n, max_steps)[0]


def evaluate_seeds(policies: Policy, env: Env, keys: PRNGKeys, episodes: int, max_steps: int = 100_000) -> np.ndarray:
    """`evaluate` for S seeds in one program: policies with a leading [S] and keys [S] give returns [S, episodes]."""
    seeds = keys.shape[0]
    k_reset, k_act = jax.vmap(jr.split, out_axes=1)(keys)
    carry = jax.vmap(env.reset)(k_reset)
    n = _chunk(env)

    def advance(i: int) -> Any:
        nonlocal carry
        carry, outcome = _roll_seeds(policies, env, True, carry, k_act, i, n)
        return outcome

    return _count(advance, env.spec.num_envs, seeds, episodes, n, max_steps)


def _chunk(env: Env) -> int:
    return min(env.spec.episode_length or CHUNK, CHUNK) if env.spec.jittable else 1


def _count(
    advance: Callable[[int], Any], num_envs: int, seeds: int, episodes: int, n: int, max_steps: int
) -> np.ndarray:
    """Returns [S, episodes] from `advance(i)`: (reward, end, valid), [S, n, N] each, of the n steps from step i on."""
    quota = -(-episodes // num_envs)
    running = np.zeros((seeds, num_envs))
    finished: list[list[list[float]]] = [[[] for _ in range(num_envs)] for _ in range(seeds)]
    for i in range(0, max_steps * quota, n):
        reward, done, valid = (np.asarray(x) for x in advance(i))
        for j in range(n):
            running += np.where(valid[:, j], reward[:, j], 0.0)
            for s, e in np.argwhere(done[:, j] & valid[:, j]):
                finished[s][e].append(float(running[s, e]))
                running[s, e] = 0.0
        if min(len(f) for seed in finished for f in seed) >= quota:
            # Episode by episode over the environments, so that `episodes` not a multiple of N drops late ones.
            return np.array([[f[e] for e in range(quota) for f in seed][:episodes] for seed in finished])
    raise UserError(f"no episode ended within {max_steps} steps: give the environment a time limit")
