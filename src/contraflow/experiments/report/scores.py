"""Returns, and scores of roughly [0, 1] that can be averaged over tasks."""

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from contraflow.core.types import UserError
from contraflow.experiments.report.runs import Record
from contraflow.policy.best_of import ONE, UNIFORM
from contraflow.runtime.variants import OWN

DMC = (
    "Acrobot|BallInCup|Cartpole|Cheetah|Dog|Finger|Fish|Hopper|Humanoid|HumanoidCMU|Manipulator|Pendulum|PointMass|Quadruped|"
    "Reacher|Stacker|Swimmer|Walker"
)
RULES = {OWN: "", ONE: ", one particle", UNIFORM: ", uniform actions instead of its actor"}
Returns = dict[str, dict[str, dict[int, float]]]
"""method -> environment -> seed -> return"""


def plural(n: int, word: str) -> str:
    return f"{n} {word}{'s' * (n != 1)}"


@dataclass(frozen=True)
class Method:
    """An agent with one rule of acting; `effort` is the cost shown with every number: particles x NFE, critic calls."""

    agent: str
    rule: str
    effort: str
    name: str

    @classmethod
    def of(cls, agent: str, rule: str, cost: Mapping[str, int] | None) -> "Method":
        effort = "{particles} x {nfe} NFE, {critic_calls} Q".format(**cost) if cost else "not known"
        return cls(agent, rule, effort, agent + RULES.get(rule, f", {rule}"))


@dataclass(frozen=True)
class Scale:
    """(return - low) / (high - low), with the source of the two in words."""

    low: float
    high: float
    reason: str

    def __call__(self, value: Any) -> Any:
        return (np.asarray(value) - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Table:
    """Returns of every method by environment and seed, and scores for the aggregates.

    `best` holds the returns of each run's best policy, if `compare` evaluated it. `scores` are [runs, tasks] on the
    tasks that all methods have, and `notes` say what was left out.
    """

    methods: list[Method]
    source: str
    returns: Returns
    best: Returns
    scales: dict[str, Scale | str]
    tasks: dict[str, Scale] = field(default_factory=dict)
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def collect(records: Sequence[Record], given: Mapping[str, tuple[float, float]]) -> Table:
    """Collects mean returns of the policies at the end of training.

    They come from the files of `compare` if every run has one, else from the last row of eval.csv. `given` maps
    environments to (low, high).
    """
    complete = all(record.final for record in records)
    methods: dict[str, Method] = {}
    returns, best, episodes = Returns(), Returns(), set()
    for record in records:
        rows = [(Method.of(record.agent, row["rule"], row["cost"]), row["returns"]) for row in record.after("last")]
        if not complete:
            rows = [(Method.of(record.agent, OWN, record.cost), [record.evaluations[-1]["return_mean"]])]
        for method, values in rows:
            methods.setdefault(method.name, method)
            returns.setdefault(method.name, {}).setdefault(record.env, {})[record.seed] = float(np.mean(values))
            episodes.add(len(values) if complete else record.settings.get("eval_episodes"))
        for row in record.after("best") if complete else ():
            best.setdefault(record.agent, {}).setdefault(record.env, {})[record.seed] = float(np.mean(row["returns"]))
    count, order = ", ".join(map(str, sorted(episodes, key=str))), list(RULES)
    source = f"last row of eval.csv, a mean over {count} episodes (not every run was evaluated by contraflow compare)"
    if complete:
        source = (
            f"mean over {count} fresh episodes, the same for all runs of a task, of the policy at the end of training"
        )
    ordered = sorted(methods.values(), key=lambda m: (m.agent, order.index(m.rule) if m.rule in order else 9, m.rule))
    table = Table(ordered, source, returns, best, _scales(records, returns, given))
    _fill(table)
    return table


def _scales(
    records: Sequence[Record], returns: Returns, given: Mapping[str, tuple[float, float]]
) -> dict[str, Scale | str]:
    """Returns the scale of every environment, or the reason why there is none.

    The first that applies is used: the user's table; [0, 1000] for tasks of the DeepMind Control Suite; from the return
    of uniformly random actions (or, if not measured, the lowest evaluation of any run) to the best run.
    """
    out: dict[str, Scale | str] = {}
    for env in sorted({record.env for record in records}):
        here = [record for record in records if record.env == env]
        random = [r for record in here for row in record.after("random") for r in row["returns"]]
        lowest = min(row["return_mean"] for record in here for row in record.evaluations)
        low, word = (float(np.mean(random)), "random actions") if random else (lowest, "lowest evaluation")
        high = max(value for by_env in returns.values() for value in by_env.get(env, {}).values())
        if env in given:
            out[env] = Scale(*given[env], "given table of scales")
        elif is_dmc(env):
            out[env] = Scale(0.0, 1000.0, "DeepMind Control Suite: return / 1000")
        elif high > low:
            out[env] = Scale(low, high, f"0 is {word}, 1 the best run of any agent here")
        else:
            out[env] = "there is only one run" if len(here) == 1 else f"no run is better than {word}"
    return out


def _fill(table: Table) -> None:
    """Fills in rectangular scores for the aggregates: tasks that every method has, and seeds on all of these."""
    for env, scale in table.scales.items():
        missing = [m.name for m in table.methods if env not in table.returns[m.name]]
        if isinstance(scale, str):
            table.notes.append(f"{env} is left out of the aggregates: {scale}")
        elif missing and len(missing) < len(table.methods):
            table.notes.append(f"{env} is left out of the aggregates: no finished run of {', '.join(missing)}")
        else:
            table.tasks[env] = scale
    for name in (m.name for m in table.methods) if table.tasks else ():
        by_env = {env: table.returns[name][env] for env in table.tasks}
        seeds = sorted(set.intersection(*map(set, by_env.values())))
        if extra := sum(map(len, by_env.values())) - len(seeds) * len(by_env):
            are = f"{plural(extra, 'run')} {'are' if extra > 1 else 'is'} left out of the aggregates"
            table.notes.append(f"{name}: {are}, since the seed is not finished on every task")
        if seeds:
            columns = [scale([by_env[env][seed] for seed in seeds]) for env, scale in table.tasks.items()]
            table.scores[name] = np.stack(columns, axis=1)


def is_dmc(env: str) -> bool:
    """Returns whether returns lie in [0, 1000] by definition of the task (LQR is the suite's exception)."""
    if env.startswith(("gym:dm_control/", "dm_control/")):
        return "/lqr" not in env
    return re.fullmatch(rf"envpool:(?:{DMC})[A-Z]\w*-v1", env) is not None


def read_scales(path: Path) -> dict[str, tuple[float, float]]:
    """Returns the user's table, a CSV with the columns env, low, high. Raises UserError for anything else."""
    try:
        with path.open(newline="") as file:
            out = {row["env"]: (float(row["low"]), float(row["high"])) for row in csv.DictReader(file)}
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a table of scales ({error}): use a CSV with the columns env,low,high") from None
    for env, (low, high) in out.items():
        if not low < high:
            raise UserError(f"{path}: low must be less than high, got {low:g} and {high:g} for {env}")
    return out
