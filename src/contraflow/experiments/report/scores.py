"""Returns, and the scores in [0, 1] (more or less) that can be averaged over tasks."""

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from contraflow.core.types import UserError
from contraflow.experiments.report.runs import Record
from contraflow.runtime.variants import ONE, OWN, UNIFORM

DMC = (
    "Acrobot|BallInCup|Cartpole|Cheetah|Dog|Finger|Fish|Hopper|Humanoid|HumanoidCMU|Manipulator|Pendulum|PointMass|Quadruped|"
    "Reacher|Stacker|Swimmer|Walker"
)
Returns = dict[str, dict[str, dict[int, float]]]
"""method -> environment -> seed -> return"""


@dataclass(frozen=True)
class Method:
    """An agent with one rule of acting; `cost` is that of one action, None where it is not known."""

    agent: str
    rule: str
    cost: dict[str, int] | None

    @property
    def name(self) -> str:
        if self.rule == OWN:
            return self.agent
        return f"{self.agent}, {'one particle' if self.rule == ONE else 'uniform actions instead of its actor'}"

    @property
    def effort(self) -> str:
        """particles x NFE, critic calls: what belongs beside every number."""
        if self.cost is None:
            return "not known"
        c = self.cost
        return f"{c['particles']} x {c['nfe']} NFE, {c['critic_calls']} Q"


@dataclass(frozen=True)
class Table:
    """Returns of every method by environment and seed, and where they come from."""

    methods: list[Method]
    returns: Returns
    source: str
    best: Returns
    """The best policy of each run by its own evaluations, where `compare` evaluated it."""


def collect(records: Sequence[Record]) -> Table:
    """Mean returns of the policy at the end of training: by the files that `compare` leaves when every run has one,
    else by the last row of eval.csv."""
    complete = all(record.final for record in records)
    methods: dict[str, Method] = {}
    returns: Returns = {}
    best: Returns = {}
    episodes = set()

    def put(into: Returns, name: str, record: Record, value: float) -> None:
        into.setdefault(name, {}).setdefault(record.env, {})[record.seed] = value

    for record in records:
        if not complete:
            method = Method(record.agent, OWN, record.cost)
            methods.setdefault(method.name, method)
            put(returns, method.name, record, record.evaluations[-1]["return_mean"])
            episodes.add(record.settings.get("eval_episodes"))
            continue
        assert record.final is not None
        for row in record.final["evaluations"]:
            mean = float(np.mean(row["returns"]))
            if row["policy"] == "last":
                episodes.add(len(row["returns"]))
                method = Method(record.agent, row["rule"], row["cost"])
                methods.setdefault(method.name, method)
                put(returns, method.name, record, mean)
            elif row["policy"] == "best":
                put(best, record.agent, record, mean)
    order = {OWN: 0, ONE: 1, UNIFORM: 2}
    ordered = sorted(methods.values(), key=lambda m: (m.agent, order.get(m.rule, 3), m.rule))
    count = ", ".join(map(str, sorted(episodes, key=str)))
    source = (
        f"mean over {count} fresh episodes, the same for every run of a task, of the policy at the end of training"
        if complete
        else f"last row of eval.csv, a mean over {count} episodes (not every run was evaluated by `contraflow compare`)"
    )
    return Table(ordered, returns, source, best)


@dataclass(frozen=True)
class Scale:
    """(return - low) / (high - low), and in words where the two come from."""

    low: float
    high: float
    reason: str

    def __call__(self, value: Any) -> Any:
        return (np.asarray(value) - self.low) / (self.high - self.low)


def scales(
    records: Sequence[Record], table: Table, given: Mapping[str, tuple[float, float]]
) -> dict[str, Scale | None]:
    """The scale of every environment; None where all returns are the same, so that there is none.

    In this order: the user's table; [0, 1000] for tasks of the DeepMind Control Suite; else from the return of
    uniformly random actions (or the lowest evaluation of any run, where that was not measured) to the best run.
    """
    out: dict[str, Scale | None] = {}
    for env in sorted({record.env for record in records}):
        if env in given:
            out[env] = Scale(*given[env], "table of the user")
        elif is_dmc(env):
            out[env] = Scale(0.0, 1000.0, "DeepMind Control Suite: return / 1000")
        else:
            here = [record for record in records if record.env == env]
            random = [r for record in here if record.final for r in _random(record.final)]
            rows = [row["return_mean"] for record in here for row in record.evaluations]
            low, word = (float(np.mean(random)), "random actions") if random else (min(rows), "lowest evaluation")
            high = max(value for by_env in table.returns.values() for value in by_env.get(env, {}).values())
            out[env] = Scale(low, high, f"0 is {word}, 1 the best run of any agent here") if high > low else None
    return out


def _random(final: Mapping[str, Any]) -> list[float]:
    return [r for row in final["evaluations"] if row["policy"] == "random" for r in row["returns"]]


def is_dmc(env: str) -> bool:
    """Whether returns lie in [0, 1000] by the definition of the task (LQR is the exception in the suite)."""
    if env.startswith(("gym:dm_control/", "dm_control/")):
        return "/lqr" not in env
    return re.fullmatch(rf"envpool:(?:{DMC})[A-Z]\w*-v1", env) is not None


def read_scales(path: Path) -> dict[str, tuple[float, float]]:
    """The user's table: CSV with the columns env, low, high. Raises UserError for anything else."""
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        out = {row["env"]: (float(row["low"]), float(row["high"])) for row in rows}
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} is not a table of scales ({error}): give a CSV with the columns env,low,high"
        ) from None
    for env, (low, high) in out.items():
        if not low < high:
            raise UserError(f"{path}: low must be less than high, got {low:g} and {high:g} for {env}")
    return out


@dataclass(frozen=True)
class Matrix:
    """Scores [runs, tasks] by method, on the tasks that all have; what could not be used is said in `notes`."""

    tasks: list[str]
    scores: dict[str, np.ndarray]
    notes: list[str]


def matrix(table: Table, scale: Mapping[str, Scale | None]) -> Matrix:
    """Rectangular scores for the aggregates: tasks that every method has, seeds that a method has on all of these."""
    notes, tasks = [], []
    for env, s in scale.items():
        missing = [m.name for m in table.methods if env not in table.returns[m.name]]
        if s is None:
            notes.append(f"{env} is left out of the aggregates: all returns are the same")
        elif missing and len(missing) < len(table.methods):
            notes.append(f"{env} is left out of the aggregates: no finished run of {', '.join(missing)}")
        else:
            tasks.append(env)
    scores = {}
    for method in table.methods if tasks else ():
        by_env = table.returns[method.name]
        seeds = sorted(set.intersection(*(set(by_env[env]) for env in tasks)))
        extra = sum(len(by_env[env]) for env in tasks) - len(seeds) * len(tasks)
        if extra:
            notes.append(
                f"{method.name}: {extra} runs are left out of the aggregates: their seed is not finished on every task"
            )
        if seeds:
            columns = [s([by_env[env][seed] for seed in seeds]) for env in tasks if (s := scale[env])]
            scores[method.name] = np.stack(columns, axis=1)
    return Matrix(tasks, scores, notes)
