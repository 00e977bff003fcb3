"""Comparison of methods that train flows on one unnormalised density, with equal density calls and exact samples."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro

from contraflow.core.files import make_folder
from contraflow.core.settings import suggest
from contraflow.core.trust import Trust
from contraflow.core.types import PRNGKey, UserError
from contraflow.flow.path import VE
from contraflow.flow.solver import Drift, Euler
from contraflow.sampling.distances import distances, modes_found, require_ott
from contraflow.sampling.fab import Buffer
from contraflow.sampling.methods import METHODS
from contraflow.sampling.targets import Target, find_target
from contraflow.sampling.trainer import Estimated, FlowState, PRNGKeys, Trainer, draw, field, train


@dataclass(frozen=True)
class Settings:
    """Train one flow per method and seed, all with the same number of density calls, and compare their samples."""

    target: tyro.conf.Positional[str]
    """two-moons, eight-gaussians, forty, many-well-32; or your own module:function (x [2] -> log density)."""
    methods: Annotated[tuple[str, ...], tyro.conf.arg(metavar=f"{{{','.join(METHODS)}}} ...")] = ("rfm", "qne", "idem")
    samples: int = 128
    """K: density calls per query point."""
    steps: int = 1500
    """Updates."""
    batch: int = 64
    """Queries per update."""
    solver_steps: tuple[int, ...] = (20, 100)
    """Euler steps when sampling; every flow is evaluated at each number."""
    seeds: int = 1
    seed: int = 0
    """The first seed."""
    points: int = 4000
    """Samples of the flow, compared with the same number of exact samples."""
    width: int = 64
    learning_rate: float = 3e-3
    bounded: bool = True
    """Project estimates of E[x1 | x_t] into the box (not for fab, which makes none)."""
    box: float = 4.0
    """Half the side of a square around 0 that holds the target; idem-ve also starts from noise of this scale."""
    out: Path | None = None
    """Folder for samples.png and results.json; default runs/sample-TARGET."""
    trust: Trust = ""
    """Modules outside the library that may be imported, separated by commas; `all` allows any."""
    progress: bool = True

    def __post_init__(self):
        if min(self.seeds, *self.solver_steps, 1) < 1 or self.points < 2:
            raise ValueError("seeds and solver-steps must be at least 1, points at least 2")
        if self.seed < 0 or not self.solver_steps or not self.methods:
            raise ValueError("seed must not be negative; solver-steps and methods must not be empty")
        for method in set(self.methods) & set(METHODS):
            self.trainer(method)  # raises ValueError for values out of range

    def trainer(self, method: str) -> Trainer:
        """Returns the trainer of that method with these settings."""
        chosen = METHODS[method].with_samples(self.samples)
        if isinstance(chosen.method, Estimated):
            chosen = replace(chosen, method=replace(chosen.method, bounded=self.bounded))
        if isinstance(chosen.path, VE):  # the noise must cover the target
            chosen = replace(chosen, path=VE(self.box / 400, self.box))
        return replace(
            chosen,
            steps=self.steps,
            batch=self.batch,
            width=self.width,
            learning_rate=self.learning_rate,
            box=self.box,
        )

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / f"sample-{self.target.replace(':', '-').replace('.', '-')}"


def equal_calls(trainers: dict[str, Trainer]) -> int:
    """Returns the number of density calls that all trainers make. Raises ValueError if they differ."""
    calls = {name: trainer.critic_calls for name, trainer in trainers.items()}
    if len(set(calls.values())) != 1:
        raise ValueError(f"a comparison needs equal density calls, got {calls}")
    return next(iter(calls.values()))


def judge(
    target: Target, trainer: Trainer, state: FlowState, solver_steps: int, points: int, keys: PRNGKeys
) -> list[dict[str, float]]:
    """Returns the distances of each flow in `state` (leading axis S, keys [S]) to exact samples, drawn anew for each.

    If the target knows its modes, each row also has the fraction of modes found.
    """
    scores = []
    for i, key in enumerate(keys):
        flow = jax.tree.map(lambda leaf, i=i: leaf[i], state.flow)
        k_flow, k_exact, k_slices = jr.split(key, 3)
        x, y = draw(trainer, flow, Euler(solver_steps), k_flow, points), target.sample(k_exact, points)
        modes = {} if target.modes is None else {"modes": modes_found(x, y, target.modes)}
        scores.append(distances(k_slices, x, y) | modes)
    return scores


def floor(target: Target, points: int, key: PRNGKey, pairs: int = 5) -> list[dict[str, float]]:
    """Returns distances between two sets of exact samples, which a perfect sampler would reach."""
    rows = []
    for k in jr.split(key, pairs):
        k_x, k_y, k_slices = jr.split(k, 3)
        rows.append(distances(k_slices, target.sample(k_x, points), target.sample(k_y, points)))
    return rows


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the mean and its 95 % percentile bootstrap interval; one value gives itself, infinite values stay."""
    x = np.asarray(values, float)
    draws = np.random.default_rng(0).choice(x, (2000, len(x))).mean(1)
    if not np.isfinite(x).all():
        return float("inf"), float(x.min()), float("inf")
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(x.mean()), float(low), float(high)


