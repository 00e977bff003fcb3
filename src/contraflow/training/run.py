"""`train`: the driver around the stages of a run, whatever its source; `resume`; and a run as a file.

Seeds are an axis. Where the environment is written in JAX all of them are trained by one program, each into a folder
that is that of an ordinary run, and one seed is no special case; a host environment takes them one after the other.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from contraflow.agents import classes, needs
from contraflow.agents.base import Agent
from contraflow.agents.online.rfm import RFM
from contraflow.core import settings
from contraflow.core.files import full_disk_named, locked, make_folder, read_json, write_json
from contraflow.core.interrupt import noted
from contraflow.core.trust import Trust
from contraflow.core.types import PRNGKey, UserError
from contraflow.training import checkpoint, frozen, pretrained
from contraflow.training.console import Progress
from contraflow.training.evaluate import Episodes, evaluate_seeds
from contraflow.training.log import TrackerName, check_trackers
from contraflow.training.loop import Carry, epoch, next_due, of_seed, reset, stacked
from contraflow.training.run_writer import RunWriter, check_finite
from contraflow.training.sources import Conditions, Replay, Rollouts, Source
from contraflow.training.sources.base import Opened, check_counts
from contraflow.training.sources.dataset import recorded

INDEX = "seeds.json"
SATURATED = 0.01  # share of targets beyond the range of a critic from which on that is said


@dataclass(frozen=True)
class Run:
    """One agent, one source of experience and one seed."""

    agent: Agent = field(default_factory=RFM)
    source: Source = field(default_factory=Replay)
    steps: int = 100_000
    """Total steps, summed over parallel environments and with the random ones; on recorded data, gradient steps."""
    pretrained: str | None = None
    """Folder of a run or policy to start from: its flow, normalisation and chunk length."""
    eval_every: int = 10_000
    """Steps between two evaluations, each with a checkpoint."""
    eval_episodes: int = 10
    """Episodes of each evaluation."""
    log_every: int = 1_000
    """Steps between two rows of metrics."""
    seed: int = 0
    """Seed of all random numbers."""
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Trackers that get the metrics; metrics.jsonl and eval.csv are always written."""

    def __post_init__(self):
        check_counts(self, "steps", "eval_every", "eval_episodes", "log_every")
        if self.seed < 0:
            raise ValueError(f"--seed must not be negative, got {self.seed}")
        learns = needs(self.agent)
        recorded = hasattr(self.source, "data")
        own = {"rollout": Rollouts, "conditions": Conditions}
        unfit = any((learns == need) != isinstance(self.source, kind) for need, kind in own.items())
        if unfit or (learns == "dataset" and not recorded):
            kind = type(self.agent).__name__
            raise ValueError(f"{kind} learns from a {learns}, not from {type(self.source).__name__}")
        self.source.check(self.agent, self.steps)

    @property
    def env(self) -> str:
        """Id of the environment; empty where there is none."""
        return self.source.env

    @property
    def total(self) -> int:
        """Steps that will be taken: whole iterations."""
        return self.source.total(self.steps)

    def resolve(self, trust: Trust) -> "Run":
        """The run as it will be written down: with what comes from the data and the pretrained policy, and with numbers
        for what depends on the budget."""
        run = pretrained.settle(self, trust)
        source = frozen.settled(run.source, trust)
        if not source.env and getattr(source, "data", ""):
            source = replace(source, env=recorded(source).env or "")
        return replace(run, source=source.resolved(run.steps))


@dataclass(frozen=True)
class Result:
    """What a run ended with: its folder, its steps, and the returns of the last evaluation."""

    folder: Path
    steps: int
    returns: np.ndarray
    interrupted: bool = False


Outcomes = dict[int, Result | UserError]


def train(run: Run, out: str | Path, *, trust: Trust = "", quiet: bool = False) -> Result:
    """Train from the start in the new folder `out`. Raises UserError if `out` already holds something."""
    return _one(_start([run.resolve(trust)], Path(out), [Path(out)], trust, quiet))


