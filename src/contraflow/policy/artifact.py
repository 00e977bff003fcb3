"""Policies as files to share: safetensors for the arrays, JSON for everything else, no pickle.

The JSON describes the policy module by module. `kind` is the class, arrays are named by their path, and static fields
are settings. A policy can therefore be loaded without the agent that trained it.
"""

import hashlib
import importlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save, save_file

from contraflow.core.files import read_json, replacing, write_json
from contraflow.core.settings import SCHEMA, check_schema, from_json, import_path, main_name, to_json
from contraflow.core.trust import Trust
from contraflow.core.types import EnvSpec, UserError

ROOT = "contraflow."


def save_policy(folder: Path, policy: Any, spec: EnvSpec, env: str) -> None:
    """Writes `folder`/model.safetensors and `folder`/config.json; `env` is the environment id."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {}
    config = {"schema": SCHEMA, "env": env, "spec": to_json(spec), "policy": _describe(policy, "", arrays)}
    with replacing(folder / "model.safetensors") as temporary:
        save_file(arrays, temporary)
    write_json(folder / "config.json", config)


def revision(policy: Any) -> str:
    """Returns the first 12 digits of the SHA-256 of the model.safetensors that `save_policy` writes."""
    arrays: dict[str, np.ndarray] = {}
    _describe(policy, "", arrays)
    return hashlib.sha256(save(arrays)).hexdigest()[:12]


def load_policy(folder: Path, trust: Trust = "") -> tuple[Any, EnvSpec, str]:
    """Returns (policy, spec, env id) of a saved policy. `trust` names modules outside the library to import.

    Raises UserError that names what is missing or does not fit.
    """
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} holds no policy ({name} is missing); give the folder of a run or its policy/")
    try:
        config = read_json(folder / "config.json")
        arrays = load_file(folder / "model.safetensors")
    except (UserError, SafetensorError) as error:
        raise UserError(f"the policy in {folder} is damaged ({error}); save it again from its run") from None
    check_schema(config, folder)
    if not {"policy", "spec", "env"} <= set(config):
        raise UserError(f"{folder} does not describe a policy; give the folder of a run or its policy/")
    try:
        policy = _build(config["policy"], arrays, trust)
    except _Unfit as problem:
        raise UserError(f"the policy in {folder} {problem}") from None
    if arrays:
        raise UserError(f"the policy in {folder} has the array {min(arrays)} that its config.json does not mention")
    return (
        jax.device_put(policy),
        from_json(config["spec"], EnvSpec, where="spec"),
        from_json(config["env"], str, where="env"),
    )


def policy_folder(path: Path) -> Path:
    """Returns `path`/policy for a run folder, and `path` itself for any other."""
    return path / "policy" if (path / "policy").is_dir() else path


class _Unfit(Exception):
    """Says what does not fit, as the rest of a sentence."""


def _describe(value: Any, path: str, arrays: dict[str, np.ndarray]) -> Any:
    """Returns JSON for a part of a policy and puts its arrays into `arrays`."""
    if isinstance(value, eqx.Module):
        out: dict[str, Any] = {"kind": _kind(type(value))}
        for field in fields(value):
            part = getattr(value, field.name)
            if field.metadata.get("static"):
                out[field.name] = {"settings": to_json(part)}
            else:
                out[field.name] = _describe(part, f"{path}/{field.name}".lstrip("/"), arrays)
        return out
    if isinstance(value, tuple | list):
        return [_describe(part, f"{path}/{i}", arrays) for i, part in enumerate(value)]
    if value is None:
        return None
    arrays[path] = np.array(value)
    return {"array": path, "shape": list(np.shape(value))}


def _build(data: Any, arrays: dict[str, np.ndarray], trust: Trust) -> Any:
    """What `_describe` wrote; the arrays that are used are taken out of `arrays`."""
    if data is None:
        return None
    if isinstance(data, list):
        return tuple(_build(part, arrays, trust) for part in data)
    if not isinstance(data, dict):
        raise _Unfit(f"is described by {data!r}, which is no part of a policy")
    if "array" in data:
        name, shape = data["array"], data.get("shape")
        if not (isinstance(name, str) and isinstance(shape, list)):
            raise _Unfit(f"describes an array by {data!r}, which is no name and shape")
        shape = tuple(shape)
        if name not in arrays:
            raise _Unfit(f"lacks the array {name}: it belongs to another version")
        if arrays[name].shape != shape:
            raise _Unfit(f"has {name} of shape {arrays[name].shape}, its settings need {shape}")
        return jnp.asarray(arrays.pop(name))
    cls = _class(data.get("kind"), trust)
    known = {field.name: field for field in fields(cls)}
    if different := sorted(set(known) ^ (set(data) - {"kind"})):
        raise _Unfit(f"describes {cls.__name__} with other fields than this version has ({different[0]})")
    built = object.__new__(cls)  # __init__ would draw fresh weights
    for name, field in known.items():
        if field.metadata.get("static"):
            if not (isinstance(data[name], dict) and "settings" in data[name]):
                raise _Unfit(f"describes {cls.__name__}.{name} by {data[name]!r}, which are no settings")
            part = from_json(data[name]["settings"], _hints(cls)[name], trust, name)
        else:
            part = _build(data[name], arrays, trust)
        object.__setattr__(built, name, part)
    return built


def _hints(cls: type) -> dict[str, Any]:
    import typing

    return typing.get_type_hints(cls)


def _kind(cls: type) -> str:
    module = main_name() if cls.__module__ == "__main__" else cls.__module__
    return f"{module.removeprefix(ROOT)}:{cls.__qualname__}"


def _class(kind: Any, trust: Trust) -> type:
    module, colon, name = kind.partition(":") if isinstance(kind, str) else ("", "", "")
    if not colon:
        raise _Unfit(f"names no class for a part ({kind!r})")
    try:
        found = getattr(importlib.import_module(ROOT + module), name)
    except (ImportError, AttributeError):
        found = import_path(kind, trust)
    if not (isinstance(found, type) and issubclass(found, eqx.Module)):
        raise _Unfit(f"names {kind}, which is no part of a policy")
    return found
