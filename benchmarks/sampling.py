"""Does the ranking of 2601.08136 hold: RFM with 20 solver steps ahead of QNE and iDEM with 100, at equal density calls?

    python benchmarks/sampling.py            # benchmarks/results/sampling.csv, appended as it goes; run again to resume
    python benchmarks/sampling.py --report   # only the tables and docs/img/sampling_study.png from what is there

For each target, K and method: six settings (three learning rates; estimates projected into the box or not) are tried
on two seeds, the best by sliced Wasserstein (mean over 20 and 100 solver steps) is trained on five fresh seeds. All
methods share seeds, network, queries, updates and K, hence the number of density calls. The file sampling_targets.csv
beside the other holds the cause: squared bias and variance of the velocity target by t, against the closed form.
"""

import csv
import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from tables import append

from contraflow.flow.path import Linear
from contraflow.flow.solver import Euler
from contraflow.sampling.compare import floor, interval, judge
from contraflow.sampling.distances import DISTANCES
from contraflow.sampling.distances import sliced_wasserstein
from contraflow.sampling.methods import METHODS
from contraflow.sampling.targets import Target, find_target
from contraflow.sampling.trainer import Estimated, Trainer, draw, train

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parents[1] / "docs" / "img" / "sampling_study.png"
TARGETS = ("two-moons", "eight-gaussians")
SAMPLES = (8, 32, 128, 500)
RATES = (1e-3, 3e-3, 1e-2)
TUNING_SEEDS = (1000, 1001)
SEEDS = (0, 1, 2, 3, 4)
SOLVER_STEPS = (20, 100)
POINTS = 4000
TIMES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
COLUMNS = ("target", "K", "method", "phase", "learning_rate", "bounded", "seed", "solver_steps", *DISTANCES)
RIVALS = ("qne", "idem")


@dataclass(frozen=True)
class Settings:
    """Train, judge, and report."""

    report: bool = False
    """Only report."""
    methods: tuple[str, ...] = ("rfm", "qne", "idem", "mixture")
    samples: tuple[int, ...] = SAMPLES
    steps: int = 1500


def keys_of(seeds) -> tuple[Any, Any]:
    """Training keys and judging keys, each [S]: the same for all methods."""
    pairs = jax.vmap(jr.split)(jnp.stack([jr.key(s) for s in seeds]))
    return pairs[:, 0], pairs[:, 1]


def estimated(trainer: Trainer) -> Estimated:
    """Its method, one of those that regress on estimates."""
    assert isinstance(trainer.method, Estimated)
    return trainer.method


def changed(trainer: Trainer, bounded: bool, **fields: Any) -> Trainer:
    """The trainer with estimates projected into the box or not, and other settings of its own."""
    return replace(trainer, method=replace(estimated(trainer), bounded=bounded), **fields)


