"""`contraflow compose`: weights of several policies that act as one, found by evaluation."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax.random as jr
import numpy as np
import tyro

from contraflow.cli.flags import Modules, Switch, read_flags
from contraflow.core.bounds import check_fit
from contraflow.envs import copies
from contraflow.experiments.weights import Score, Weights, grid, search_weights
from contraflow.policy.artifact import save_policy
from contraflow.policy.composed import Rule, composed
from contraflow.runtime.policy import load
from contraflow.runtime.variants import environment
from contraflow.training.evaluate import evaluate_one


@dataclass(frozen=True)
class Options:
    """Search the weights with which policies act together, and write the composition as a policy.

    The score is the success if the environment says what that is, and the return otherwise. The best composition and
    each policy alone are then played on fresh episodes, because the best of many scores is too good.
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folders of two or more runs or policies."""
    rule: Rule = "convex"
    """A weighted sum of velocities, or the mixture."""
    weights: tuple[float, ...] = ()
    """Takes these weights, one for each folder, and does not search."""
    steps: int = 10
    """Candidate weights are the multiples of 1 / steps that add up to 1."""
    episodes: int = 200
    """Episodes with each candidate."""
    halving: Switch[bool] = False
    """Drops the worse half after each of several rounds, and plays more with those that are left."""
    fresh: int = 400
    """Episodes for the result."""
    out: Path | None = None
    """Where the composition is written as a policy."""
    env: str | None = None
    """Another environment of the same sizes."""
    seed: int = 0
    trust: Modules = ""
    """Modules outside the library that may be imported, separated by commas; `all` allows any."""

    def __post_init__(self):
        if len(self.folders) < 2:
            raise ValueError("give the folders of two or more policies")
        if self.rule == "and":
            raise ValueError("weights of `and` do not add up to 1 and are not searched: see contraflow.policy.composed")
        if self.steps < 1 or min(self.episodes, self.fresh) < 2:
            raise ValueError("steps must be at least 1, episodes and fresh at least 2")


def compose_command(args: list[str]) -> int:
    """Runs `contraflow compose FOLDER FOLDER ...`; returns the exit code."""
    options = read_flags(Options, args, prog="contraflow compose")
    policies = [load(folder, options.seed, options.trust) for folder in options.folders]
    networks, spec = tuple(policy.network for policy in policies), policies[0].spec
    for folder, policy in zip(options.folders[1:], policies[1:], strict=True):
        check_fit(policy.spec, spec, f"the policy in {folder}", str(options.folders[0]), policy.env)
    candidates = [options.weights] if options.weights else grid(len(policies), options.steps)
    composed(networks, candidates[0], options.rule)  # refused before anything runs
    id, scored = options.env or policies[0].env, ""
    with ExitStack() as stack:
        worlds = {}

        def play(weights: Weights, episodes: int, seed: int) -> np.ndarray:
            nonlocal scored
            n = copies(id, min(episodes, 100), options.trust)
            if n not in worlds:
                worlds[n] = stack.enter_context(environment(policies[0], id, n, options.seed, options.trust))
            policy = composed(networks, weights, options.rule)
            found = evaluate_one(policy, worlds[n], jr.fold_in(jr.key(options.seed), seed), episodes)
            scored = "return" if found.success is None else "success"
            return found.returns if found.success is None else found.success

        found = search_weights(play, candidates, options.episodes, options.fresh, options.halving)
    print(f"{id}, {options.rule}, {scored} in the search (the best of these is too good):")
    for weights, score in found.tried.items():
        print(f"{_shown(weights):<12} {_line(score)}")
    print(f"{scored} on {options.fresh} fresh episodes:")
    for name, score in zip(map(str, options.folders), found.alone, strict=True):
        print(f"{name:<12} {_line(score)}")
    print(f"{_shown(found.weights):<12} {_line(found.fresh)}")
    print(f"{'gain':<12} {_line(found.gain)}, over the best of them alone")
    if options.out:
        save_policy(options.out, composed(networks, found.weights, options.rule), spec, policies[0].env)
        print(f"written  {options.out}")
    return 0


def _shown(weights: Weights) -> str:
    return " ".join(f"{w:g}" for w in weights)


def _line(score: Score) -> str:
    return f"{score.mean:.3f} +- {score.half:.3f} (95 %, {score.episodes} episodes)"
