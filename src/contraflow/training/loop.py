"""What every run shares: the carry, and epochs of a stage's iterations.

One body for every environment. What is written in JAX runs many iterations in one compiled loop, for S seeds at once;
a host environment runs the same jitted pieces with Python between them, one seed at a time.
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


class World(eqx.Module):
    """What a run learns in: an environment, rows of recorded steps, or both. `spec` holds the sizes of the policy."""

    spec: EnvSpec = eqx.field(static=True)
    env: Any = eqx.field(static=True, default=None)
    data: Any = None


class Learner(eqx.Module):
    """Everything that training changes, but for the environment: what a checkpoint must hold."""

    agent: Any
    buffer: Any  # replay, None where nothing is kept
    returns: Float[Array, " N"]  # reward so far in each running episode
    steps: Int[Array, ""]  # steps taken: of all environments together, or gradient steps on recorded data
    iteration: Int[Array, ""]


class Carry(eqx.Module):
    """With a leading axis [S] in a run whose environment is written in JAX, without on the host."""

    learner: Learner
    env: Any
    obs: Any


@runtime_checkable
class Stage(Protocol):
    """A kind of iteration and its settings, static under `jit`."""

    @property
    def name(self) -> str:
        """What the user sees: collecting, learning."""
        ...

    @property
    def learns(self) -> bool:
        """False for a warm-up."""
        ...

    def compiled(self, world: World) -> bool:
        """Whether all of an iteration is JAX."""
        ...

    def iterate(self, agent: Any, world: World, carry: Carry, key: PRNGKey) -> tuple[Carry, Metrics]:
        """Act, step, learn. `key` is that of the whole run; metrics may hold `episodes` and `episode_return_sum`."""
        ...


@partial(jax.jit, static_argnames=("stage", "agent"), donate_argnames=("carry",))
def _loop(
    stage: Stage, agent: Agent, world: World, carry: Carry, keys: PRNGKeys, n: Int[Array, ""]
) -> tuple[Carry, Metrics]:
    """n iterations of S seeds and the sums of their metrics; n is traced, so that one program serves every interval."""

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
    """n iterations, the means of their metrics for each seed, and what a host environment complained of, if it did.

    Whenever something is done `iterated` is told; a host loop ends early once it returns True, or when the environment
    fails. The carry is good in either case.
    """
    if stage.compiled(world):
        on_host = world.env is not None and not world.env.spec.jittable
        whole = stacked([carry]) if on_host else carry
        # What the host keeps of its environment does not enter a compiled program.
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
    """Means over n iterations; `return` is the mean over the episodes that ended in them, if any did."""
    sums = {name: float(value) for name, value in sums.items()}
    episodes, total = sums.pop("episodes", None), sums.pop("episode_return_sum", 0.0)
    means = {name: value / n for name, value in sums.items()}
    if episodes is not None:
        means["episodes"] = episodes
    return means | ({"return": total / episodes} if episodes else {})


@jax.jit
def of_seed(tree: Any, s: Any) -> Any:
    """What seed number s of a stacked tree has; for several numbers, a smaller stack."""
    return jax.tree.map(lambda x: x[s], tree)


@jax.jit
def stacked(trees: list[Any]) -> Any:
    """With a leading axis [S]."""
    one = len(trees) == 1
    return jax.tree.map(lambda *x: x[0][None] if one else jnp.stack(x), *trees)


def reset(env: Any, key: PRNGKey) -> tuple[Any, Any]:
    """`env.reset`, with what it raises as a UserError."""
    return _called(env, env.reset, key)


def step(env: Any, state: Any, action: Any) -> tuple[Any, Step]:
    """`env.step`, with what it raises as a UserError."""
    return _called(env, env.step, state, action)


def shown(after: Step) -> Any:
    """The rewards that returns are made of, [N]."""
    return after.reward if after.undiscounted is None else after.undiscounted


def _called(env: Any, method: Callable[..., Any], *args: Any) -> Any:
    try:
        return method(*args)
    except UserError:
        raise
    except Exception as error:  # of an environment without an adapter, or while it is traced
        raise failed(getattr(env, "name", type(env).__name__), method.__name__, error) from error


def next_due(run: Any, taken: int) -> int:
    """The step at which the next evaluation or row of metrics of a run is due, or its end."""
    return min(run.steps, *((taken // every + 1) * every for every in (run.eval_every, run.log_every)))