def tune(target: Target, trainer: Trainer) -> tuple[Trainer, list[dict]]:
    """The best of the six settings, and a row for each."""
    lanes = list(itertools.product(RATES, TUNING_SEEDS))
    k_train, k_judge = keys_of([seed for _, seed in lanes])
    rates = jnp.asarray([rate for rate, _ in lanes])
    rows = []
    for bounded in (False, True):
        tried = changed(trainer, bounded)
        state = train(tried, target.log_density, k_train, rates)
        for steps in SOLVER_STEPS:
            for i, ((rate, seed), key) in enumerate(zip(lanes, k_judge, strict=True)):
                net = jax.tree.map(lambda leaf, i=i: leaf[i], state.net)
                k_flow, k_exact, k_slices = jr.split(key, 3)
                x = draw(tried, net, Euler(steps), k_flow, POINTS // 2)
                score = float(sliced_wasserstein(k_slices, x, target.sample(k_exact, POINTS // 2), 64))
                setting = {"phase": "tune", "learning_rate": rate, "bounded": bounded}
                rows.append(setting | {"seed": seed, "solver_steps": steps, "sliced_wasserstein": score})

    def mean_score(setting: tuple[float, bool]) -> float:
        chosen = [r["sliced_wasserstein"] for r in rows if (r["learning_rate"], r["bounded"]) == setting]
        return float(np.mean(chosen)) if np.isfinite(chosen).all() else float("inf")

    rate, bounded = min(itertools.product(RATES, (True, False)), key=mean_score)
    return changed(trainer, bounded, learning_rate=rate), rows


def study_cell(target: Target, trainer: Trainer) -> list[dict]:
    """Tuning and final rows of one method at one K."""
    best, rows = tune(target, trainer)
    k_train, k_judge = keys_of(SEEDS)
    state = train(best, target.log_density, k_train)
    setting = {"phase": "final", "learning_rate": best.learning_rate, "bounded": estimated(best).bounded}
    for steps in SOLVER_STEPS:
        scores = judge(target, best, state, steps, POINTS, k_judge)
        rows += [setting | {"seed": s, "solver_steps": steps, **d} for s, d in zip(SEEDS, scores, strict=True)]
    return rows


def run_study(settings: Settings, file: Path) -> None:
    """Tune and train what `file` lacks; rows are appended method by method."""
    rows = read(file)
    for samples, method, name in itertools.product(settings.samples, ("exact", *settings.methods), TARGETS):
        samples = 0 if method == "exact" else samples
        if any((r["target"], r["K"], r["method"], r["phase"]) == (name, samples, method, "final") for r in rows):
            continue
        target = find_target(name, Trainer.box)
        if method == "exact":
            common = {"phase": "final", "learning_rate": 0.0, "bounded": False, "solver_steps": 0}
            new = [common | {"seed": i, **d} for i, d in enumerate(floor(target, POINTS, jr.key(77), pairs=10))]
        else:
            new = study_cell(target, replace(METHODS[method].with_samples(samples), steps=settings.steps))
        new = [{"target": name, "K": samples, "method": method, **row} for row in new]
        append(file, rounded(new), COLUMNS)
        rows += new
        print(
            name,
            samples,
            method,
            *(f"{r['solver_steps']}:{r['sliced_wasserstein']:.3f}" for r in new[-10:]),
            flush=True,
        )


def target_errors(settings: Settings, file: Path, queries: int = 128, repeats: int = 32) -> None:
    """Squared bias and variance per dimension of the velocity target, and the mean effective sample size, by t."""
    columns = ("target", "K", "method", "bounded", "t", "bias2", "variance", "ess")
    done = {(r["target"], r["K"], r["method"]) for r in read(file)}
    path = Linear()
    for name, samples, method in itertools.product(TARGETS, settings.samples, settings.methods):
        if (name, samples, method) in done:
            continue
        target = find_target(name, Trainer.box)
        exact_mean = target.posterior_mean
        assert exact_mean is not None
        estimator = estimated(METHODS[method].with_samples(samples)).estimator

        @jax.jit
        def one_time(key, t, target=target, estimator=estimator, exact_mean=exact_mean):
            """Squared bias and variance of the velocity target at one time, projected into the box or not; mean ESS."""
            k_x1, k_x0, k_support, k_mean = jr.split(key, 4)
            x1 = target.sample(k_x1, queries)
            x_t = jax.vmap(path.perturb, (0, 0, None))(jr.normal(k_x0, x1.shape), x1, t)
            support = target.sample(k_support, Estimated.particles)
            exact = jax.vmap(lambda x: exact_mean(path, x, t))(x_t)

            def repeat(key):
                return jax.vmap(lambda k, x: estimator(k, path, target.log_density, x, t, support))(
                    jr.split(key, queries), x_t
                )

            posterior = jax.lax.map(repeat, jr.split(k_mean, repeats))
            out = []
            for mean in (posterior.mean, jnp.clip(posterior.mean, -Trainer.box, Trainer.box)):
                variance = jnp.mean(jnp.var(mean, 0, ddof=1)) / (1 - t) ** 2
                bias2 = jnp.mean((jnp.mean(mean, 0) - exact) ** 2) / (1 - t) ** 2 - variance / repeats
                out.append((bias2, variance))
            return out, jnp.mean(posterior.ess)

        rows = []
        for t in TIMES:
            pairs, ess = one_time(jr.key(5), jnp.asarray(t))
            for bounded, (bias2, variance) in zip((False, True), pairs, strict=True):
                common = {"target": name, "K": samples, "method": method, "bounded": bounded, "t": t}
                rows.append(common | {"bias2": float(bias2), "variance": float(variance), "ess": float(ess)})
        append(file, rounded(rows), columns)
        print("targets", name, samples, method, flush=True)


def rounded(rows: list[dict]) -> list[dict]:
    return [{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]


def read(file: Path) -> list[dict]:
    """Rows with numbers for numbers."""
    if not file.exists():
        return []

    def value(text: str) -> Any:
        if text in ("True", "False"):
            return text == "True"
        try:
            return int(text) if text.isdigit() else float(text)
        except ValueError:
            return text

    with file.open(newline="") as stream:
        return [{k: value(v) for k, v in row.items()} for row in csv.DictReader(stream)]


def scores(rows: list[dict], target: str, samples: int, method: str, steps: int, distance: str) -> list[float]:
    """By seed."""
    wanted = (target, samples, method, steps, "final")
    return [r[distance] for r in rows if (r["target"], r["K"], r["method"], r["solver_steps"], r["phase"]) == wanted]


def print_report(rows: list[dict], distance: str) -> None:
    """Markdown: mean and 95 % interval by K and method, and by how much RFM at 20 steps leads (paired by seed)."""

    def cell(values: list[float], digits: int = 4 if distance == "mmd2" else 3) -> str:
        if not values:
            return ""
        mean, low, high = interval(values)
        return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    methods = [m for m in METHODS if any(r["method"] == m for r in rows)]
    heads = [f"{m} {s}" for m in methods for s in SOLVER_STEPS]
    for target in TARGETS:
        print(f"\n{target}, {distance}; floor {cell(scores(rows, target, 0, 'exact', 0, distance))}\n")
        print("| K | " + " | ".join(heads) + " | " + " | ".join(f"lead over {r} 100" for r in RIVALS) + " |")
        print("|---" * (1 + len(heads) + len(RIVALS)) + "|")
        for samples in SAMPLES:
            cells = [scores(rows, target, samples, m, s, distance) for m in methods for s in SOLVER_STEPS]
            if not any(cells):
                continue
            ours = scores(rows, target, samples, "rfm", 20, distance)
            leads = [
                [b - a for a, b in zip(ours, scores(rows, target, samples, r, 100, distance), strict=False)]
                for r in RIVALS
            ]
            print(f"| {samples} | " + " | ".join(map(cell, [*cells, *leads])) + " |")


def plot(rows: list[dict], file: Path) -> None:
    """Sliced Wasserstein distance against K, with 95 % intervals; only what has been run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.1), layout="constrained")
    FigureCanvasAgg(figure)
    styles = {"rfm": ("#1f4e8c", "o", 20), "qne": ("#d9822b", "s", 100), "idem": ("#7a3e9d", "^", 100)}
    styles |= {"mixture": ("#2e8b57", "D", 20)}
    for axes, target in zip(figure.subplots(1, 2, sharey=True), TARGETS, strict=True):
        for method, (colour, marker, steps) in styles.items():
            means = {}
            for samples in SAMPLES:
                values = scores(rows, target, samples, method, steps, "sliced_wasserstein")
                if values and np.isfinite(values).all():
                    means[samples] = interval(values)
            if not means:
                continue
            k = list(means)
            mean, low, high = np.array([means[s] for s in k]).reshape(-1, 3).T
            error = [mean - low, high - mean]
            axes.errorbar(
                k, mean, error, color=colour, marker=marker, ms=4, lw=1.4, capsize=2, label=f"{method}, {steps} steps"
            )
        level = interval(scores(rows, target, 0, "exact", 0, "sliced_wasserstein"))[0]
        axes.axhline(level, color="0.35", lw=1, ls="--")
        axes.text(8, level * 1.06, "exact samples", fontsize=7.5, color="0.35")
        axes.set(xscale="log", yscale="log", title=target, xlabel="density calls per query, K")
        run = sorted({int(row["K"]) for row in rows if row["K"] != 0})
        axes.set_xticks(run, [str(s) for s in run])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("sliced Wasserstein to exact samples")
    ticks = [0.03, 0.05, 0.1, 0.2, 0.5, 1.0]
    figure.axes[0].set_yticks(ticks, [str(t) for t in ticks])
    figure.axes[0].legend(frameon=False, fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


def main() -> None:
    """The study, its tables and its picture."""
    settings = tyro.cli(Settings, description=__doc__)
    RESULTS.mkdir(exist_ok=True)
    if not settings.report:
        target_errors(settings, RESULTS / "sampling_targets.csv")
        run_study(settings, RESULTS / "sampling.csv")
    rows = read(RESULTS / "sampling.csv")
    for distance in DISTANCES:
        print_report(rows, distance)
    plot(rows, PICTURE)


if __name__ == "__main__":
    main()
