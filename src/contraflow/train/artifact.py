"""The policy as a file to share: safetensors for the arrays, JSON for the settings, no pickle."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.random as jr
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from contraflow.agents import AnyAgent
from contraflow.agents.base import acting_state
from contraflow.core.settings import SCHEMA, from_json, to_json
from contraflow.core.types import EnvSpec, UserError


def _named_leaves(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(tree)}


def save_policy(folder: Path, agent: Any, spec: EnvSpec, env: str, state: Any) -> None:
    """Write `folder`/model.safetensors and config.json: the fields of the state that `agent.act` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.asarray(x) for name, x in _named_leaves(acting_state(agent, state)).items()}
    temporary = folder / "model.tmp"
    save_file(arrays, temporary)
    temporary.rename(folder / "model.safetensors")
    config = {"schema": SCHEMA, "env": env, "spec": to_json(spec), "agent": to_json(agent)}
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def load_policy(folder: Path, trust: bool = False) -> tuple[Any, EnvSpec, str, Any]:
    """(agent, spec, env id, state) of a saved policy; the fields that `act` does not read are None.

    Raises UserError naming the first array that is missing or has another shape.
    """
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} holds no policy ({name} is missing); give the folder of a run or its policy/")
    try:
        config = json.loads((folder / "config.json").read_text())
        arrays = load_file(folder / "model.safetensors")
    except (json.JSONDecodeError, SafetensorError) as error:
        raise UserError(f"the policy in {folder} is damaged ({error}); save it again from its run") from None
    check_schema(config, folder)
    if not {"agent", "spec", "env"} <= set(config):
        raise UserError(f"{folder} does not describe a policy; give the folder of a run or its policy/")
    agent = from_json(config["agent"], AnyAgent, trust, "agent")
    spec = from_json(config["spec"], EnvSpec, where="spec")
    shapes = acting_state(agent, jax.eval_shape(lambda key: agent.init(key, spec), jr.key(0)))
    wanted = _named_leaves(shapes)
    for name, leaf in wanted.items():
        if name not in arrays:
            raise UserError(f"the policy in {folder} lacks the array {name}; it belongs to another agent or version")
        if arrays[name].shape != leaf.shape:
            raise UserError(
                f"the policy in {folder} has {name} of shape {arrays[name].shape}, its settings need {leaf.shape}"
            )
    state = jax.tree.unflatten(jax.tree.structure(shapes), [arrays[name] for name in wanted])
    return agent, spec, config["env"], jax.device_put(state)


def check_schema(config: Any, folder: Path) -> None:
    """Refuse a file that is not ours, or written by a newer release."""
    schema = config.get("schema") if isinstance(config, dict) else None
    if not isinstance(schema, int):
        raise UserError(f"{folder} was not written by contraflow (its config.json names no schema)")
    if schema > SCHEMA:
        raise UserError(f"{folder} uses schema {schema}, this release reads up to {SCHEMA}: upgrade contraflow")


def policy_folder(path: Path) -> Path:
    """The policy in a run folder, or the folder itself."""
    return path / "policy" if (path / "policy").is_dir() else path
