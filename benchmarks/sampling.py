"""Methods of `contraflow sample` at equal density calls: the tables of docs/background/sampling-results.md.

    python benchmarks/sampling.py equal      # all methods on all targets: docs/data/samplers.csv
    python benchmarks/sampling.py ranking    # 2601.08136: RFM in 20 solver steps ahead of QNE and iDEM in 100?

Rows are appended as they come, and the same command again continues; `--report-only` prints the tables of what is
there. For each target, K and method all settings (learning rates; estimates projected into the box or not) are tried on
the tuning seeds; the best by sliced Wasserstein, mean over the numbers of solver steps, is trained on fresh seeds. All
share seeds, network, queries, updates and K. `well_error` is the mean over the wells of many-well-32 of
|P(x_1 > 0) - exact|, `log_z_error` the estimate of log Z less the exact one (fab only).
"""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from common import DATA, Row, read, write

from contraflow.flow.solver import Euler
from contraflow.sampling.compare import floor, interval, judge
from contraflow.sampling.distances import DISTANCES, sliced_wasserstein
from contraflow.sampling.fab import Buffer
from contraflow.sampling.methods import METHODS
from contraflow.sampling.targets import TARGETS, Target, find_target
from contraflow.sampling.trainer import Estimated, FlowState, Trainer, draw, train

RATES = (1e-3, 3e-3, 1e-2)
EXTRA = ("modes", "well_error", "log_z_error")
COLUMNS = ("target", "K", "method", "learning_rate", "bounded", "seed", "solver_steps", *DISTANCES, *EXTRA)
RIVALS = ("qne", "idem")


@dataclass(frozen=True)
class Study:
    """`samples` are the K, density calls for each query point; `points` the samples that are compared."""

    file: str
    targets: tuple[str, ...]
    methods: tuple[str, ...]
    samples: tuple[int, ...]
    bounded: tuple[bool, ...]
    tuning_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    solver_steps: tuple[int, ...]
    points: int
    steps: int = 1500


STUDIES = {
    "equal": Study(
        "samplers.csv", tuple(TARGETS), tuple(METHODS), (32,), (True,), (1000,), (0, 1, 2), (100,), 2000
    ),
    "ranking": Study(
        "sampling.csv", ("two-moons", "eight-gaussians"), ("rfm", *RIVALS, "mixture"), (8, 32, 128, 500),
        (False, True), (1000, 1001), (0, 1, 2, 3, 4), (20, 100), 4000,
    ),
}  # fmt: skip


def keys_of(seeds: Any) -> tuple[Any, Any]:
    """Training keys and judging keys, each [S]: the same for all methods."""
    pairs = jax.vmap(jr.split)(jnp.stack([jr.key(s) for s in seeds]))
    return pairs[:, 0], pairs[:, 1]


def projected(trainer: Trainer, bounded: bool) -> Trainer:
    """With estimates projected into the box or not, where the method has estimates."""
    method = trainer.method
    return replace(trainer, method=replace(method, bounded=bounded)) if isinstance(method, Estimated) else trainer


