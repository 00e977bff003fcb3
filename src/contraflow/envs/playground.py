"""MuJoCo Playground in JAX (`impl="jax"`, on any device), so that training is one compiled program.

The control suite runs as installed. Robots need models that Playground fetches with git when it first builds one; that
download is left to the user.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int

from contraflow.core.types import EnvSpec, PRNGKey, PRNGKeys, Step, UserError
from contraflow.envs import base

SUITE = (
    "AcrobotSwingup", "AcrobotSwingupSparse", "BallInCup", "CartpoleBalance", "CartpoleBalanceSparse",
    "CartpoleSwingup", "CartpoleSwingupSparse", "CheetahRun", "FingerSpin", "FingerTurnEasy", "FingerTurnHard",
    "FishSwim", "HopperHop", "HopperStand", "HumanoidRun", "HumanoidStand", "HumanoidWalk", "PendulumSwingup",
    "PointMass", "ReacherEasy", "ReacherHard", "SwimmerSwimmer6", "WalkerRun", "WalkerStand", "WalkerWalk",
)  # fmt: skip
"""The tasks of dm_control, listed here because importing Playground to list them takes seconds."""


def available() -> list[str]:
    """Returns the ids of the control suite without importing Playground; [] if it is not installed."""
    return list(SUITE) if find_spec("mujoco_playground") else []


def check_id(id: str) -> None:
    """Raises UserError when Playground is missing, does not know the id, or lacks the models of its robot."""
    if not find_spec("mujoco_playground"):
        raise UserError(f'environment playground:{id} needs Playground: pip install "contraflow[playground]"')
    if id in SUITE:
        return
    package: Any = _package()
    if id not in package.registry.ALL_ENVS:
        raise base.unknown_id(f"playground:{id}")
    own = id in package.dm_control_suite.ALL_ENVS  # registered there by the user
    if not own and not (Path(package.__file__).parent / "external_deps/mujoco_menagerie").exists():
        load = f"from mujoco_playground import registry; registry.load('{id}')"
        raise UserError(f'environment playground:{id} needs robot models; fetch them once with: python -c "{load}"')


def _package() -> Any:
    with base.quiet():
        return import_module("mujoco_playground")


class PlaygroundState(eqx.Module):
    """State of the copies between steps; each key draws the first states of its copy's coming episodes."""

    sim: Any  # Playground's State, every leaf with a leading [N]
    age: Int[Array, " N"]  # steps since the episode began
    key: PRNGKeys


@dataclass(frozen=True)
class Playground:
    """N copies of the Playground task `id`.

    - Actions are clipped to [-1, 1], the range of every actuator of the control suite and the convention of the robots.
    - Observations are Playground's own. If they are dicts, the entry `state` is used, which a real robot would observe.
    - `truncated` marks the time limit, `episode_length` of the task's config in its control steps. `action_repeat`, 1
      in all but two robot tasks, is not applied. `terminated` is the task's `done`; both are True when they coincide.
    - An ended copy restarts within the step from a newly drawn state. Playground's wrapper would return to the first
      state of the copy and discard the last observation.
    - A compiled program cannot raise errors for numbers that are not finite. Where physics produces them the copy
      terminates (as in Playground's own tasks) with reward 0, and `next_obs` is the previous observation.

    Raises UserError when Playground is missing, or the id is unknown, cannot be built, or has no flat observation.
    """

    id: str
    num_envs: int = 1

    def __post_init__(self) -> None:
        base.check_num_envs(f"playground:{self.id}", self.num_envs)
        _load(self.id)

    @property
    def spec(self) -> EnvSpec:
        return replace(_load(self.id)[1], num_envs=self.num_envs)

    @partial(jax.jit, static_argnums=0)
    def reset(self, key: PRNGKey) -> tuple[PlaygroundState, Float[Array, "N o"]]:
        """Starts N episodes; all randomness comes from the key."""
        keys = jr.split(key, (2, self.num_envs))
        sim = jax.vmap(partial(_start, _load(self.id)[0]))(keys[0])
        return PlaygroundState(sim, jnp.zeros(self.num_envs, jnp.int32), keys[1]), _flat(sim.obs)

    @partial(jax.jit, static_argnums=0)
    def step(self, state: PlaygroundState, action: Float[Array, "N a"]) -> tuple[PlaygroundState, Step]:
        """Advances all copies; an ended copy restarts within the step."""
        env, one = _load(self.id)
        moved = jax.vmap(env.step)(state.sim, jnp.clip(action, -1.0, 1.0))
        sound = jnp.isfinite(_flat(moved.obs)).all(1) & jnp.isfinite(moved.reward)
        next_obs = jnp.where(sound[:, None], _flat(moved.obs), _flat(state.sim.obs))
        reward = jnp.where(sound, moved.reward, 0.0)
        terminated, truncated = (moved.done > 0.5) | ~sound, state.age + 1 >= jnp.asarray(one.episode_length)
        done = terminated | truncated
        sim, key = jax.vmap(partial(_renew, env))(moved, state.key, done)
        step = Step(_flat(sim.obs), next_obs, reward, terminated, truncated, jnp.ones(self.num_envs, bool))
        return PlaygroundState(sim, jnp.where(done, 0, state.age + 1), key), step


def _start(env: Any, key: PRNGKey) -> Any:
    """Starts an episode of one copy."""
    return env.reset(jr.key_data(key))  # Playground takes keys of the old kind


def _renew(env: Any, sim: Any, key: PRNGKey, done: Bool[Array, ""]) -> tuple[Any, PRNGKey]:
    """Returns a fresh episode for one copy if it is done, and the key for the next.

    It is a loop of at most one iteration. Under `vmap`, over copies and over seeds, the loop runs only if any copy is
    done. A `cond` would become a select and pay for a reset in every step (measured: docs/background/benchmarks.md).
    """

    def renew(carry: tuple[Any, PRNGKey, Any]) -> tuple[Any, PRNGKey, Any]:
        k_now, k_later = jr.split(carry[1])
        return _start(env, k_now), k_later, jnp.zeros((), bool)

    return jax.lax.while_loop(lambda carry: carry[2], renew, (sim, key, done))[:2]


def _flat(obs: Any) -> Any:
    return obs["state"] if isinstance(obs, Mapping) else obs


@cache
def _load(id: str) -> tuple[Any, EnvSpec]:
    """Returns Playground's environment, built once per process, and the spec of one copy of it."""
    check_id(id)
    registry = _package().registry
    try:
        env = registry.load(id, config_overrides={"impl": "jax"})
        obs = jax.eval_shape(env.reset, jr.key_data(jr.key(0))).obs
    except Exception as error:
        reason = f"cannot be built ({str(error).partition(chr(10))[0]}); try another version of it or of mujoco"
        raise UserError(f"environment playground:{id} {reason}") from error
    flat = obs.get("state") if isinstance(obs, Mapping) else obs
    if flat is None or len(flat.shape) != 1:
        raise UserError(f"environment playground:{id} has no flat observation or entry `state`; use another task")
    length = int(registry.get_default_config(id).episode_length)
    return env, EnvSpec(flat.shape[0], env.action_size, 1, length, jittable=True)


KIND = base.Kind(lambda name, num_envs, seed, render: Playground(name, num_envs), check_id, available, jittable=True)