def train_seeds(
    run: Run, seeds: Sequence[int], out: str | Path, *, trust: Trust = "", quiet: bool = False
) -> list[Result]:
    """Train `run` with each of `seeds` (its own is not used), in `out`/seedN of the new folder `out`; results in order.

    Raises UserError if a seed is missing, negative or given twice, or if `out` already holds something; and at the end,
    with all others finished, if a seed failed.
    """
    folder = Path(out)
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds must be different numbers from 0 on, at least one, got {' '.join(map(str, seeds))}")
    run = run.resolve(trust)
    runs = [replace(run, seed=seed) for seed in seeds]
    return _sound(_start(runs, folder, [folder / f"seed{seed}" for seed in seeds], trust, quiet))


def resume(out: str | Path, *, steps: int | None = None, trust: Trust = "", quiet: bool = False) -> Result:
    """Continue the run in `out` from its newest checkpoint, or from the start if it has none; `steps` extends it.

    Bitwise the uninterrupted run for jittable environments; host simulators start new episodes.
    """
    return _one(_continue([Path(out)], Path(out), steps, trust, quiet))


def resume_seeds(out: str | Path, *, steps: int | None = None, trust: Trust = "", quiet: bool = False) -> list[Result]:
    """Continue the seeds in `out`; those of one program from the newest checkpoint that all have. `steps` extends them.

    Raises UserError if they no longer agree, for one that went on alone: then each can be continued alone.
    """
    return _sound(_continue(seed_folders(Path(out)), Path(out), steps, trust, quiet))


def resume_together(folders: Sequence[Path], *, trust: Trust = "") -> Outcomes:
    """Continue the runs in `folders`, wherever they lie, as `resume_seeds` does; by seed, results or why one failed."""
    return _continue(folders, folders[0], None, trust, quiet=True)


def progress(out: str | Path) -> int:
    """Steps of the newest complete checkpoint of a run; -1 if it has none. Raises UserError if `out` is no run."""
    check_run(Path(out))
    step = checkpoint.latest(Path(out))
    return -1 if step is None else step


def seed_folders(out: Path) -> list[Path]:
    """The run folders of the seeds trained together in `out`; [] if it is not such a folder."""
    if not (out / INDEX).is_file():
        return []
    try:
        return [out / f"seed{int(seed)}" for seed in read_json(out / INDEX)["seeds"]]
    except (UserError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{out / INDEX} is damaged; continue each seed alone: `contraflow resume {out}/seedN`"
        ) from None


# a run as a file


def write_config(run: Run, folder: Path) -> None:
    data = {"schema": settings.SCHEMA, "version": settings.version(), "run": settings.to_json(run, "run")}
    write_json(folder / "config.json", data)


def check_run(path: Path) -> Path:
    """The config.json of a run folder, or itself. Raises UserError if there is none."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        what = (
            f"{path} does not exist" if not path.exists() else f"{path} is not the folder of a run ({file} is missing)"
        )
        raise UserError(f"{what}: give the folder that --out named")
    return file


def read_config(path: Path, trust: Trust = "") -> Run:
    """The Run of a run folder or of a config.json file. Raises UserError if it is not one of ours."""
    file = check_run(path)
    data = read_json(file)
    settings.check_schema(data, file)
    if not isinstance(data.get("run"), dict):
        raise UserError(f"{file} does not describe a run")
    run = settings.from_json(data["run"], Run, trust, "run", classes())
    if not isinstance(run, Run):
        raise UserError(f"{file} does not describe a run")
    return run


def check_new(folder: Path) -> None:
    """Raise UserError if `folder` already holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder} already exists: choose another --out, or continue it with `contraflow resume {folder}`"
        )


# driving


def _start(runs: list[Run], out: Path, folders: list[Path], trust: Trust, quiet: bool) -> Outcomes:
    check_new(out)
    check_trackers(runs[0].trackers)
    for run in runs:
        settings.to_json(run, "run")  # refuses, before any work, what could not be read back
    with closing(_opened(runs[0], trust)) as opened, full_disk_named(out):
        made = [place for folder in folders for place in make_folder(folder)]
        with ExitStack() as stack:
            for folder in folders:
                stack.enter_context(locked(folder))
            for run, folder in zip(runs, folders, strict=True):
                write_config(run, folder)
            if folders != [out]:
                write_json(out / INDEX, {"schema": settings.SCHEMA, "seeds": [run.seed for run in runs]})
            try:
                return _train(runs, folders, out, opened, [None] * len(runs), trust, quiet)
            except _Untrained as problem:
                for place in made:
                    shutil.rmtree(place, ignore_errors=True)
                raise UserError(str(problem)) from None


