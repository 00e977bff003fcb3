"""Environments: `make(id, num_envs, seed)` builds one, `check(id)` only looks it up, `available()` lists the ids,
`jittable(id)` says whether one is written in JAX, `close(env)` releases what it holds, `notes(env)` is what to tell.

The simulators are optional packages; each is imported when an environment of its kind is made, not before.
"""

from functools import partial
from typing import NamedTuple

from contraflow.core.trust import Trust, admit
from contraflow.envs import align, bandit, envpool, episodes, gymnasium, ogbench, own, playground, probe
from contraflow.envs.base import Env, Kind, check_num_envs, close, not_rendered, notes, unknown_id
from contraflow.envs.control import CartpoleSwingup, Pendulum
from contraflow.envs.ways import MultiGoal, TwoWayArm

TASKS = {
    "pendulum": (Pendulum, 1.2), "cartpole-swingup": (CartpoleSwingup, 2.0),
    "cartpole-swingup-sparse": (partial(CartpoleSwingup, sparse=True), 2.0),
    "multi-goal": (MultiGoal, 1.4), "two-way-arm": (TwoWayArm, 1.1),
}  # fmt: skip
"""Tasks in JAX, and half the side, in metres, of what a picture of each shows."""
KINDS: dict[str, Kind] = {
    "envpool": envpool.KIND,
    "gym": gymnasium.KIND,
    "playground": playground.KIND,
    "ogbench": ogbench.KIND,
    "jax": episodes.kind("jax", TASKS),
    "probe": probe.KIND,
    "bandit": bandit.KIND,
    "align": align.KIND,
}


class Id(NamedTuple):
    """An id taken apart: `gym:Pendulum-v1`, `Pendulum-v1` (the same), `probe:obs`, `package.module:Class`."""

    kind: Kind
    name: str


def parse(id: str, trust: Trust = "") -> Id:
    """Raises UserError for an empty name, and for a module outside the library that `trust` does not name."""
    prefix, colon, name = id.partition(":")
    if not colon:
        prefix, name = "gym", id
    foreign = prefix not in KINDS
    if foreign or (prefix == "gym" and ":" in name):
        admit(id if foreign else name, trust)
    if not name:
        raise unknown_id(id)
    return Id(own.KIND, id) if foreign else Id(KINDS[prefix], name)


def make(id: str, num_envs: int = 1, seed: int = 0, *, trust: Trust = "", render: bool = False) -> Env:
    """N parallel copies of the environment called `id`.

    - `envpool:CheetahRun-v1`, `gym:HalfCheetah-v5` (or without `gym:`), `playground:CheetahRun`,
      `ogbench:cube-single-play-singletask-task1-v0`, `jax:multi-goal`, `probe:two-step`, `bandit:linear/8` (8
      dimensions; 2 unless said).
    - `package.module:Class` imports the user's own class, if `trust` names it: a Gymnasium environment, or a class that
      is called with num_envs and seed.
    - `render` makes `frame()` return pictures of copy 0, for `envpool:`, `gym:`, `ogbench:`, `jax:` and Gymnasium
      classes.

    Raises UserError, naming the remedy, for an unknown id, a missing package, an untrusted module, or an environment
    that does not fit.
    """
    kind, name = parse(id, trust)
    check_num_envs(id, num_envs)
    if render and not kind.renders:
        raise not_rendered(id)
    return kind.make(name, num_envs, seed, render)


def copies(id: str, episodes: int, trust: Trust = "") -> int:
    """How many copies evaluate `episodes` episodes: one for each, or fewer where copies are large."""
    return min(episodes, parse(id, trust).kind.most or episodes)


def check(id: str, *, trust: Trust = "") -> None:
    """Refuse an id that `make` would not know, and a missing package, without building a simulator.

    Code of the user's own is imported, not called. Raises UserError as `make` does, but for what only building shows.
    """
    kind, name = parse(id, trust)
    kind.check(name)


def jittable(id: str, *, trust: Trust = "") -> bool:
    """Whether the environment is written in JAX. No simulator (`envpool:`, `gym:`, `playground:`) is built to tell.

    Code of the user's own is built: nothing else says it. Raises as `make` does.
    """
    kind, name = parse(id, trust)
    if kind.jittable:
        kind.check(name)
    if kind.jittable is not None:
        return kind.jittable
    env = kind.make(name, 1, 0, False)
    close(env)
    return env.spec.jittable


def available() -> dict[str, list[str]]:
    """Ids of continuous-control environments by prefix; empty lists where the package is not installed.

    Gymnasium, EnvPool and Playground make more than is listed; nothing is built to draw up the list.
    """
    return {prefix: kind.available() for prefix, kind in KINDS.items()}


__all__ = ["Env", "available", "check", "close", "copies", "jittable", "make", "notes"]
