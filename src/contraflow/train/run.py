"""`train`: the driver around the phases of a run, whatever its kind; `resume`; and a run as a file."""

import json
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from contraflow.agents import classes
from contraflow.core import settings
from contraflow.core.types import PRNGKey, UserError
from contraflow.envs.base import Env
from contraflow.policy.artifact import check_schema
from contraflow.train import checkpoint, pretrained
from contraflow.train.console import Progress
from contraflow.train.evaluate import evaluate
from contraflow.train.log import check_trackers
from contraflow.train.loop import Carry, Learner, epoch
from contraflow.train.offline import OfflineRun
from contraflow.train.offpolicy import Run
from contraflow.train.onpolicy import OnPolicyRun
from contraflow.train.run_writer import Record, check_finite

AnyRun = Run | OnPolicyRun | OfflineRun


@dataclass(frozen=True)
class Result:
    """What a run ended with: its folder, its environment steps, and the returns of the last evaluation."""

    folder: Path
    steps: int
    returns: np.ndarray
    interrupted: bool = False


def write_config(run: AnyRun, folder: Path) -> None:
    data = {"schema": settings.SCHEMA, "version": settings.VERSION, "run": settings.to_json(run)}
    temporary = folder / "config.json.tmp"
    temporary.write_text(json.dumps(data, indent=1))
    temporary.rename(folder / "config.json")


def read_config(path: Path, trust: bool = False) -> AnyRun:
    """The Run of a run folder or of a config.json file. Raises UserError if it is not one of ours."""
    file = path / "config.json" if path.is_dir() else path
    if not file.exists():
        raise UserError(f"{file} does not exist; is {path} the folder of a run?")
    try:
        data = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from None
    check_schema(data, path)
    if not isinstance(data.get("run"), dict):
        raise UserError(f"{file} does not describe a run")
    return settings.from_json(data["run"], AnyRun, trust, "run", classes())


def check_new(folder: Path) -> None:
    """Raise UserError if `folder` already holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder} already exists: choose another --out, or continue it with `contraflow resume {folder}`"
        )


def train(run: AnyRun, out: str | Path, *, trust: bool = False, quiet: bool = False) -> Result:
    """Train from the start in the new folder `out`. Raises UserError if `out` already holds something."""
    folder = Path(out)
    check_new(folder)
    check_trackers(run.trackers)
    run = run.resolve(trust)
    envs = run.environments(trust)
    pretrained.check_fit(run, envs[0].spec)
    with checkpoint.full_disk_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_config(run, folder)
        return _drive(run, folder, envs, None, quiet)


def progress(out: str | Path, trust: bool = False) -> int:
    """Environment steps of the newest complete checkpoint of a run; -1 if it has none."""
    step = checkpoint.latest(Path(out)) if read_config(Path(out), trust) else None
    return -1 if step is None else step


def resume(out: str | Path, *, steps: int | None = None, trust: bool = False, quiet: bool = False) -> Result:
    """Continue the run in `out` from its newest checkpoint, or from the start if it has none; `steps` extends it.

    Bitwise the uninterrupted run for jittable environments; host simulators start new episodes.
    """
    folder = Path(out)
    run = read_config(folder, trust)
    if steps is not None:
        if steps < run.steps:
            raise UserError(f"steps={steps} is less than the run's own {run.steps}: give the total that you want")
        run = replace(run, steps=steps)
    check_trackers(run.trackers)
    envs = run.environments(trust)
    with checkpoint.full_disk_named(folder):
        if steps is not None:
            write_config(run, folder)
        return _drive(run, folder, envs, checkpoint.latest(folder), quiet)


def first_carry(run: AnyRun, folder: Path, env: Any, key: Any, step: int | None) -> Carry:
    """The first carry, or the one of checkpoint `step`."""
    k_init, k_env = jr.split(key)
    spec = env.spec
    if step is None:
        learner = run.learner(env, k_init)
        env_state, obs = env.reset(k_env)
        # Copied, because a donated carry must not hold one buffer twice, and `obs` may be part of the state.
        return pretrained.adopt(run, Carry(learner, env_state, jnp.copy(obs) if spec.jittable else obs))
    shapes = jax.eval_shape(lambda k: run.learner(env, k), k_init)
    if spec.jittable:
        env_shapes, obs_shape = jax.eval_shape(env.reset, k_env)
        return checkpoint.load(folder, step, Carry(shapes, env_shapes, obs_shape))
    learner: Learner = checkpoint.load(folder, step, shapes)
    env_state, obs = env.reset(jr.fold_in(k_env, step))
    buffer = None if learner.buffer is None else learner.buffer.cut()
    fresh = Learner(learner.agent, buffer, learner.returns * 0, learner.steps, learner.iteration)
    return Carry(fresh, env_state, obs)


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """The list fills at the first SIGINT or SIGTERM; a second one acts as usual."""
    received: list[int] = []

    def note(number, frame):
        received.append(number)
        signal.signal(number, previous[number])

    previous: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
    except ValueError:  # not in the main thread: signals are the caller's business
        previous = {}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def evaluation_due(run: AnyRun, before: int, taken: int) -> bool:
    return taken // run.eval_every > before // run.eval_every or taken >= run.steps


def root_keys(run: AnyRun) -> tuple[PRNGKey, PRNGKey, PRNGKey]:
    """Keys of the start, of the loop and of the evaluations."""
    k_start, k_run, k_eval = jr.split(jr.key(run.seed), 3)
    return k_start, k_run, k_eval


def _drive(run: AnyRun, folder: Path, envs: tuple[Any, Env | None], restored: int | None, quiet: bool) -> Result:
    env, eval_env = envs
    k_start, k_run, k_eval = root_keys(run)
    carry = first_carry(run, folder, env, k_start, restored)
    taken = int(carry.learner.steps)
    record = Record(run, folder, env, taken)
    record.save(taken, carry)  # the first; after a restart only the policy, which a killed process may not have written
    with closing(record), interruptible() as signals, Progress(run, folder, taken, quiet) as progress:
        while taken < run.steps and not signals:
            phase, n = run.next_phase(taken)
            before = taken
            carry, metrics, error = epoch(phase, run.agent, env, carry, k_run, n, lambda: bool(signals))
            taken = int(carry.learner.steps)
            check_finite(metrics, before, taken, folder)  # a diverged network may be what caused `error`
            record.metrics(taken, metrics)
            progress.update(taken, metrics)
            due = evaluation_due(run, before, taken)
            returns = np.zeros(0)
            if due and error is None and eval_env is not None:
                try:
                    returns = evaluate(
                        run.agent.policy(carry.learner.agent), eval_env, jr.clone(k_eval), run.eval_episodes
                    )
                except UserError as problem:
                    error = problem
            if error is not None:
                record.save(taken, carry)
                raise UserError(f"{error}; the run is saved: `contraflow resume {folder}` once it is mended")
            if due and eval_env is not None:
                record.evaluation(taken, carry, returns, k_eval, diagnostics=phase.learns)
                progress.evaluated(taken, returns)
            if due:
                record.save(taken, carry)
        if signals:
            record.save(taken, carry)
    return Result(folder, taken, record.finish(bool(signals)), bool(signals))
