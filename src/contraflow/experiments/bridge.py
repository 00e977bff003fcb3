"""Everything that experiments need to know about the inside of runs, agents and trained policies."""

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.random as jr

from contraflow.agents import classes
from contraflow.agents.base import Agent
from contraflow.core.optim import Optim
from contraflow.core.settings import from_json, to_json
from contraflow.core.trust import Trust
from contraflow.core.types import EnvSpec, UserError
from contraflow.envs import copies, jittable
from contraflow.flow.model import FlowSpec
from contraflow.nets.mlp import MLPSpec
from contraflow.nets.transformer import ChunkTransformer
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.base import inner
from contraflow.policy.uniform import uniform_policy
from contraflow.rl.critics import Critics
from contraflow.rl.ppo import PPOSettings
from contraflow.runtime.policy import load
from contraflow.runtime.variants import OWN, environment, variants
from contraflow.training.evaluate import evaluate_one
from contraflow.training.run import Run

NETWORK = ("critic", "width", "depth", "decay_steps", "max_grad_norm")
"""Shared settings that belong to agents; the others are fields of a run or of its source."""
BRINGS = ("agent", "pretrained", "source")
"""What a preset contributes to a comparison, except settings of its source that all cells share."""


def cell_run(run: Run, env: str, seed: int, data: str, shared: Mapping[str, Any], own: bool, trust: Trust) -> Run:
    """Returns `run` on `env` with the `shared` settings that it, its source and its agent have.

    An agent that keeps its `own` takes none of them. `data` is the dataset for agents that learn from one. Raises
    UserError, or ValueError, for settings that do not fit.
    """
    given = {"env": env, "data": data or getattr(run.source, "data", ""), "seed": seed, "trackers": (), **shared}
    parts = [{f.name: given[f.name] for f in fields(part) if f.name in given} for part in (run, run.source)]
    if parts[1].get("data") == "":
        raise UserError(f"it learns from a dataset: give --data, one for {env}, or name a run that has one")
    agent = run.agent if own else with_networks(run.agent, {name: shared[name] for name in NETWORK})
    return replace(run, agent=agent, source=replace(run.source, **parts[1]), **parts[0]).resolve(trust)


def with_networks(part: Any, network: Mapping[str, Any]) -> Any:
    """Returns an agent with the settings of `NETWORK` where it has such parts: critics, actor size, their optimisers.

    A separate value function takes the size of the critics.
    """
    size = {name: network[name] for name in ("width", "depth") if name in network}
    steps = {name: network[name] for name in ("decay_steps", "max_grad_norm") if name in network}
    changes: dict[str, Any] = {}
    for name, value in ((field.name, getattr(part, field.name)) for field in fields(part)):
        if isinstance(value, Critics) or (name in network and not is_dataclass(value)):
            changes[name] = network.get(name, value)
        elif isinstance(value, MLPSpec | ResidualMLP | ChunkTransformer):
            critic = network.get("critic") if name == "critic" else None
            changes[name] = replace(value, **({"width": critic.width, "depth": critic.depth} if critic else size))
        elif isinstance(value, Optim) and name in ("optim", "actor_optim", "critic_optim"):
            changes[name] = replace(value, **steps)
        elif isinstance(value, PPOSettings) or _holds_networks(value):
            changes[name] = with_networks(value, network)
    return replace(part, **changes)


def _holds_networks(part: Any) -> bool:
    """Whether it is a part of an agent that has sizes of networks in its fields, such as a flow or a kind of actor."""
    kinds = MLPSpec | ResidualMLP | ChunkTransformer | FlowSpec
    return is_dataclass(part) and any(isinstance(getattr(part, field.name), kinds) for field in fields(part))


def brings(run: Run, shared: Iterable[str]) -> dict[str, Any]:
    """Returns, as JSON, what a preset contributes to a comparison with the settings `shared`."""
    out = {name: to_json(getattr(run, name)) for name in BRINGS}
    out["source"] = {k: v for k, v in out["source"].items() if k not in ("env", "data", *shared)}
    return out


def brought(old: Mapping[str, Any], trust: Trust) -> dict[str, Any]:
    """Returns an earlier result of `brings` as it would be now: settings that it lacks have their defaults."""
    return {**old, "agent": to_json(from_json(old["agent"], Agent, trust, "matrix.json", classes()))}


@cache
def cost(agent: Any) -> dict[str, int] | None:
    """Returns particles, actor evaluations and critic calls of one greedy action; None if they are not known."""
    spec = EnvSpec(1, 1, 1, None, True)  # an action of any other size costs the same
    found = inner(jax.eval_shape(lambda key: agent.policy(agent.init(key, spec)), jr.key(0)), "cost")
    return None if found is None else vars(found)


@cache
def in_jax(env: str, trust: Trust) -> bool:
    """Returns whether an environment is written in JAX.

    If the check fails, even in user code, the result is False: the cells will fail later, each with the reason.
    """
    try:
        return jittable(env, trust=trust)
    except Exception:
        return False


def flat(run: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the JSON of a run with the fields of its source at the same level; `source` becomes its kind."""
    return {k: v for k, v in {**run, **run["source"]}.items() if k != "kind"} | {"source": run["source"]["kind"]}


def env_steps(run: Mapping[str, Any], step: float) -> float | None:
    """Returns environment steps at `step` of a run (as from `flat`); None if it takes none."""
    return None if run["source"] == "Dataset" else max(0.0, step - run.get("offline_steps", 0))


def gradient_steps(run: Mapping[str, Any], step: float) -> float | None:
    """Returns gradient steps at `step` of a run (as from `flat`), by whole rollouts; None if they are not known."""
    try:
        if run["source"] == "Dataset":
            return step
        each = run["num_envs"] * run["execute"] if "execute" in run else run["num_envs"] * run["horizon"]
        if run["source"] == "Rollouts":
            return step / (run["unroll"] * each) * run["agent"]["ppo"]["epochs"] * run["agent"]["ppo"]["minibatches"]
        before = run.get("offline_steps", 0)
        first = before or -(-run["collect"] // each) * each  # the warm-up ends with a whole round
        return min(step, before) + max(0.0, step - first) / each * run["updates"]
    except (KeyError, TypeError):
        return None


def final_evaluations(folder: Path, episodes: int, seed: int, trust: Trust) -> list[dict[str, Any]]:
    """Returns evaluations of the last policy by each of its rules, of the best policy, and of uniform actions."""
    last, best = load(folder, trust=trust), load(folder / "best", trust=trust)
    rows: list[tuple[str, str, Any]] = [("last", rule, policy) for rule, policy in variants(last).items()]
    rows += [("best", OWN, best.network), ("random", OWN, uniform_policy(last.spec.action_dim))]
    out = []
    with environment(last, last.env, copies(last.env, episodes, trust), seed, trust) as env:
        for name, rule, policy in rows:
            found = evaluate_one(policy, env, jr.key(seed), episodes)
            price = None if name == "random" else inner(policy, "cost")
            row = {"policy": name, "rule": rule, "returns": found.returns.tolist(), "cost": price and vars(price)}
            out.append(row | ({} if found.success is None else {"success": float(found.success.mean())}))
    return out
