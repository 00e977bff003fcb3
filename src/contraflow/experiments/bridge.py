"""All that experiments know of what a run, an agent and a trained policy are made of, in one place."""

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
from contraflow.envs import jittable
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
"""What a preset brings into a comparison, but for what is shared of its source."""


def cell_run(run: Run, env: str, seed: int, data: str, shared: Mapping[str, Any], own: bool, trust: Trust) -> Run:
    """`run` on `env` with those of the `shared` settings that it, its source and, unless it keeps its `own`, its agent
    have; from `data` where it learns from a dataset. Raises UserError, or ValueError for what does not fit."""
    given = {"env": env, "data": data or getattr(run.source, "data", ""), "seed": seed, "trackers": (), **shared}
    parts = [{f.name: given[f.name] for f in fields(part) if f.name in given} for part in (run, run.source)]
    if parts[1].get("data") == "":
        raise UserError(f"it learns from a dataset: give --data, one for {env}, or name a run that has one")
    agent = run.agent if own else with_networks(run.agent, {name: shared[name] for name in NETWORK})
    return replace(run, agent=agent, source=replace(run.source, **parts[1]), **parts[0]).resolve(trust)


def with_networks(part: Any, network: Mapping[str, Any]) -> Any:
    """An agent with the settings of `NETWORK` wherever it has their like: its critics, the size of its actor, and the
    optimiser of both; a value function on the side has the size of the critics."""
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
        elif isinstance(value, FlowSpec | PPOSettings):
            changes[name] = with_networks(value, network)
    return replace(part, **changes)


def brings(run: Run, shared: Iterable[str]) -> dict[str, Any]:
    """As JSON, what a preset brings into a comparison whose settings are `shared`."""
    out = {name: to_json(getattr(run, name)) for name in BRINGS}
    out["source"] = {k: v for k, v in out["source"].items() if k not in ("env", "data", *shared)}
    return out


def brought(old: Mapping[str, Any], trust: Trust) -> dict[str, Any]:
    """What `brings` gave once, as it gives it now: settings of the agent that it did not know have their defaults."""
    return {**old, "agent": to_json(from_json(old["agent"], Agent, trust, "matrix.json", classes()))}


@cache
def cost(agent: Any) -> dict[str, int] | None:
    """Particles, evaluations of the actor and critic calls of one greedy action; None where that is not known."""
    spec = EnvSpec(1, 1, 1, None, True)  # an action of any other size costs the same
    found = inner(jax.eval_shape(lambda key: agent.policy(agent.init(key, spec)), jr.key(0)), "cost")
    return None if found is None else vars(found)


@cache
def in_jax(env: str, trust: Trust) -> bool:
    """Whether an environment is written in JAX; not, if asking fails, whatever the user's own code raises: its cells
    will fail, each with the reason."""
    try:
        return jittable(env, trust=trust)
    except Exception:
        return False


def flat(run: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of a run with the fields of its source beside its own; `source` is the kind of that."""
    return {k: v for k, v in {**run, **run["source"]}.items() if k != "kind"} | {"source": run["source"]["kind"]}


def env_steps(run: Mapping[str, Any], step: float) -> float | None:
    """Environment steps at `step` of a run (as from `flat`); None where it never takes any."""
    return None if run["source"] == "Dataset" else max(0.0, step - run.get("offline_steps", 0))


def gradient_steps(run: Mapping[str, Any], step: float) -> float | None:
    """Gradient steps at `step` of a run (as from `flat`), those of whole rollouts; None where they are not known."""
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
    """Returns of the last policy by each of its rules, of the best policy, and of uniformly random actions."""
    last, best = load(folder, trust=trust), load(folder / "best", trust=trust)
    rows: list[tuple[str, str, Any]] = [("last", rule, policy) for rule, policy in variants(last).items()]
    rows += [("best", OWN, best.network), ("random", OWN, uniform_policy(last.spec.action_dim))]
    out = []
    with environment(last, last.env, episodes, seed, trust) as env:
        for name, rule, policy in rows:
            found = evaluate_one(policy, env, jr.key(seed), episodes)
            price = None if name == "random" else inner(policy, "cost")
            row = {"policy": name, "rule": rule, "returns": found.returns.tolist(), "cost": price and vars(price)}
            out.append(row | ({} if found.success is None else {"success": float(found.success.mean())}))
    return out
