"""The carry that every run updates, and epochs of a stage's iterations.

All environments share one loop body. For environments written in JAX, one compiled loop runs many iterations, and S
seeds at once. For host environments, Python calls the same jitted pieces, one seed at a time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from contraflow.agents.base import Agent
from contraflow.core.types import EnvSpec, Metrics, PRNGKey, PRNGKeys, Step, UserError
from contraflow.envs.base import failed
from contraflow.envs.over_noise import OverNoise
from contraflow.policy.base import Policy


class World(eqx.Module):
    """The source of a run's data: an environment, rows of recorded steps, or both. `spec` holds the policy's sizes."""

    spec: EnvSpec = eqx.field(static=True)
    env: Any = eqx.field(static=True, default=None)
    data: Any = None

    def acting(self, policy: Policy) -> tuple[Policy, EnvSpec]:
        """Returns what users evaluate and serve, and its sizes: where `policy` chooses noise, with what it steers."""
        env = self.env
        return (env.base.steered(policy), env.env.spec) if isinstance(env, OverNoise) else (policy, self.spec)


class Learner(eqx.Module):
    """Everything that training changes except the environment; a checkpoint must hold it."""

    agent: Any
    buffer: Any  # replay; None if nothing is kept
    returns: Float[Array, " N"]  # reward so far in each running episode
    steps: Int[Array, ""]  # steps taken: summed over environments, or gradient steps on recorded data
    iteration: Int[Array, ""]


class Carry(eqx.Module):
    """Has a leading axis [S] if the environment is written in JAX, and none if it runs on the host."""

    learner: Learner
    env: Any
    obs: Any


@runtime_checkable
class Stage(Protocol):
    """A kind of iteration with its settings, static under `jit`."""

    @property
    def name(self) -> str:
        """The name that the user sees: collecting, learning."""
        ...

    @property
    def learns(self) -> bool:
        """False for a warm-up."""
        ...

    def compiled(self, world: World) -> bool:
        """Returns whether a whole iteration is JAX."""
        ...

    def iterate(self, agent: Any, world: World, carry: Carry, key: PRNGKey) -> tuple[Carry, Metrics]:
        """Acts, steps and learns. `key` belongs to the whole run; metrics may hold `episodes`, `episode_return_sum`."""
        ...


@partial(jax.jit, static_argnames=("stage", "agent"), donate_argnames=("carry",))
def _loop(
    stage: Stage, agent: Agent, world: World, carry: Carry, keys: PRNGKeys, n: Int[Array, ""]
) -> tuple[Carry, Metrics]:
    """Runs n iterations of S seeds and sums their metrics; n is traced, so one program serves every interval."""

    iterate = jax.jit(lambda world, carry, key: stage.iterate(agent, world, carry, key))  # traced once for both below

    def one(carry, key):
        def body(_, state):
            carry, sums = state
            carry, metrics = iterate(world, carry, key)
            return carry, jax.tree.map(lambda s, m: s + m, sums, metrics)

        shapes = jax.eval_shape(iterate, world, carry, key)[1]
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
        return jax.lax.fori_loop(0, n, body, (carry, zeros))

    if keys.shape[0] > 1:
        return jax.vmap(one)(carry, keys)
    out = one(jax.tree.map(lambda x: x[0], carry), keys[0])
    return jax.tree.map(lambda x: x[None], out)


def epoch(
    stage: Stage,
    agent: Agent,
    world: World,
    carry: Carry,
    keys: PRNGKeys,
    n: int,
    iterated: Callable[[], bool] = lambda: False,
) -> tuple[Carry, list[dict[str, float]], UserError | None]:
    """Runs n iterations; returns the carry, mean metrics for each seed, and the error of a host environment, if any.

    `iterated` is called after each iteration, or once per compiled loop. A host loop ends early if it returns True or
    the environment fails. The carry is valid in either case.
    """
    if stage.compiled(world):
        on_host = world.env is not None and not world.env.spec.jittable
        whole = stacked([carry]) if on_host else carry
        # The host's part of the environment does not enter a compiled program.
        inside = Carry(whole.learner, None, None) if on_host else whole
        inside, sums = _loop(stage, agent, world, inside, keys, jnp.asarray(n))
        iterated()
        sums = jax.device_get(sums)
        metrics = [summarise({name: x[s] for name, x in sums.items()}, n) for s in range(keys.shape[0])]
        return Carry(of_seed(inside, 0).learner, carry.env, carry.obs) if on_host else inside, metrics, None
    history, error = [], None
    for _ in range(n):
        try:
            carry, metrics = stage.iterate(agent, world, carry, keys[0])
        except UserError as problem:
            error = problem
            break
        history.append(metrics)
        if iterated():
            break
    sums = jax.tree.map(lambda *m: np.sum(np.stack(m), axis=0), *jax.device_get(history)) if history else {}
    return carry, [summarise(sums, len(history))], error


def summarise(sums: dict[str, Any], n: int) -> dict[str, float]:
    """Returns means over n iterations; `return` is the mean over the episodes that ended in them, if any did."""
    sums = {name: float(value) for name, value in sums.items()}
    episodes, total = sums.pop("episodes", None), sums.pop("episode_return_sum", 0.0)
    means = {name: value / n for name, value in sums.items()}
    if episodes is not None:
        means["episodes"] = episodes
    return means | ({"return": total / episodes} if episodes else {})


@jax.jit
def of_seed(tree: Any, s: Any) -> Any:
    """Returns the part of seed number s in a stacked tree; for several numbers, a smaller stack."""
    return jax.tree.map(lambda x: x[s], tree)


@jax.jit
def stacked(trees: list[Any]) -> Any:
    """Stacks trees along a new leading axis [S]."""
    one = len(trees) == 1
    return jax.tree.map(lambda *x: x[0][None] if one else jnp.stack(x), *trees)


def reset(env: Any, key: PRNGKey) -> tuple[Any, Any]:
    """Calls `env.reset` and turns its errors into a UserError."""
    return _called(env, env.reset, key)


def step(env: Any, state: Any, action: Any) -> tuple[Any, Step]:
    """Calls `env.step` and turns its errors into a UserError."""
    return _called(env, env.step, state, action)


def shown(after: Step) -> Any:
    """Returns the rewards [N] that returns are summed from."""
    return after.reward if after.undiscounted is None else after.undiscounted


def _called(env: Any, method: Callable[..., Any], *args: Any) -> Any:
    try:
        return method(*args)
    except UserError:
        raise
    except Exception as error:  # from an environment without an adapter, or during tracing
        raise failed(getattr(env, "name", type(env).__name__), method.__name__, error) from error


def next_due(run: Any, taken: int) -> int:
    """Returns the step of the next evaluation, row of metrics, or end of a run."""
    return min(run.steps, *((taken // every + 1) * every for every in (run.eval_every, run.log_every)))
