"""Returns of whole episodes, and how many succeeded; of one policy, or of those of many seeds at once."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from contraflow.core.types import PRNGKey, PRNGKeys, UserError
from contraflow.envs.base import Env
from contraflow.policy.base import Policy, act_batch
from contraflow.training.loop import reset, shown, stacked, step


class Episodes(NamedTuple):
    """Undiscounted `returns`, and `success`: whether the task was done at any step of an episode. None where the
    environment does not say. Both [episodes], or [S, episodes] of S seeds."""

    returns: np.ndarray
    success: np.ndarray | None = None


CHUNK = 100  # steps of a jittable environment between two looks at what has ended


def _advance(policy: Policy, env: Env, greedy: bool, carry: Any, key: PRNGKey, i: Any) -> tuple[Any, Any]:
    """Step i: (environment state, observations), and what counts of it, [N] each."""
    env_state, obs = carry
    action = act_batch(policy, obs, key, i * env.spec.num_envs, greedy)
    env_state, after = step(env, env_state, action)
    return (env_state, after.obs), (shown(after), after.terminated | after.truncated, after.valid, after.success)


@partial(jax.jit, static_argnames=("env", "greedy", "n"))
def _roll(policies: Policy, env: Env, greedy: bool, carry: Any, keys: PRNGKeys, i: Any, n: int) -> tuple[Any, Any]:
    """n steps from step i on in one compiled scan for S seeds: every array has a leading [S], what counts [S, n, N]."""

    def one(policy, carry, key):
        return jax.lax.scan(lambda c, j: _advance(policy, env, greedy, c, key, j), carry, i + jnp.arange(n))

    if keys.shape[0] > 1:
        return jax.vmap(one)(policies, carry, keys)
    out = one(*(jax.tree.map(lambda x: x[0], tree) for tree in (policies, carry, keys)))
    return jax.tree.map(lambda x: x[None], out)


def evaluate(
    policy: Policy, env: Env, key: PRNGKey, episodes: int, greedy: bool = True, max_steps: int = 100_000
) -> np.ndarray:
    """Undiscounted returns [episodes] of a policy; the first episodes started are the ones counted.

    Each of the N environments contributes the same number of episodes (rounded up), so that short episodes are not
    favoured. Raises UserError if an episode does not end within `max_steps`, or the environment fails.
    """
    return evaluate_one(policy, env, key, episodes, greedy, max_steps).returns


def evaluate_one(
    policy: Policy, env: Env, key: PRNGKey, episodes: int, greedy: bool = True, max_steps: int = 100_000
) -> Episodes:
    """`evaluate`, with what the environment says of success."""
    returns, success = evaluate_seeds([policy], env, key[None], episodes, greedy, max_steps)
    return Episodes(returns[0], None if success is None else success[0])


def evaluate_seeds(
    policies: Sequence[Policy],
    env: Env,
    keys: PRNGKeys,
    episodes: int,
    greedy: bool = True,
    max_steps: int = 100_000,
) -> Episodes:
    """`evaluate` for S policies, with keys [S]: all is [S, episodes], of one program if the environment is JAX."""
    if not env.spec.jittable:
        pairs = zip(policies, keys, strict=True)
        each = [_on_host(policy, env, key, episodes, greedy, max_steps) for policy, key in pairs]
        said = [one.success[0] for one in each if one.success is not None]
        success = np.stack(said) if len(said) == len(each) else None
        return Episodes(np.concatenate([one.returns for one in each]), success)
    k_reset, k_act = jax.vmap(jr.split, out_axes=1)(keys)
    carry = stacked([reset(env, key) for key in k_reset])
    together, n = stacked(list(policies)), min(env.spec.episode_length or CHUNK, CHUNK)

    def advance(i: int) -> Any:
        nonlocal carry
        carry, outcome = _roll(together, env, greedy, carry, k_act, i, n)
        return outcome

    return _count(advance, env.spec.num_envs, len(policies), episodes, n, max_steps)


def _on_host(policy: Policy, env: Env, key: PRNGKey, episodes: int, greedy: bool, max_steps: int) -> Episodes:
    k_reset, k_act = jr.split(key)
    carry = reset(env, k_reset)

    def advance(i: int) -> Any:
        nonlocal carry
        carry, outcome = _advance(policy, env, greedy, carry, k_act, i)
        return [None if x is None else np.asarray(x)[None, None] for x in outcome]

    return _count(advance, env.spec.num_envs, 1, episodes, 1, max_steps)


def _count(advance: Callable[[int], Any], num_envs: int, seeds: int, episodes: int, n: int, max_steps: int) -> Episodes:
    """Episodes [S, episodes] from `advance(i)`: (reward, end, valid, success or None), [S, n, N] each, of the n steps
    from step i on."""
    quota, said = -(-episodes // num_envs), False
    running, won = np.zeros((seeds, num_envs)), np.zeros((seeds, num_envs), bool)
    finished: list[list[list[tuple[float, bool]]]] = [[[] for _ in range(num_envs)] for _ in range(seeds)]
    for i in range(0, max_steps * quota, n):
        *counted, success = advance(i)
        reward, done, valid = (np.asarray(x) for x in counted)
        said = said or success is not None
        for j in range(n):
            running += np.where(valid[:, j], reward[:, j], 0.0)
            won |= False if success is None else valid[:, j] & np.asarray(success)[:, j]
            for s, e in np.argwhere(done[:, j] & valid[:, j]):
                finished[s][e].append((float(running[s, e]), bool(won[s, e])))
                running[s, e], won[s, e] = 0.0, False
        if min(len(f) for seed in finished for f in seed) >= quota:
            # Episode by episode over the environments, so that `episodes` not a multiple of N drops late ones.
            rows = [[f[e] for e in range(quota) for f in seed][:episodes] for seed in finished]
            returns, success = (np.array([[row[k] for row in seed] for seed in rows]) for k in (0, 1))
            return Episodes(returns, success if said else None)
    raise UserError(f"no episode ended within {max_steps} steps: give the environment a time limit")


def margin(sample: np.ndarray) -> float:
    """Half the width of the 95 % interval of a mean by Student's t; its quantile is within 1 % from three numbers on.

    The expansion is 26.7.5 of Abramowitz and Stegun, about the normal quantile z.
    """
    n, z = len(sample), 1.959964
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    quantile = sum(term / (n - 1) ** k for k, term in enumerate(terms))
    return float(quantile * sample.std(ddof=1) / np.sqrt(n))