class _Untrained(UserError):
    """It ended before anything was learned: the folder is of no use."""


def _continue(folders: Sequence[Path], out: Path, steps: int | None, trust: Trust, quiet: bool) -> Outcomes:
    """`out` is what messages tell the user to continue."""
    runs = [read_config(folder, trust) for folder in folders]
    if any(replace(one, seed=0) != replace(runs[0], seed=0) for one in runs):
        raise UserError(f"the runs in {out} no longer have the same settings; {_alone(folders)}")
    if steps is not None and steps < runs[0].steps:
        raise UserError(f"--steps {steps} is less than the run's own {runs[0].steps}: give the total that you want")
    runs = [replace(one, steps=steps or one.steps) for one in runs]
    check_trackers(runs[0].trackers)
    with ExitStack() as stack:
        for folder in folders:
            stack.enter_context(locked(folder))
        opened = stack.enter_context(closing(_opened(runs[0], trust)))
        restored = [checkpoint.latest(folder) for folder in folders]
        if len(set(restored)) > 1 and _in_one_program(opened):
            restored = [_common(folders, restored, out)] * len(folders)
        stack.enter_context(full_disk_named(out))
        if steps is not None:
            for one, folder in zip(runs, folders, strict=True):
                write_config(one, folder)
        return _train(runs, folders, out, opened, restored, trust, quiet)


def _common(folders: Sequence[Path], newest: list[int | None], out: Path) -> int | None:
    """The newest checkpoint that all have; None, the start, where one has none."""
    if None in newest:
        return None
    step = min(step for step in newest if step is not None)
    if any(step not in checkpoint.steps(folder) for folder in folders):
        raise UserError(f"the runs in {out} have no checkpoint in common (the first is at {step:,}); {_alone(folders)}")
    return step


def _alone(folders: Sequence[Path]) -> str:
    return f"continue each alone: `contraflow resume {folders[0]}`"


def _opened(run: Run, trust: Trust) -> Opened:
    opened = run.source.open(run, trust)
    try:
        pretrained.check_fit(run, opened.world.spec, trust)
    except UserError:
        opened.close()
        raise
    return opened


def _in_one_program(opened: Opened) -> bool:
    env = opened.world.env
    return env is None or env.spec.jittable


def _train(
    runs: list[Run],
    folders: Sequence[Path],
    out: Path,
    opened: Opened,
    restored: Sequence[int | None],
    trust: Trust,
    quiet: bool,
) -> Outcomes:
    """All seeds in one program, or one after the other, each in environments of its own."""
    if _in_one_program(opened) or len(runs) == 1:
        return _drive(runs, folders, out, opened, restored[0], trust, quiet)
    outcomes: Outcomes = {}
    for run, folder, step in zip(runs, folders, restored, strict=True):
        if any(isinstance(outcome, Result) and outcome.interrupted for outcome in outcomes.values()):
            outcomes[run.seed] = Result(folder, max(step or 0, 0), np.zeros(0), interrupted=True)
            continue
        try:
            with closing(_opened(run, trust)) as own:
                outcomes |= _drive([run], [folder], folder, own, step, trust, quiet)
        except UserError as problem:
            outcomes[run.seed] = problem
    return outcomes


def _one(outcomes: Outcomes) -> Result:
    (outcome,) = outcomes.values()
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


def _sound(outcomes: Outcomes) -> list[Result]:
    """The results. Raises UserError naming the seeds that failed, if any did."""
    results = [outcome for outcome in outcomes.values() if isinstance(outcome, Result)]
    failed = {seed: outcome for seed, outcome in outcomes.items() if isinstance(outcome, UserError)}
    if failed:
        names = "; ".join(f"seed {seed}: {problem}" for seed, problem in failed.items())
        state = "saved" if any(result.interrupted for result in results) else "finished"
        kept = f"; the other {len(results)} are {state}" if results else ""
        raise UserError(f"{len(failed)} of {len(outcomes)} seeds failed{kept}; {names}")
    return results


