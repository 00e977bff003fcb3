"""Rolling out a policy and recording its episodes as a dataset."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.random as jr
import numpy as np

from contraflow.core.bounds import action_range, check_fit
from contraflow.core.trust import Trust
from contraflow.core.types import Step, UserError
from contraflow.data.datasets.dataset import Dataset, build
from contraflow.envs import close, make
from contraflow.envs.base import Env
from contraflow.runtime.policy import Policy
from contraflow.runtime.receding import Receding

COPIES = 16  # environments stepped together
Rows = dict[str, Any]  # arrays, or dicts of arrays for observations


@dataclass(frozen=True)
class Behaviour:
    """How recorded actions differ from those of evaluation.

    `explore` uses the policy's exploration as in training. `noise` is the standard deviation of Gaussian noise added to
    its actions. A `random` share of the steps then takes a uniform action instead. Raises ValueError for negative noise
    or a share outside [0, 1].
    """

    explore: bool = False
    noise: float = 0.0
    random: float = 0.0

    def __post_init__(self):
        if not (0 <= self.noise < np.inf and 0 <= self.random <= 1):
            raise ValueError(
                f"noise must not be negative and random must lie in [0, 1], got {self.noise}, {self.random}"
            )


def record(
    policy: Policy,
    episodes: int,
    env: str | None = None,
    *,
    camera: str | None = None,
    behaviour: Behaviour = Behaviour(),
    seed: int = 0,
    trust: Trust = "",
    max_steps: int = 100_000,
) -> Dataset:
    """Records whole episodes in the policy's environment or in `env`, with the actions that the environment received.

    Each copy of the environment contributes the same number of episodes, so short episodes are not favoured. Chunks of
    actions are recorded action by action.

    `camera` is an environment that plays the same episodes and observes them otherwise: the policy acts on what the
    first one observes, and what the second one does is recorded. Both are reset with the same key and get the same
    actions, and their rewards and ends are compared at every step.

    Raises UserError when sizes, ranges or the episodes of the two differ, or no episode ends within `max_steps`.
    """
    id, copies = env or policy.env, min(episodes, COPIES)
    worlds: list[Env] = []
    try:
        worlds.append(make(id, copies, seed, trust=trust))
        check_fit(policy.spec, worlds[0].spec, "the policy", id, policy.env)
        if camera:
            worlds.append(make(camera, copies, seed, trust=trust))
            seen = {key: getattr(worlds[1].spec, key) for key in ("obs_dim", "obs_keys", "obs_parts")}
            check_fit(replace(policy.spec, **seen), worlds[1].spec, "the policy", camera, id)
        columns = _roll(policy, worlds, episodes, behaviour, seed, max_steps)
        low, high = (bound.astype(np.float32) for bound in action_range(worlds[0].spec))
    finally:
        for world in worlds:
            close(world)
    seen = camera or id
    return replace(build(columns, name=seen, env=seen, low=-1.0, high=1.0), low=low, high=high)


def _roll(policy: Policy, worlds: list[Env], episodes: int, behaviour: Behaviour, seed: int, max_steps: int) -> Rows:
    """Returns flat columns of the episodes that started first: the k-th of every copy before the k+1-st of any.

    The policy sees the first environment; observations are those of the last.
    """
    copies = worlds[0].spec.num_envs
    quota, done = -(-episodes // copies), np.zeros(copies, int)
    advance = [jax.jit(world.step) if world.spec.jittable else world.step for world in worlds]
    act = _Actor(policy, behaviour, copies, seed)
    states, obs = zip(*[world.reset(jr.split(jr.key(seed))[0]) for world in worlds], strict=True)
    steps: list[Rows] = []
    while done.min() < quota:
        if len(steps) == max_steps * quota:
            raise UserError(f"no episode ended within {max_steps} steps: give the environment a time limit")
        action = act(obs[0])
        states, outs = zip(*[step(state, action) for step, state in zip(advance, states, strict=True)], strict=True)
        out = outs[-1]
        if len(outs) > 1 and not _same(outs[0], out):
            raise UserError(
                f"the camera saw another episode, from step {len(steps)} on: --camera takes an environment that does "
                "the same from the same seed and actions, and only observes otherwise"
            )
        row = {"obs": obs[-1], "action": action, "reward": out.reward, "next_obs": out.next_obs}
        row |= {"terminated": out.terminated, "truncated": out.truncated, "valid": out.valid}
        steps.append(jax.tree.map(np.array, row))  # copies, because an adapter may reuse its arrays
        ended = steps[-1]["valid"] & (steps[-1]["terminated"] | steps[-1]["truncated"])
        done += ended
        act.reset(ended | ~steps[-1]["valid"])
        obs = tuple(out.obs for out in outs)
    table = jax.tree.map(lambda *x: np.stack(x), *steps)
    return _first(table, episodes, quota)


def _same(one: Step, other: Step) -> bool:
    """Whether two steps have the same ends and, to rounding, the same rewards."""
    ends = all(np.array_equal(getattr(one, key), getattr(other, key)) for key in ("terminated", "truncated", "valid"))
    return ends and np.allclose(one.reward, other.reward, rtol=1e-3, atol=1e-3)


def _first(table: Rows, episodes: int, quota: int) -> Rows:
    """Flattens [T, N] tables to columns, without dummy steps and surplus episodes."""
    end = table["valid"] & (table["terminated"] | table["truncated"])
    spans: list[list[np.ndarray]] = []
    for e in range(end.shape[1]):
        rows, ends = np.flatnonzero(table["valid"][:, e]), np.flatnonzero(end[:, e])
        spans.append(np.split(rows, np.searchsorted(rows, ends[:quota]) + 1)[:quota])
    chosen = [(spans[e][k], e) for k in range(quota) for e in range(len(spans))][:episodes]
    t = np.concatenate([rows for rows, _ in chosen])
    e = np.concatenate([np.full(len(rows), e) for rows, e in chosen])
    return jax.tree.map(lambda x: x[t, e], table) | {"end": end[t, e]}


class _Actor:
    """Computes the actions [N, a] of one step as the environment receives them."""

    def __init__(self, policy: Policy, behaviour: Behaviour, copies: int, seed: int):
        fresh = Policy(policy.network, policy.spec, policy.env, seed)  # counts its observations from 0
        self._plans, self._behaviour, self._rng = Receding(fresh, copies), behaviour, np.random.default_rng(seed)

    def __call__(self, obs: Any) -> np.ndarray:
        rng, noise = self._rng, self._behaviour.noise
        action = self._plans(obs, self._behaviour.explore)
        action = action + noise * rng.standard_normal(action.shape)
        guess = rng.random(len(action)) < self._behaviour.random
        action = np.where(guess[:, None], rng.uniform(-1, 1, action.shape), action)
        return np.clip(action, -1, 1).astype(np.float32)

    def reset(self, copies: np.ndarray) -> None:
        """Starts another episode in these copies."""
        self._plans.reset(copies)
