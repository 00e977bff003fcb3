"""`contraflow monitor`: calibrate a watch over a policy, and say how often it would cry wolf."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.random as jr
import numpy as np
import tyro

from contraflow.cli.flags import Modules, read_flags
from contraflow.core.files import write_json
from contraflow.core.types import UserError
from contraflow.policy.artifact import policy_folder, save_policy
from contraflow.runtime.monitor import CHECK, Rule, Traces, alarms, calibrate, trace
from contraflow.runtime.policy import load
from contraflow.runtime.variants import environment


@dataclass(frozen=True)
class Options:
    """Watch a policy for failure: learn from its good episodes what is usual, and write FOLDER/monitor.

    A later alarm means that observations are new and that the policy is undecided. Of good episodes at most a share
    DELTA raise one.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of a run or of a policy."""
    episodes: int = 200
    """Episodes to learn from; half as many more check the result."""
    delta: float = 0.1
    """Largest share of good episodes with an alarm."""
    above: float | None = None
    """Episodes with at least this return are good; unless given, those that the environment calls a success."""
    rule: Rule = "either"
    """What raises an alarm: either new observations or an undecided policy, or both at once."""
    window: int = 5
    """Decisions that a score is summed over."""
    draws: int = 32
    """Actions drawn for a decision, to see whether the policy is undecided."""
    env: str | None = None
    """Another environment of the same sizes."""
    seed: int = 0
    trust: Modules = ""
    """Modules outside the library that may be imported, with what lies below them; `all` is any of them."""

    def __post_init__(self):
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must lie between 0 and 1, got {self.delta}")
        if min(self.episodes, self.window) < 1 or self.draws < 2:
            raise ValueError("episodes and window must be at least 1, and draws at least 2")


def monitor_command(args: list[str]) -> int:
    """Runs `contraflow monitor FOLDER`; returns the exit code."""
    options = read_flags(Options, args, prog="contraflow monitor")
    policy = load(options.folder, options.seed, options.trust)
    id, k = options.env or policy.env, jr.split(jr.key(options.seed), 3)

    def play(episodes: int, seed: int, key: jax.Array) -> Traces:
        with environment(policy, id, episodes, seed, options.trust) as env:
            return trace(policy.network, policy.spec, env, key, options.draws)

    found = play(options.episodes, options.seed, k[0])
    well = _good(found, options.above)
    print(f"{well.sum()} of {options.episodes} episodes are good (returns {found.returns.mean():.1f} on average)")
    watch = calibrate(found.select(well), policy.spec.observation, k[1], options.delta, options.window, options.rule)
    place = policy_folder(options.folder).parent if (options.folder / "policy").is_dir() else options.folder
    save_policy(place / "monitor", watch, policy.spec, id)
    check = play(max(1, options.episodes // 2), options.seed + 1, k[2])
    good, (raised, _) = _good(check, options.above), alarms(watch, check)
    counts: dict[str, Any] = {"delta": options.delta}
    for name, which in (("good", good), ("other", ~good)):
        counts |= {name: int(which.sum()), f"alarms_{name}": int(raised[which].sum())}
        if which.any():
            print(f"alarm in {raised[which].sum()} of {which.sum()} new {name} episodes ({raised[which].mean():.0%})")
    write_json(place / "monitor" / CHECK, counts)
    print(f"at most {options.delta:.0%} of good episodes are expected to raise one")
    print(f"written  {place / 'monitor'}")
    return 0


def _good(found: Traces, above: float | None) -> np.ndarray:
    if above is not None:
        return found.returns >= above
    if found.success is None:
        raise UserError("this environment does not say what success is: give --above RETURN")
    return found.success