def root_keys(run: Run) -> tuple[PRNGKey, PRNGKey, PRNGKey]:
    """Keys of the start, of the loop and of the evaluations."""
    k_start, k_run, k_eval = jr.split(jr.key(run.seed), 3)
    return k_start, k_run, k_eval


def about(run: Run, opened: Opened) -> dict[str, Any]:
    """What a checkpoint says of its run; the number of steps may be extended."""
    whole = settings.to_json(run, "run")
    del whole["steps"]
    return {"settings": whole, "data": opened.digest}


def first_carry(run: Run, folder: Path, opened: Opened, key: PRNGKey, step: int | None, trust: Trust = "") -> Carry:
    """The first carry, or the one of checkpoint `step`."""
    k_init, k_env = jr.split(key)
    env, spec, found = opened.world.env, opened.world.spec, pretrained.load(run, trust)

    def first(key: PRNGKey) -> Any:
        learner, agent = run.source.learner(run.agent, opened, key), cast(Any, run.agent)
        # A pretrained policy may bring what a fresh state does not have, such as normalisation.
        return replace(learner, agent=agent.adopt(learner.agent, found[0])) if found else learner

    if step is None:
        learner = first(k_init)
        env_state, obs = reset(env, k_env) if env else (None, None)
        # Copied, because a donated carry must not hold one buffer twice, and `obs` may be part of the state.
        return Carry(learner, env_state, jax.tree.map(jnp.copy, obs) if env and spec.jittable else obs)
    shapes = jax.eval_shape(first, k_init)
    if env and spec.jittable:
        return checkpoint.load(folder, step, Carry(shapes, *jax.eval_shape(env.reset, k_env)), about(run, opened))
    learner = checkpoint.load(folder, step, Carry(shapes, None, None), about(run, opened)).learner
    if env is None:
        return Carry(learner, None, None)
    # The episodes of a host simulator ended with its process: what was known of them goes.
    learner = jax.tree.map(lambda x: x.cut() if hasattr(x, "cut") else x, learner, is_leaf=lambda x: hasattr(x, "cut"))
    return Carry(replace(learner, returns=learner.returns * 0), *reset(env, jr.fold_in(k_env, step)))


def _drive(
    runs: Sequence[Run],
    folders: Sequence[Path],
    out: Path,
    opened: Opened,
    restored: int | None,
    trust: Trust,
    quiet: bool,
) -> Outcomes:
    """Train these seeds in step. One that fails is left out from there on; the others are finished."""
    run, world, together = runs[0], opened.world, _in_one_program(opened)
    k_start, k_run, k_eval = (jnp.stack(keys) for keys in zip(*map(root_keys, runs), strict=True))
    group = out.name if len(runs) > 1 else None
    with ExitStack() as stack:
        signals = stack.enter_context(noted())
        stack.enter_context(_memory_named(folders[0]))
        with _started(restored):
            places = zip(runs, folders, k_start, strict=True)
            carries = [first_carry(one, place, opened, key, restored, trust) for one, place, key in places]
        taken = int(carries[0].learner.steps)
        writers = [
            stack.enter_context(closing(RunWriter(one, place, world, taken, about(one, opened), group)))
            for one, place in zip(runs, folders, strict=True)
        ]
        for writer, one in zip(writers, carries, strict=True):
            writer.save(taken, one)
            writer.restore_best(taken, one)
        carry: Carry = stacked(carries) if together else carries[0]
        del carries
        live = list(range(len(runs)))  # numbers of the seeds that the carry holds
        failed: dict[int, UserError] = {}
        warned = ""
        shown = stack.enter_context(Progress(_header(runs, taken, out), run.total, taken, quiet))
        for note in opened.notes:
            shown.note(f"note: {note}")

        def one_of(s: int) -> Carry:
            return of_seed(carry, s) if together else carry

        def save() -> None:
            for s, i in enumerate(live):
                writers[i].save(taken, one_of(s))

        def iterated() -> bool:
            signals.started = True
            return bool(signals)

        while taken < run.steps and live and not signals:
            stage, n = run.source.stage(run.agent, taken, next_due(run, taken))
            before = taken
            carry, metrics, error = epoch(stage, run.agent, world, carry, k_run, n, iterated)
            taken = _common_step(carry, run)
            for i, values in zip(live, metrics, strict=True):
                try:
                    check_finite(values, before, taken, folders[i])  # a diverged network may be what caused `error`
                except UserError as problem:
                    failed[i] = problem
                else:
                    writers[i].metrics(taken, values | ({"seeds_at_once": len(live)} if len(runs) > 1 else {}))
            sound = [s for s, i in enumerate(live) if i not in failed]
            if sound and not warned and (warned := _saturation([metrics[s] for s in sound])):
                shown.note(warned)
            if sound:
                shown.update(stage.name, taken, _mean_return([metrics[s] for s in sound]))
            if len(sound) < len(live):
                live = [live[s] for s in sound]
                if not live:
                    break
                carry, k_run, k_eval = of_seed((carry, k_run, k_eval), jnp.array(sound))
            due = taken // run.eval_every > before // run.eval_every or taken >= run.steps
            found = None
            if due and error is None and opened.evaluation is not None:
                policies = [run.agent.policy(one_of(s).learner.agent) for s in range(len(live))]
                try:
                    found = evaluate_seeds(policies, opened.evaluation, jr.clone(k_eval), run.eval_episodes)
                except UserError as problem:
                    error = problem
            if error is not None:
                save()
                raise UserError(f"{error}; what was learned is saved: `contraflow resume {out}` once it is fixed")
            if found is not None:
                for s, i in enumerate(live):
                    own = Episodes(found.returns[s], None if found.success is None else found.success[s])
                    writers[i].evaluation(taken, one_of(s), own, k_eval[s], stage.learns)
                shown.evaluated(taken, *found)
            elif due:
                save()
        if signals:
            save()
    results = [Result(w.folder, taken, w.finish(bool(signals)), bool(signals)) for w in writers]
    return {run.seed: failed.get(i, results[i]) for i, run in enumerate(runs)}


