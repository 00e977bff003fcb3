"""What every training loop shares: the carry, and epochs of a phase's iterations.

One body for every environment. A jittable environment runs many iterations in one compiled scan; a host environment
runs the same jitted pieces with Python between them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Float, Int

from contraflow.agents.base import Agent
from contraflow.core.types import Metrics, PRNGKey, PRNGKeys, UserError
from contraflow.envs.base import Env


class Learner(eqx.Module):
    """Everything that training changes, but for the environment: what a checkpoint must hold."""

    agent: Any
    buffer: Any  # replay of the off-policy loop, None elsewhere
    returns: Float[Array, " N"]  # reward so far in each running episode
    steps: Int[Array, ""]  # environment steps taken, summed over environments
    iteration: Int[Array, ""]


class Carry(eqx.Module):
    learner: Learner
    env: Any
    obs: Any


@runtime_checkable
class Phase(Protocol):
    """A kind of iteration and its settings, static under `jit`."""

    @property
    def learns(self) -> bool:
        """False for a warm-up."""
        ...

    def iterate(self, agent: Any, env: Any, carry: Carry, key: PRNGKey) -> tuple[Carry, Metrics]:
        """Act, step, learn. `key` is that of the whole run; metrics hold `episodes` and `episode_return_sum`."""
        ...


@partial(jax.jit, static_argnames=("phase", "agent", "env", "n"), donate_argnames=("carry",))
def _scan(phase: Phase, agent: Agent, env: Env, carry: Carry, key: PRNGKey, n: int) -> tuple[Carry, Metrics]:
    return jax.lax.scan(lambda c, _: phase.iterate(agent, env, c, key), carry, None, length=n)


@partial(jax.jit, static_argnames=("phase", "agent", "env", "n"), donate_argnames=("carry",))
def _scan_seeds(phase: Phase, agent: Agent, env: Env, carry: Carry, keys: PRNGKeys, n: int) -> tuple[Carry, Metrics]:
    return jax.vmap(lambda c, k: _scan(phase, agent, env, c, k, n))(carry, keys)


def epoch_seeds(
    phase: Phase, agent: Agent, env: Env, carry: Carry, keys: PRNGKeys, n: int
) -> tuple[Carry, list[dict[str, float]]]:
    """`epoch` of a jittable environment for S seeds in one program: `carry` with a leading [S], `keys` [S]."""
    carry, stacked = _scan_seeds(phase, agent, env, carry, keys, n)
    metrics = jax.device_get(stacked)
    return carry, [summarise({name: x[s] for name, x in metrics.items()}) for s in range(keys.shape[0])]


def epoch(
    phase: Phase,
    agent: Agent,
    env: Any,
    carry: Carry,
    key: PRNGKey,
    n: int,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Carry, dict[str, float], UserError | None]:
    """n iterations, the means of their metrics, and what a host environment complained of, if it did.

    A host loop ends early once `stop()` is true or the environment fails; the carry is good in either case.
    """
    if env.spec.jittable:
        carry, metrics = _scan(phase, agent, env, carry, key, n)
        return carry, summarise(jax.device_get(metrics)), None
    history, error = [], None
    for _ in range(n):
        try:
            carry, metrics = phase.iterate(agent, env, carry, key)
        except UserError as problem:
            error = problem
            break
        history.append(metrics)
        if stop():
            break
    stacked = jax.tree.map(lambda *m: np.stack(m), *jax.device_get(history)) if history else None
    return carry, summarise(stacked) if stacked else {}, error


def summarise(metrics: dict[str, np.ndarray]) -> dict[str, float]:
    """Means over the iterations of an epoch; `return` is the mean over the episodes that ended in it, if any did."""
    episodes, total = metrics.pop("episodes").sum(), metrics.pop("episode_return_sum").sum()
    means = {name: float(np.mean(value)) for name, value in metrics.items()}
    return means | {"episodes": float(episodes)} | ({"return": float(total / episodes)} if episodes else {})


def next_due(run: Any, taken: int) -> int:
    """The step at which the next evaluation or row of metrics of a run is due."""
    return min((taken // every + 1) * every for every in (run.eval_every, run.log_every))


def check_counts(run: Any, *names: str) -> None:
    """Refuse settings of a run that must be at least 1, or a negative seed."""
    for name in names:
        if getattr(run, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(run, name)}")
    if run.seed < 0:
        raise ValueError(f"seed must not be negative, got {run.seed}")
