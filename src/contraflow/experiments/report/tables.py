"""The tables of the report: rows of text from finished runs."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from contraflow.core.files import read_json
from contraflow.experiments.report.runs import Record
from contraflow.experiments.report.scores import Method, Returns, Scale, Table
from contraflow.experiments.report.statistics import Estimate, estimate, improvement, iqm, iqm_difference
from contraflow.runtime.export import fresh_exports
from contraflow.runtime.monitor import CHECK
from contraflow.runtime.variants import OWN

FAIR = (
    "steps", "collect", "num_envs", "updates", "batch_size", "n_step", "eval_every", "eval_episodes",
    "agent.actor.width", "agent.actor.depth", "agent.optim.decay_steps", "agent.optim.max_grad_norm", "agent.critic",
)  # fmt: skip
"""Settings that a fair comparison keeps equal, with everything below them."""
ALIKE = {"agent.flow.network": "agent.actor", "agent.ppo.actor_optim": "agent.optim"}
"""Other names of these settings in some agents."""
ENOUGH = 5  # seeds needed for a verdict
Rows = list[list[str]]


def number(value: float) -> str:
    """Returns four significant digits, with thousands in full."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def interval(e: Estimate) -> str:
    inside = f" [{float(e.low):.3f}, {float(e.high):.3f}]" if np.isfinite(e.low) else " (one run: no interval)"
    return f"{float(e.value):.3f}{inside}"


def aggregates(table: Table, reference: str) -> Rows:
    """Returns rows of interquartile means of the scores, and of differences from `reference`, with intervals."""
    rows, base = [], table.scores.get(reference)
    for method in (m for m in table.methods if m.name in table.scores):
        scores, against = table.scores[method.name], []
        if base is not None:
            against = [interval(estimate(f, scores, base)) for f in (iqm_difference, improvement)]
        against = ["", ""] if method.name == reference else against
        rows.append([method.name, method.effort, str(len(scores)), interval(estimate(iqm, scores)), *against])
    return rows


def verdicts(table: Table, reference: str) -> Iterator[str]:
    """Says which agents are better than the reference, and which are not shown to be."""
    own = [m.name for m in table.methods if m.rule == OWN and m.name in table.scores and m.name != reference]
    for name in own if reference in table.scores else ():
        pair = table.scores[name], table.scores[reference]
        gap, word = estimate(iqm_difference, *pair), "has not been shown to differ from"
        if min(map(len, pair)) < ENOUGH:
            word = f"has too few seeds (fewer than {ENOUGH}) for a verdict against"
        elif gap.low > 0 or gap.high < 0:
            word = "is ahead of" if gap.low > 0 else "is behind"
        yield f"{name} {word} {reference}: {interval(gap)} in IQM."


def tasks(methods: Sequence[Method], returns: Returns, envs: Sequence[str]) -> Rows:
    """Returns rows of mean and standard deviation of returns by task, for the methods that have any."""

    def cell(values: Mapping[int, float]) -> str:
        array = np.array([*values.values()])
        spread = f" ± {number(array.std(ddof=1))}" if len(array) > 1 else ""
        return f"{number(array.mean())}{spread} ({len(array)})" if len(array) else "-"

    some = [m for m in methods if m.name in returns]
    return [[m.name, m.effort, *(cell(returns[m.name].get(env, {})) for env in envs)] for m in some]


def successes(records: Sequence[Record], envs: Sequence[str]) -> Rows:
    """Share of episodes with success at the end of training, a mean over seeds, by agent and task; [] where no
    environment says it."""
    found: dict[str, dict[str, list[float]]] = {}
    for r in records:
        if r.success is not None:
            found.setdefault(r.agent, {}).setdefault(r.env, []).append(r.success)
    cell = lambda shares: f"{np.mean(shares):.0%} ({len(shares)})" if shares else "-"
    return [[agent, *(cell(by_env.get(env, [])) for env in envs)] for agent, by_env in sorted(found.items())]


def scales(scales: Mapping[str, Scale | str]) -> Rows:
    """Returns rows of the returns that score 0 and 1, by task."""
    return [
        [env, "", "", s] if isinstance(s, str) else [env, number(s.low), number(s.high), s.reason]
        for env, s in scales.items()
    ]