def trajectories(field: Drift, x: Any, steps: int = 100):
    """Returns states [n, steps + 1, d] of the flow from x [n, d] at t = 0 to t = 1."""
    times = jnp.arange(steps) / steps

    def one(x):
        def body(x, t):
            x = Euler(1)(field, x, t, t + 1.0 / steps)
            return x, x

        return jnp.concatenate([x[None], jax.lax.scan(body, x, times)[1]])

    return jax.jit(jax.vmap(one))(x)


def exact_field(target: Target, trainer: Trainer) -> Drift | None:
    """Returns the velocity that carries the noise to the target; None if it is not known."""
    posterior_mean = target.posterior_mean
    if posterior_mean is None:
        return None

    def field(x, t):
        t = jnp.clip(t, trainer.t_min, 1.0 - trainer.t_min)
        return trainer.path.velocity(posterior_mean(trainer.path, x, t), x, t)

    return field


def compare(settings: Settings, report: Callable[[str, int, float], None] | None = None) -> dict[str, Any]:
    """Trains and evaluates every method; writes `settings.folder`/results.json and samples.png, returns the results.

    Raises UserError for an unknown method or target, a missing package, or a folder that already holds results.
    """
    require_ott()
    for name in settings.methods:
        if name not in METHODS:
            raise UserError(f"unknown method {name!r}; {suggest(name, METHODS)}")
    target = find_target(settings.target, settings.box, settings.trust)
    folder = settings.folder
    if (folder / "results.json").exists():
        raise UserError(f"{folder} already holds results; choose another --out")
    trainers = {name: settings.trainer(name) for name in dict.fromkeys(settings.methods)}
    calls = equal_calls(trainers)
    make_folder(folder)  # before training starts

    seeds = range(settings.seed, settings.seed + settings.seeds)
    keys = [jr.split(jr.key(seed)) for seed in seeds]
    k_train, k_judge = (jnp.stack([pair[i] for pair in keys]) for i in (0, 1))
    k_floor, k_x0, k_exact, k_flow = jr.split(jr.fold_in(jr.key(settings.seed), 1), 4)
    floors = floor(target, settings.points, k_floor)
    noise = jr.normal(k_x0, (120, target.dim))
    first = next(iter(trainers.values()))
    exact = exact_field(target, first)
    routes = None if exact is None else trajectories(exact, first.path.source_scale * noise)
    panels = [("exact", target.sample(k_exact, 1200), routes)]
    rows, log_zs = [], {"exact": target.log_z}
    for name, trainer in trainers.items():
        progress = None if report is None else partial(report, name)
        k_same = jr.clone(k_train)  # the same keys for all methods
        state = train(trainer, target.log_density, k_same, dim=target.dim, progress=progress)
        log_z = jax.vmap(Buffer.log_z)(state.memory).tolist() if isinstance(state.memory, Buffer) else []
        log_zs |= {name: log_z} if log_z else {}
        for steps in settings.solver_steps:
            scores = judge(target, trainer, state, steps, settings.points, jr.clone(k_judge))
            rows += [
                {"method": name, "solver_steps": steps, "seed": seed, **s}
                for seed, s in zip(seeds, scores, strict=True)
            ]
        flow = jax.tree.map(lambda leaf: leaf[0], state.flow)
        shown = draw(trainer, flow, Euler(settings.solver_steps[0]), jr.clone(k_flow), 1200)
        steps = settings.solver_steps[0]
        routes = trajectories(field(flow), trainer.path.source_scale * noise, steps)
        panels.append((f"{name}, {steps} steps", shown, routes))
    results = {"settings": asdict(settings), "density_calls": calls, "floor": floors, "log_z": log_zs, "rows": rows}
    (folder / "results.json").write_text(json.dumps(results, indent=1, default=str))
    from contraflow.sampling.plot import plot_comparison

    plot_comparison(folder / "samples.png", target, panels, settings.box)
    return results
