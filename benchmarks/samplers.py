"""All methods of `contraflow sample` on all named targets at equal density calls.

    python benchmarks/samplers.py            # benchmarks/results/samplers.csv, appended as it goes; run again to resume
    python benchmarks/samplers.py --report   # only the tables from what is there

For each target and method three learning rates are tried on one seed, the best by sliced Wasserstein is trained on
three fresh seeds. Shared are K = 32 density calls per query point, 1,500 updates of 64 points, hence 3,072,000 calls,
the network, and 100 Euler steps to sample. `modes` is the share of modes found; `well_error` the mean over
the 16 wells of many-well-32 of |P(x_1 > 0) - exact|; `log_z_error` the estimate of log Z less the exact one (fab only).
"""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from sampling import keys_of, read, rounded
from tables import append

from contraflow.flow.solver import Euler
from contraflow.sampling.compare import floor, judge
from contraflow.sampling.distances import DISTANCES
from contraflow.sampling.distances import modes_found, sliced_wasserstein
from contraflow.sampling.fab import Buffer
from contraflow.sampling.methods import METHODS
from contraflow.sampling.targets import TARGETS, Target, find_target
from contraflow.sampling.trainer import Estimated, FlowState, Trainer, draw, train

RATES = (1e-3, 3e-3, 1e-2)
TUNING_SEED = 1000
SOLVER = Euler(100)
POINTS = 2000
EXTRA = ("modes", "well_error", "log_z_error")
COLUMNS = ("target", "method", "density_calls", "learning_rate", "seed", "solver_steps", *DISTANCES, *EXTRA)


@dataclass(frozen=True)
class Settings:
    """Train, judge, and report."""

    report: bool = False
    """Only report."""
    methods: tuple[str, ...] = tuple(METHODS)
    samples: int = 32
    steps: int = 1500
    seeds: int = 3
    file: Path = Path(__file__).parent / "results" / "samplers.csv"


def method_of(name: str, settings: Settings) -> Trainer:
    trainer = replace(METHODS[name].with_samples(settings.samples), steps=settings.steps)
    if isinstance(trainer.method, Estimated):
        trainer = replace(trainer, method=replace(trainer.method, bounded=True))
    return trainer


def tuned_rate(target: Target, method: Trainer) -> float:
    """The learning rate of least sliced Wasserstein distance on the tuning seed."""
    k_train, k_judge = keys_of([TUNING_SEED] * len(RATES))
    state = train(method, target.log_density, k_train, jnp.asarray(RATES), target.dim)

    def score(net, key):
        k_flow, k_exact, k_slices = jr.split(key, 3)
        x = draw(method, net, SOLVER, k_flow, POINTS)
        return sliced_wasserstein(k_slices, x, target.sample(k_exact, POINTS), 64)

    return RATES[int(np.nanargmin(jax.vmap(score)(state.net, k_judge)))]


def extras(target: Target, method: Trainer, state: FlowState, keys) -> list[dict[str, float]]:
    """What the distances do not say, by seed."""
    rows = []
    for i, key in enumerate(keys):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], state)
        k_flow, k_exact = jr.split(key)
        x, row = draw(method, one.net, SOLVER, k_flow, POINTS), {}
        if target.modes is not None:
            row["modes"] = modes_found(x, target.sample(k_exact, POINTS), target.modes)
        if target.name == "many-well-32":
            exact = jnp.mean(target.sample(k_exact, 200_000)[:, ::2] > 0)
            row["well_error"] = float(jnp.mean(jnp.abs(jnp.mean(x[:, ::2] > 0, 0) - exact)))
        if isinstance(one.memory, Buffer) and target.log_z is not None:
            row["log_z_error"] = float(one.memory.log_z()) - target.log_z
        rows.append(row)
    return rows


def cell(target: Target, method: Trainer, seeds: int) -> list[dict]:
    """Rows of one method on one target."""
    rate = tuned_rate(target, method)
    k_train, k_judge = keys_of(range(seeds))
    state = train(method, target.log_density, k_train, jnp.full(seeds, rate), target.dim)
    scores = judge(target, method, state, SOLVER.steps, POINTS, k_judge)
    more = extras(target, method, state, jax.vmap(lambda k: jr.fold_in(k, 1))(k_judge))
    common = {"density_calls": method.critic_calls, "learning_rate": rate, "solver_steps": SOLVER.steps}
    return [common | {"seed": i} | s | m for i, (s, m) in enumerate(zip(scores, more, strict=True))]


def run(settings: Settings) -> None:
    """Append the rows of what the file lacks."""
    done = {(r["target"], r["method"]) for r in read(settings.file)}
    for method, name in itertools.product(("exact", *settings.methods), TARGETS):
        if (name, method) in done:
            continue
        target = find_target(name, Trainer.box)
        if method == "exact":
            rows = [{"seed": i} | row for i, row in enumerate(floor(target, POINTS, jr.key(77), pairs=settings.seeds))]
        else:
            rows = cell(target, method_of(method, settings), settings.seeds)
        append(settings.file, rounded([{"target": name, "method": method} | row for row in rows]), COLUMNS)
        print(name, method, *(f"{row['sliced_wasserstein']:.3f}" for row in rows), flush=True)


def report(rows: list[dict]) -> None:
    """Markdown: mean and range over seeds."""
    for target in TARGETS:
        names = [n for n in (*DISTANCES, *EXTRA) if any(r["target"] == target and r[n] != "" for r in rows)]
        print(f"\n{target}\n\n| method | rate | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 2) + "|")
        for method in (*METHODS, "exact"):
            mine = [r for r in rows if (r["target"], r["method"]) == (target, method)]
            if not mine:
                continue
            cells = []
            for name in names:
                values = [r[name] for r in mine if r[name] != ""]
                digits = 4 if name == "mmd2" else 3
                show = lambda v, digits=digits: f"{v:.{digits}f}"
                cells.append(f"{show(np.mean(values))} [{show(min(values))}, {show(max(values))}]" if values else "")
            print(f"| {method} | {mine[0]['learning_rate']} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    chosen = tyro.cli(Settings, description=__doc__)
    if not chosen.report:
        run(chosen)
    report(read(chosen.file))