def _dotted(value: Any, where: str = "") -> dict[str, str]:
    """Returns nested settings by dotted names; the kind of a part is listed under the part's name."""
    if isinstance(value, dict):
        out = {where: str(value["kind"])} if where and "kind" in value else {}
        parts = [(f"{where}.{key}".lstrip("."), inner) for key, inner in value.items() if key != "kind"]
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        out, parts = {}, [(f"{where}.{i}", inner) for i, inner in enumerate(value)]
    else:
        return {where: str(value)}
    for name, inner in parts:
        out |= _dotted(inner, name)
    return out


def settings(records: Sequence[Record], agents: Sequence[str]) -> dict[str, Rows]:
    """Returns the settings equal for all (`shared`), those that should be but are not (`unfair`), and the rest."""
    values: dict[str, dict[str, set[str]]] = {}
    for record in sorted(records, key=lambda r: agents.index(r.agent)):
        for name, value in _dotted(record.settings).items():
            for other, usual in ALIKE.items():
                name = name.replace(other, usual)
            values.setdefault(name, {}).setdefault(record.agent, set()).add(value)
    out: dict[str, Rows] = {"shared": [], "unfair": [], "others": []}
    for name in (name for name in values if name not in ("env", "seed", "trackers")):
        cells = [" | ".join(sorted(values[name].get(agent, {"-"}))) for agent in agents]
        present = set(cells) - {"-"}
        if any(name == fair or name.startswith(f"{fair}.") for fair in FAIR) and len(present) > 1:
            out["unfair"].append([name, *cells])
        elif len(present) == 1 and "-" not in cells and "|" not in cells[0]:
            out["shared"].append([name, cells[0]])
        else:
            out["others"].append([name, *cells])
    return out


def runs(records: Sequence[Record], folder: Path) -> Rows:
    """Returns one row per run."""
    rows = []
    for r in records:
        last, found = r.evaluations[-1], _versions(r)
        counts = ["-" if n is None else f"{n:,.0f}" for n in (r.place("steps", last), r.place("updates", last))]
        versions = ", ".join(f"{name} {found[name]}" for name in ("contraflow", "python", "jax") if name in found)
        row = [r.folder.relative_to(folder).as_posix(), r.agent, r.env, str(r.seed), *counts]
        success = f"{last['success']:.0%}" if "success" in last else "-"
        rows.append([*row, f"{last['seconds'] / 60:.1f}", number(last["return_mean"]), success, versions])
    return rows


def deployment(records: Sequence[Record], folder: Path) -> Rows:
    """Returns a row for each exported file, and for each policy with a monitor but no file; see `page.html`."""
    rows = []
    for r in records:
        for policy, watched in ((r.folder / "policy", r.folder), (r.folder / "best", r.folder / "best")):
            check = watched / "monitor" / CHECK
            if not (policy / "config.json").is_file():
                continue
            files = list(fresh_exports(policy).values())
            found = read_json(check) if check.is_file() else {}
            spec = read_json(policy / "config.json")["spec"]
            chunk = f"{spec['execute']} of {spec['horizon']}" if spec["horizon"] > 1 else "-"
            row = [policy.relative_to(folder).as_posix(), "-" if r.cost is None else str(r.cost["nfe"]), chunk]
            seen = [f"{found[f'alarms_{k}']} of {found[k]}" if found.get(k) else "-" for k in ("good", "other")]
            for about in files or ([{}] if found else []):
                times = [f"{1000 * s:.2f}" for s in about.get("seconds", {}).values()] or ["-", "-"]
                parity = f"{about['parity']:.1e}" if about else "-"
                rows.append([*row, about.get("file", "-"), parity, *times, *seen])
    return rows


def _versions(record: Record) -> dict[str, str]:
    return {"contraflow": record.version} | (record.final or {}).get("versions", {})


def machines(records: Sequence[Record]) -> Rows:
    """Returns machines and package versions, each with its number of runs."""
    lines: Counter[str] = Counter()
    for record in records:
        machine = (record.final or {}).get("machine") or {}
        text = ", ".join(f"{k}: {v}" for k, v in machine.items() if v) or "not recorded"
        lines[text + "; " + ", ".join(f"{k} {v}" for k, v in _versions(record).items())] += 1
    return [[str(n), text] for text, n in sorted(lines.items())]
