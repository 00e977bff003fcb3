"""Environments of the user's own, `package.module:Class`: imported, called, and held to what `Env` promises.

A class of Gymnasium's kind is taken as it is; anything else is called with `num_envs` and `seed` and returns an `Env`.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from contraflow.core.types import EnvSpec, PRNGKey, Step, UserError
from contraflow.envs import base
from contraflow.envs.envpool import EnvPool
from contraflow.envs.gymnasium import Gymnasium


class Checked:
    """A host environment that is not one of our adapters, with their checks: what it raises or returns against its
    spec becomes a UserError. Raises one for another number of copies than `num_envs`."""

    def __init__(self, name: str, env: Any, num_envs: int):
        self.name, self.env, self.holds = name, env, getattr(env, "holds", False)
        self.notes = base.notes(env)
        _check_copies(name, env.spec, num_envs)

    @property
    def spec(self) -> EnvSpec:
        return self.env.spec

    @base.reports
    def reset(self, key: PRNGKey) -> tuple[Any, Any]:
        """As the environment's own."""
        state, obs = self.env.reset(key)
        base.check_obs(self.name, self.spec, obs)
        return state, obs

    @base.reports
    def step(self, state: Any, action: Any, active: np.ndarray | None = None) -> tuple[Any, Step]:
        """As the environment's own; `active` where it `holds`."""
        state, step = self.env.step(state, action) if active is None else self.env.step(state, action, active)
        return state, base.checked(self.name, self.spec, step)

    def close(self) -> None:
        base.close(self.env)


def check(id: str) -> Callable[..., Any]:
    """The class (or function) behind `package.module:Class`; the module is imported."""
    module, _, name = id.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the module does when it is imported
        text = " ".join(str(error).split())
        raise UserError(f"environment {id} cannot be loaded ({text}); give it as package.module:Class") from error


def make(id: str, num_envs: int, seed: int, render: bool) -> Any:
    """What the class makes of `num_envs` and `seed`. One in JAX is traced once, to see that its shapes are right."""
    create = check(id)
    if _of_gymnasium(create):
        return Gymnasium(partial(create, render_mode="rgb_array") if render else create, num_envs, seed)
    if render:
        raise base.not_rendered(id)
    try:
        env = create(num_envs=num_envs, seed=seed)
        if isinstance(env, EnvPool | Gymnasium):
            return env
        if not env.spec.jittable:
            return Checked(id, env, num_envs)
        _check_copies(id, env.spec, num_envs)
        state, obs = jax.eval_shape(env.reset, jax.random.key(0))
        action = jax.ShapeDtypeStruct((num_envs, env.spec.action_dim), np.float32)
        _, step = jax.eval_shape(env.step, state, action)
    except UserError:
        raise
    except Exception as error:
        raise base.failed(id, "init", error) from error
    base.check_shapes(id, env.spec, replace(step, obs=obs))  # those of the reset
    base.check_shapes(id, env.spec, step)
    return env


def _of_gymnasium(create: Any) -> bool:
    """Whether it is a class of single environments; its module has then imported Gymnasium."""
    kind = getattr(sys.modules.get("gymnasium"), "Env", None)
    return kind is not None and isinstance(create, type) and issubclass(create, kind)


def _check_copies(name: str, spec: EnvSpec, num_envs: int) -> None:
    if spec.num_envs != num_envs:
        raise UserError(
            f"environment {name} holds {spec.num_envs} copies, not {num_envs}; let it make num_envs of them"
        )


KIND = base.Kind(make, check, list, jittable=None, renders=True)
