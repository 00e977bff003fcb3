"""Two cloned policies composed: does the composition beat both parents?

    python benchmarks/delay.py train --tasks gap --methods bc     # the parents
    python benchmarks/compose.py                                  # docs/data/compose.csv

Parents are clones of the same demonstrations from different seeds (`same`), or one of those that pass the obstacle on
the left and one of those that pass on the right (`halves`, trained here). The weight is searched on 200 episodes and
reported on 400 others; "wins" says whether it beats both parents there by more than their 95 % interval.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from common import DATA, Row, machine, write
from delay import EXECUTE, HORIZON, NOISE, TASKS, Noisy

from contraflow.agents.offline.bc import BC
from contraflow.core.optim import Optim
from contraflow.experiments.weights import Weights, grid, search_weights
from contraflow.flow.model import Ddim, FlowSpec
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.composed import Rule, composed
from contraflow.runtime.delayed import Delayed, simulate
from contraflow.runtime.policy import Policy, load
from contraflow.training.run import Run, train
from contraflow.training.sources import Dataset


@dataclass(frozen=True)
class Options:
    runs: Path = Path("runs/delay")
    out: Path = DATA / "compose.csv"


def played(network: Any, spec: Any, episodes: int, seed: int) -> np.ndarray:
    """Success of a policy, every 4 steps of a chunk, without delay."""
    env = Noisy(TASKS["gap"][0](episodes), NOISE["gap"])
    act = Delayed(Policy(network, spec, "", seed), episodes, 0, "switch", EXECUTE)
    return simulate(act, env, seed).terminated.astype(float)


def together(parents: Any, rule: Rule, spec: Any, weights: Weights, episodes: int, seed: int) -> np.ndarray:
    return played(composed(parents, weights, rule), spec, episodes, seed)


def half(options: Options, side: int, seed: int) -> Policy:
    """A clone of the demonstrations that end on one side."""
    folder = options.runs / f"half{side}" / f"seed{seed}"
    if not folder.exists():
        rows = dict(np.load(options.runs / "gap.npz"))
        ends = np.flatnonzero(rows["terminated"])  # one for each demonstration
        which = (rows["next_obs"][ends, 0] > 0) == bool(side)
        keep = np.repeat(which, np.diff(ends, prepend=-1))
        n = len(keep)
        path = options.runs / f"half{side}.npz"
        np.savez(path, **{k: v[keep] if np.ndim(v) and len(v) == n else v for k, v in rows.items()})
        agent = BC(FlowSpec(solver=Ddim(10), network=ResidualMLP(64, 2, 32)), optim=Optim(1e-3, max_grad_norm=10.0))
        source = Dataset(str(path), "", 256, HORIZON, EXECUTE)
        train(Run(agent, source, 2000, None, 2000, log_every=2000, seed=seed, trackers=()), folder, quiet=True)
    return load(folder)


def main(options: Options) -> None:
    """A row for each pair and rule."""
    clones = [load(options.runs / "gap-bc" / f"seed{seed}") for seed in range(3)]
    cases = [("same", f"{i},{j}", clones[i], clones[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    cases += [("halves", str(seed), half(options, 0, seed), half(options, 1, seed)) for seed in range(3)]
    rows: list[Row] = []
    for kind, pair, one, two in cases:
        parents = one.network, two.network
        for rule in ("convex", "or"):
            play = partial(together, parents, rule, one.spec)
            found = search_weights(play, grid(2)[::-1], 200, 400, seed=1)
            ends, score = [alone.mean for alone in found.alone], found.fresh.mean
            half_width = 1.96 * np.sqrt(sum(p * (1 - p) for p in (score, max(ends))) / 400)
            row = {"parents": kind, "pair": pair, "rule": rule, "first": ends[0], "second": ends[1]}
            row |= {"weight": found.weights[1], "composed": score, "wins": bool(score - max(ends) > half_width)}
            row |= {f"w{weights[1]:g}": tried.mean for weights, tried in found.tried.items()}
            rows.append(row)
            print(row, flush=True)
            write(options.out, rows)


if __name__ == "__main__":
    print(machine())
    main(tyro.cli(Options))
