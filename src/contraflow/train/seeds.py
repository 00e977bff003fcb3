"""One `Run` with many seeds at once: the phases of train/loop.py and the evaluation under `vmap`, in one program.

`OUT/seeds.json` names the seeds, `OUT/seedN` is the run folder of each, as if it had been trained alone: `eval`,
`resume` and reports read it like any other. Its numbers differ from a single run's by rounding, its `seconds` are those
of all seeds together. Each seed has a replay buffer of its own, so memory grows with their number.
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from contraflow.core.settings import SCHEMA
from contraflow.core.types import UserError
from contraflow.envs import jittable
from contraflow.envs.base import Env
from contraflow.train import checkpoint
from contraflow.train.console import Progress
from contraflow.train.evaluate import evaluate_seeds
from contraflow.train.log import check_trackers
from contraflow.train.loop import Carry, epoch_seeds
from contraflow.train.offline import OfflineRun
from contraflow.train.run import (
    AnyRun,
    Result,
    check_new,
    evaluation_due,
    first_carry,
    interruptible,
    read_config,
    root_keys,
    write_config,
)
from contraflow.train.run_writer import Record, check_finite

INDEX = "seeds.json"


def train_seeds(
    run: AnyRun, seeds: Sequence[int], out: str | Path, *, trust: bool = False, quiet: bool = False
) -> list[Result]:
    """Train `run` with each of `seeds` (its own is not used) in the new folder `out`; results in their order.

    Raises UserError if the environment is not written in JAX, if a seed is missing, negative or given twice, or if
    `out` already holds something; and at the end, with all others finished, if the numbers of a seed left the finite.
    """
    folder = Path(out)
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds must be different numbers from 0 on, at least one, got {' '.join(map(str, seeds))}")
    check_new(folder)
    run = run.resolve(trust)
    runs = [replace(run, seed=seed) for seed in seeds]
    check_trackers(run.trackers)
    envs = _environments(run, trust)
    with checkpoint.full_disk_named(folder):
        folders = [folder / f"seed{seed}" for seed in seeds]
        for one, place in zip(runs, folders, strict=True):
            place.mkdir(parents=True)
            write_config(one, place)
        (folder / INDEX).write_text(json.dumps({"schema": SCHEMA, "seeds": list(seeds)}))
        return _all_sound(_drive(runs, folder, folders, envs, None, quiet))


def resume_seeds(
    out: str | Path, *, steps: int | None = None, trust: bool = False, quiet: bool = False
) -> list[Result]:
    """Continue the seeds in `out` together, from the newest checkpoint that all of them have; `steps` extends them.

    Raises UserError if they no longer agree, for one that went on alone: then each can be continued alone.
    """
    return _all_sound(_continue(seed_folders(Path(out)), Path(out), steps, trust, quiet))


def resume_together(folders: Sequence[Path], *, trust: bool = False) -> dict[int, Result | UserError]:
    """Continue the runs in `folders`, wherever they lie, together; by seed, in their order, results or why one failed.

    For runs that differ in their seeds only; without a checkpoint they start. Raises UserError, as `resume_seeds`, if
    they have no checkpoint in common, and for what keeps all of them from going on.
    """
    return _continue(folders, folders[0], None, trust, quiet=True)


def _continue(
    folders: Sequence[Path], folder: Path, steps: int | None, trust: bool, quiet: bool
) -> dict[int, Result | UserError]:
    """`folder` is what messages tell the user to continue."""
    runs = [read_config(place, trust) for place in folders]
    alone = f"continue each alone: `contraflow resume {folders[0]}`"
    if any(replace(one, seed=0) != replace(runs[0], seed=0) for one in runs):
        raise UserError(f"the runs in {folder} no longer have the same settings; {alone}")
    if steps is not None and steps < runs[0].steps:
        raise UserError(f"steps={steps} is less than the runs' own {runs[0].steps}: give the total that you want")
    newest = [checkpoint.latest(place) for place in folders]
    restored = None if None in newest else min(step for step in newest if step is not None)
    if restored is not None and any(restored not in checkpoint.steps(place) for place in folders):
        raise UserError(f"the runs in {folder} have no checkpoint in common (the first is at {restored:,}); {alone}")
    runs = [replace(one, steps=steps or one.steps) for one in runs]
    check_trackers(runs[0].trackers)
    envs = _environments(runs[0], trust)
    with checkpoint.full_disk_named(folder):
        if steps is not None:
            for one, place in zip(runs, folders, strict=True):
                write_config(one, place)
        return _drive(runs, folder, folders, envs, restored, quiet)


def _all_sound(outcomes: dict[int, Result | UserError]) -> list[Result]:
    """The results. Raises UserError naming the seeds that failed, if any did."""
    results = [outcome for outcome in outcomes.values() if isinstance(outcome, Result)]
    failed = {seed: outcome for seed, outcome in outcomes.items() if isinstance(outcome, UserError)}
    if failed:
        names = "; ".join(f"seed {seed}: {problem}" for seed, problem in failed.items())
        state = "saved" if any(result.interrupted for result in results) else "finished"
        kept = f"; the other {len(results)} are {state}" if results else ""
        raise UserError(f"{len(failed)} of {len(outcomes)} seeds failed{kept}; {names}")
    return results


def seed_folders(out: Path) -> list[Path]:
    """The run folders of the seeds trained together in `out`; [] if it is not such a folder."""
    if not (out / INDEX).is_file():
        return []
    try:
        return [out / f"seed{int(seed)}" for seed in json.loads((out / INDEX).read_text())["seeds"]]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{out / INDEX} is damaged; continue each seed alone: `contraflow resume {out}/seedN`"
        ) from None


def _environments(run: AnyRun, trust: bool) -> tuple[Any, Any]:
    """For all seeds the same two: what a jittable environment does depends on keys, not on the seed it is made with."""
    if isinstance(run, OfflineRun) or not jittable(run.env, trust=trust):
        what = f"data {run.data}" if isinstance(run, OfflineRun) else f"environment {run.env}"
        raise UserError(
            f"{what} is not written in JAX, so its seeds cannot share one program: train them one by one "
            "with --seed, or choose an environment of jax:, playground:, probe: or bandit:"
        )
    return run.environments(trust)


@jax.jit
def _take(tree: Any, i: Any) -> Any:
    """What seed number i of a stacked tree has; for several numbers, a smaller stack."""
    return jax.tree.map(lambda x: x[i], tree)


@jax.jit
def _stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def _drive(
    runs: Sequence[AnyRun], out: Path, folders: Sequence[Path], envs: tuple[Env, Env], restored: int | None, quiet: bool
) -> dict[int, Result | UserError]:
    """As `run._drive`, for all seeds in step. One that fails is left out from there on; the others are finished."""
    (env, eval_env), run = envs, runs[0]
    k_start, k_run, k_eval = (jnp.stack(keys) for keys in zip(*map(root_keys, runs), strict=True))
    places = zip(runs, folders, k_start, strict=True)
    carries = [first_carry(one, place, env, key, restored) for one, place, key in places]
    taken = int(carries[0].learner.steps)
    carry: Carry = _stack(carries)
    records = [Record(one, place, env, taken) for one, place in zip(runs, folders, strict=True)]
    for record, one in zip(records, carries, strict=True):
        record.save(taken, one)
    del carries
    live = list(range(len(runs)))  # numbers of the seeds that the carry holds
    failed: dict[int, UserError] = {}

    def save() -> None:
        for s, i in enumerate(live):
            records[i].save(taken, _take(carry, s))

    with ExitStack() as stack:
        for record in records:
            stack.enter_context(closing(record))
        signals = stack.enter_context(interruptible())
        progress = stack.enter_context(Progress(run, out, taken, quiet, [one.seed for one in runs]))
        while taken < run.steps and live and not signals:
            phase, n = run.next_phase(taken)
            before = taken
            carry, metrics = epoch_seeds(phase, run.agent, env, carry, k_run, n)
            taken = _common_step(carry, run)
            for i, values in zip(live, metrics, strict=True):
                try:
                    check_finite(values, before, taken, folders[i])
                except UserError as problem:
                    failed[i] = problem
                else:
                    records[i].metrics(taken, values | {"seeds_at_once": len(live)})
            if sound := [s for s, i in enumerate(live) if i not in failed]:
                progress.update(taken, _mean_return([metrics[s] for s in sound]))
            if len(sound) < len(live):
                live = [live[s] for s in sound]
                if not live:
                    break
                carry, k_run, k_eval = _take((carry, k_run, k_eval), jnp.array(sound))
            if evaluation_due(run, before, taken):
                try:
                    policies, keys = run.agent.policy(carry.learner.agent), jr.clone(k_eval)
                    returns = evaluate_seeds(policies, eval_env, keys, run.eval_episodes)
                except UserError as problem:
                    save()
                    remedy = f"the runs are saved: `contraflow resume {out}` once it is mended"
                    raise UserError(f"{problem}; {remedy}") from None
                for s, i in enumerate(live):
                    one = _take(carry, s)
                    records[i].evaluation(taken, one, returns[s], k_eval[s], diagnostics=phase.learns)
                    records[i].save(taken, one)
                progress.evaluated(taken, returns.mean(1))
        if signals:
            save()
    results = [Result(r.folder, taken, r.finish(bool(signals)), bool(signals)) for r in records]
    return {run.seed: failed.get(i, results[i]) for i, run in enumerate(runs)}


def _common_step(carry: Carry, run: AnyRun) -> int:
    steps = np.unique(carry.learner.steps)
    if len(steps) > 1:  # the rows of some seeds were not valid, those of others were
        raise UserError(f"the seeds of {run.env} fell out of step; train them one by one with --seed")
    return int(steps[0])


def _mean_return(metrics: list[dict[str, float]]) -> dict[str, float]:
    returns = [values["return"] for values in metrics if "return" in values]
    return {"return": float(np.mean(returns))} if returns else {}
