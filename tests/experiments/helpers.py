"""Run folders as training and `compare` leave them, written by hand in milliseconds; and workers of a few lines."""

import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.cli_helpers import SMALL, TINY

from contraflow.agents.online.rfm import RFM
from contraflow.experiments.bridge import cost
from contraflow.experiments.compare import runner
from contraflow.experiments.compare.matrix import FINAL, Cell, Matrix, Settings
from contraflow.presets import PRESETS, default_run
from contraflow.training.run import write_config

STEPS = 40
AGENTS: dict[str, Any] = {name: PRESETS[name] for name in ("rfm", "sac", "sir")}
SETTINGS = Settings(steps=STEPS, collect=10, num_envs=2, updates=3)


def write_run(folder: Path, run: Any, returns: Sequence[float], final: dict[str, Any] | None = None) -> Path:
    """A run with evaluations at equal distances up to its last step, and diagnostics at each."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(run, folder)
    rows, metrics = ["step,seconds,return_mean,return_std,return_min,return_max,success"], []
    for i, value in enumerate(returns):
        step = run.steps * (i + 1) // len(returns)
        won = (i + 1) / (2 * len(returns)) if run.env.startswith("envpool:") else ""  # the others say nothing
        rows.append(f"{step},{6.0 * (i + 1) * (1 + run.seed)},{value},0,{value},{value},{won}")
        shares = {f"diagnostics/action_share/{k}": 1 / 16 for k in range(16)}
        law = {"diagnostics/action_std": 0.5, "diagnostics/saturated": 0.1, "diagnostics/action_entropy": 0.2}
        if isinstance(run.agent, RFM):
            timed = "ess", "eta", "target_bias", "reference_ess"
            law |= {f"diagnostics/{name}/{t}": 1 + t for name in timed for t in (0.1, 0.5, 0.9)}
            law["diagnostics/q_gap"] = 10.0
        metrics.append(json.dumps({"step": step, **law, **shares}))
    (folder / "eval.csv").write_text("\n".join(rows) + "\n")
    (folder / "metrics.jsonl").write_text("\n".join(metrics) + "\n")
    if final is not None:
        (folder / FINAL).write_text(json.dumps(final))
    return folder


def final(agent: Any, value: float, random: float = 0.0) -> dict[str, Any]:
    """What a worker leaves: every rule of the last policy has the same return, the best policy 1 more."""
    rules = ["own", "one particle", "uniform actions"] if isinstance(agent, RFM) else ["own"]
    rows = [{"policy": "last", "rule": r, "returns": [value, value], "cost": cost(agent)} for r in rules]
    rows.append({"policy": "best", "rule": "own", "returns": [value + 1] * 2, "cost": cost(agent)})
    rows.append({"policy": "random", "rule": "own", "returns": [random], "cost": None})
    versions = {"python": "3.11.9", "contraflow": "0.1.0", "jax": "0.9.9"}
    machine = {"cpu": "Abacus 3", "cores": 2, "device": "cpu: cpu"}
    return {"schema": 1, "episodes": 2, "evaluations": rows, "versions": versions, "machine": machine}


def write_matrix(
    out: Path,
    envs: Sequence[str] = ("probe:action", "envpool:CheetahRun-v1"),
    seeds: int = 5,
    agents: dict[str, Any] = AGENTS,
    own: frozenset[str] = frozenset(),
    data: dict[str, str] | None = None,
) -> Path:
    """A finished matrix: agent i has the return 10 i + seed on the first environment, ten times that on the second."""
    matrix = Matrix(out, agents, envs, SETTINGS, seeds, own, data or {})
    matrix.record()
    for cell in matrix.cells():
        value = (10.0 * list(agents).index(cell.agent) + cell.seed) * 10 ** envs.index(cell.env)
        write_run(cell.folder, cell.run, [value / 2, value], final(cell.run.agent, value))
    return out


def loose(seed: int = 0, **change: Any) -> Any:
    """A run as `contraflow train` makes them."""
    source = replace(TINY.source, **{k: change.pop(k) for k in list(change) if hasattr(TINY.source, k)})
    return replace(TINY, seed=seed, source=source, **change)


def sir_cells(out: Path, seeds: int = 3, env: str = "probe:action", trust: str = "") -> list[Cell]:
    out.mkdir(exist_ok=True)
    return Matrix(out, {"sir": default_run(SMALL)}, [env], Settings(steps=40, collect=10), seeds, trust=trust).cells()


SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
seed = json.loads((folder / "config.json").read_text())["run"]["seed"]
with (folder.parent / "calls").open("a") as file:
    file.write(f"{seed} {time.time()} {os.environ.get('XLA_FLAGS', '')}\\n")
def done():
    (folder / "final.json").write_text("{}")
    with (folder.parent / "ends").open("a") as file:
        file.write(f"{seed} {time.time()}\\n")
def save(*args):
    (folder / "saved").write_text("")
    sys.exit(130)
def wait():
    signal.signal(signal.SIGTERM, save)
    (folder / "ready").write_text("")
    time.sleep(60)
"""


def fake_worker(body: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", SCRIPT + textwrap.dedent(body))


def fake(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Let this be the worker."""
    monkeypatch.setattr(runner, "WORKER", fake_worker(body))
    monkeypatch.setattr(runner, "WAIT", 0.02)


def calls(out: Path, name: str = "calls") -> list[list[str]]:
    (file,) = out.glob(f"*/*/{name}")
    return [line.split(maxsplit=2) for line in file.read_text().splitlines()]