def _common_step(carry: Carry, run: Run) -> int:
    steps = np.unique(carry.learner.steps)
    if len(steps) > 1:  # the rows of some seeds were not valid, those of others were
        raise UserError(f"the seeds of {run.env} fell out of step; train them one by one with --seed")
    return int(steps[0])


def _mean_return(metrics: list[dict[str, float]]) -> dict[str, float]:
    returns = [values["return"] for values in metrics if "return" in values]
    return {"return": float(np.mean(returns))} if returns else {}


def _saturation(metrics: list[dict[str, float]]) -> str:
    """A line for the user where the range of the critic's head cuts targets off; "" where it does not."""
    share = max(values.get("targets_out_of_range", 0.0) for values in metrics)
    if share <= SATURATED:
        return ""
    return (
        f"note: {share:.0%} of the critic's targets lie beyond the range of its head, which takes them for its ends: "
        "widen --agent.critic.head.low and --agent.critic.head.high, or scale the reward"
    )


def _header(runs: Sequence[Run], taken: int, out: Path) -> str:
    run = runs[0]
    where = " and ".join(part for part in (getattr(run.source, "data", ""), run.env) if part)
    rounded = f" ({run.steps:,} rounded up)" if run.total != run.steps else ""
    at = f", from step {taken:,}" if taken else ""
    seeds = f"seeds {', '.join(str(one.seed) for one in runs)}" if len(runs) > 1 else f"seed {run.seed}"
    return f"{type(run.agent).__name__} on {where}, {run.total:,} steps{rounded}{at}, {seeds}, in {out}"


@contextmanager
def _started(restored: int | None) -> Iterator[None]:
    """What goes wrong before the first step leaves nothing behind."""
    try:
        yield
    except UserError as problem:
        if restored is None and not isinstance(problem, _Untrained):
            raise _Untrained(str(problem)) from None
        raise


@contextmanager
def _memory_named(folder: Path) -> Iterator[None]:
    """Turn what comes of too little memory into a UserError."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "memory" not in str(error).lower():
            raise
        problem = "out of memory: lower --batch-size, --buffer-size, --num-envs or the size of the networks"
        if checkpoint.latest(folder) in (None, 0):
            raise _Untrained(problem) from None
        raise UserError(f"{problem}; {folder} is kept up to its last checkpoint") from None