def tuned(study: Study, target: Target, trainer: Trainer) -> tuple[Trainer, bool]:
    """The trainer of the best of the settings, and whether it projects estimates."""
    lanes = list(itertools.product(RATES, study.tuning_seeds))
    k_train, k_judge = keys_of([seed for _, seed in lanes])
    best = (float("inf"), RATES[0], True)
    for bounded in study.bounded:
        tried = projected(trainer, bounded)
        state = train(tried, target.log_density, k_train, jnp.asarray([rate for rate, _ in lanes]), target.dim)

        def score(flow, key, steps, tried=tried):
            k_flow, k_exact, k_slices = jr.split(key, 3)
            x = draw(tried, flow, Euler(steps), k_flow, study.points // 2)
            return sliced_wasserstein(k_slices, x, target.sample(k_exact, study.points // 2), 64)

        each = [
            jax.vmap(lambda flow, k, n=n: score(flow, k, n))(state.flow, jr.clone(k_judge)) for n in study.solver_steps
        ]
        by_rate = np.mean(each, 0).reshape(len(RATES), -1).mean(1)
        scores = [(float(s), rate, bounded) for s, rate in zip(by_rate, RATES, strict=True) if np.isfinite(s)]
        best = min([best, *scores])
    return replace(projected(trainer, best[2]), learning_rate=best[1]), best[2]


def extras(target: Target, trainer: Trainer, state: FlowState, steps: int, points: int, keys: Any) -> list[Row]:
    """What the distances do not say, by seed."""
    rows = []
    for i, key in enumerate(keys):
        one, row = jax.tree.map(lambda leaf, i=i: leaf[i], state), {}
        k_flow, k_exact = jr.split(jr.fold_in(key, 1))
        if target.name == "many-well-32":
            x = draw(trainer, one.net, Euler(steps), k_flow, points)
            exact = jnp.mean(target.sample(k_exact, 200_000)[:, ::2] > 0)
            row["well_error"] = float(jnp.mean(jnp.abs(jnp.mean(x[:, ::2] > 0, 0) - exact)))
        if isinstance(one.memory, Buffer) and target.log_z is not None:
            row["log_z_error"] = float(one.memory.log_z()) - target.log_z
        rows.append(row)
    return rows


def cell(study: Study, target: Target, method: str, samples: int) -> list[Row]:
    """Rows of one method at one K; of exact samples against exact ones."""
    if method == "exact":
        return [{"seed": i} | row for i, row in enumerate(floor(target, study.points, jr.key(77), len(study.seeds)))]
    trainer, bounded = tuned(study, target, replace(METHODS[method].with_samples(samples), steps=study.steps))
    k_train, k_judge = keys_of(study.seeds)
    state, rows = train(trainer, target.log_density, k_train, dim=target.dim), []
    for steps in study.solver_steps:
        scores = judge(target, trainer, state, steps, study.points, jr.clone(k_judge))
        more = extras(target, trainer, state, steps, study.points, jr.clone(k_judge))
        common = {"learning_rate": trainer.learning_rate, "bounded": bounded, "solver_steps": steps}
        rows += [common | {"seed": s} | a | b for s, a, b in zip(study.seeds, scores, more, strict=True)]
    return rows


def run(study: Study, file: Path) -> None:
    """Append the rows of what the file lacks."""
    done = {(row["target"], row["K"], row["method"]) for row in read(file)}
    for samples, method, name in itertools.product(study.samples, ("exact", *study.methods), study.targets):
        samples = 0 if method == "exact" else samples
        if (name, samples, method) in done:
            continue
        rows = cell(study, find_target(name, Trainer.box), method, samples)
        write(file, [{"target": name, "K": samples, "method": method} | row for row in rows], COLUMNS, "a")
        done.add((name, samples, method))
        print(name, samples, method, *(f"{row['sliced_wasserstein']:.3f}" for row in rows), flush=True)


def values(rows: list[Row], distance: str, **wanted: Any) -> list[float]:
    """By seed, of the rows that are like `wanted`."""
    return [row[distance] for row in rows if row[distance] != "" and wanted.items() <= row.items()]


def shown(numbers: list[float], digits: int) -> str:
    """Mean and 95 % bootstrap interval, or the smallest and largest of fewer than five."""
    if not numbers:
        return ""
    mean, low, high = interval(numbers) if len(numbers) >= 5 else (np.mean(numbers), min(numbers), max(numbers))
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def report(study: Study, rows: list[Row]) -> None:
    """Markdown; with several numbers of solver steps also by how much RFM at the smallest is ahead of its rivals at the
    largest (paired by seed)."""
    few, many = study.solver_steps[0], study.solver_steps[-1]
    methods = [m for m in study.methods if any(row["method"] == m for row in rows)]
    leads = RIVALS if many > few else ()
    for target, distance in itertools.product(study.targets, (*DISTANCES, *EXTRA)):
        digits = 4 if distance == "mmd2" else 3
        exact = shown(values(rows, distance, target=target, method="exact"), digits)
        heads = [f"{m} {n}" for m in methods for n in study.solver_steps] + [f"lead over {r} {many}" for r in leads]
        lines = []
        for k in study.samples:
            of = lambda m, n, k=k: values(rows, distance, target=target, K=k, method=m, solver_steps=n)  # noqa: B023
            cells = [of(m, n) for m in methods for n in study.solver_steps]
            cells += [[b - a for a, b in zip(of("rfm", few), of(r, many), strict=False)] for r in leads]
            if any(cells):
                lines.append(f"| {k} | " + " | ".join(shown(c, digits) for c in cells) + " |")
        if lines:
            print(f"\n{target}, {distance}; exact samples {exact or '-'}\n")
            print("| K | " + " | ".join(heads) + " |\n" + "|---" * (1 + len(heads)) + "|", *lines, sep="\n")


def main(
    which: Literal["equal", "ranking"],
    /,
    report_only: bool = False,
    methods: tuple[str, ...] = (),
    targets: tuple[str, ...] = (),
    samples: tuple[int, ...] = (),
    steps: int | None = None,
    out: Path = DATA,
) -> None:
    """The study `which`, or a part of it, and its tables."""
    study = STUDIES[which]
    part = {"methods": methods, "targets": targets, "samples": samples, "steps": steps}
    study = replace(study, **{k: v for k, v in part.items() if v})
    file = out / study.file
    if not report_only:
        run(study, file)
    report(study, read(file))


if __name__ == "__main__":
    tyro.cli(main)
