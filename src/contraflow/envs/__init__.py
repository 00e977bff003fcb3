"""Environments: `make(id, num_envs, seed)` builds one, `check(id)` only looks it up, `available()` lists the ids,
`jittable(id)` says whether one is written in JAX.

The simulators are optional packages; each is imported when an environment of its kind is made, not before.
"""

import contextlib
import importlib
from collections.abc import Callable

from contraflow.core.types import UserError
from contraflow.envs.bandit import BANDITS, Bandit
from contraflow.envs.base import Env, check_num_envs, unknown_id
from contraflow.envs.control import CONTROL
from contraflow.envs.probe import PROBES

PREFIXES = ("envpool", "gym", "playground", "jax", "probe", "bandit")


def make(id: str, num_envs: int = 1, seed: int = 0, *, trust: bool = False, render: bool = False) -> Env:
    """N parallel copies of the environment called `id`.

    - `envpool:CheetahRun-v1`, `gym:HalfCheetah-v5` (or without `gym:`), `playground:CheetahRun`, `jax:pendulum`,
      `probe:two-step`, `bandit:linear/8` (8 dimensions; 2 unless said).
    - `package.module:Class` imports the user's own class and calls it with num_envs and seed, when `trust` is True.
    - `render` makes `frame()` return pictures of copy 0, for `envpool:` and `gym:`.

    Raises UserError, naming the remedy, for an unknown id, a missing package, an untrusted module, or an environment
    that does not fit.
    """
    prefix, colon, rest = id.partition(":")
    if not colon:
        prefix, rest = "gym", id
    foreign = prefix not in PREFIXES or (prefix == "gym" and ":" in rest)
    if foreign and not trust:
        raise UserError(f"environment {id} would run code of the module before the colon; pass --trust if you trust it")
    if not rest:
        raise unknown_id(id)
    check_num_envs(id, num_envs)
    if render and prefix not in ("envpool", "gym"):
        raise UserError(f"environment {id} cannot be rendered; leave out the video, or use envpool: or gym:")

    if prefix == "envpool":
        from contraflow.envs.envpool import EnvPool

        return EnvPool(rest, num_envs, seed, render=render)
    if prefix == "gym":
        from contraflow.envs.gymnasium import Gymnasium

        return Gymnasium(rest, num_envs, seed, render=render)
    if prefix == "playground":
        from contraflow.envs.playground import Playground

        return Playground(rest, num_envs)
    if prefix == "jax" and rest in CONTROL:
        return CONTROL[rest](num_envs)
    if prefix == "probe" and rest in PROBES:
        return PROBES[rest](num_envs)
    if prefix == "bandit":
        name, _, dim = rest.partition("/")
        if name in BANDITS and (dim == "" or (dim.isdecimal() and int(dim) > 0)):
            return Bandit(BANDITS[name](), int(dim or 2), num_envs)
    if not foreign:
        raise unknown_id(id)
    return _load(id)(num_envs=num_envs, seed=seed)


def check(id: str, *, trust: bool = False) -> None:
    """Refuse an id that `make` would not know, and a missing package, without building a simulator.

    Code of the user's own is imported, not called. Raises UserError as `make` does, but for what only building shows.
    """
    prefix, colon, rest = id.partition(":")
    if not colon:
        prefix, rest = "gym", id
    if prefix == "envpool" and rest:
        from contraflow.envs.envpool import check_id

        check_id(rest)
    elif prefix == "gym" and rest and ":" not in rest:
        from contraflow.envs.gymnasium import check_id

        check_id(rest)
    elif prefix == "playground" and rest:
        from contraflow.envs.playground import check_id

        check_id(rest)
    elif prefix not in PREFIXES and trust:
        _load(id)
    else:  # nothing heavy is behind these: building one is the check
        make(id, trust=trust)


def jittable(id: str, *, trust: bool = False) -> bool:
    """Whether the environment is written in JAX. No simulator (`envpool:`, `gym:`, `playground:`) is built to tell.

    Code of the user's own is built: nothing else says it. Raises as `make` does.
    """
    prefix, colon, _ = id.partition(":")
    if not colon or prefix in ("envpool", "gym"):
        return False
    if prefix == "playground":
        check(id)
        return True
    env = make(id, trust=trust)
    getattr(env, "close", lambda: None)()
    return env.spec.jittable


def available() -> dict[str, list[str]]:
    """Ids of continuous-control environments by prefix; empty lists where the package is not installed.

    Gymnasium, EnvPool and Playground make more than is listed; nothing is built to draw up the list.
    """
    from contraflow.envs import playground

    own = {"jax": list(CONTROL), "probe": list(PROBES), "bandit": list(BANDITS)}
    return {"envpool": _envpool_ids(), "gym": _gym_ids(), "playground": playground.available()} | own


def _envpool_ids() -> list[str]:
    try:
        import envpool
        from envpool.registration import registry
    except ImportError:
        return []
    ids = []
    for id in envpool.list_all_envs():
        family = registry.specs[id][0].removeprefix("envpool.mujoco.")
        if (
            family in ("dmc", "metaworld")
            or (family == "gym" and id.endswith("-v5"))
            or (family == "playground" and "/" not in id)  # each is registered twice, once with a namespace
            or (family == "robotics" and id.startswith(("AdroitHand", "FrankaKitchen")))
        ):
            ids.append(id)
    return sorted(ids)


def _gym_ids() -> list[str]:
    try:
        import gymnasium
    except ImportError:
        return []
    from contraflow.envs.gymnasium import register_shimmy

    with contextlib.suppress(ImportError):
        register_shimmy()
    suite = {id for id in gymnasium.registry if id.startswith("dm_control/") and id[11].islower()}
    small = {"Pendulum-v1", "MountainCarContinuous-v0"}
    mujoco = {id for id, spec in gymnasium.registry.items() if "mujoco" in str(spec.entry_point) and id.endswith("-v5")}
    return sorted(small | mujoco | suite - {"dm_control/compatibility-env-v0"})


def _load(id: str) -> Callable[..., Env]:
    """The class (or function) behind `package.module:Class`."""
    module, _, name = id.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"environment {id} cannot be loaded ({error}); give it as package.module:Class") from error


__all__ = ["Env", "available", "check", "jittable", "make"]
