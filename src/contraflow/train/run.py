"""`Run`: the settings of one training run; `train`: the driver around its phases."""

import json
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from contraflow import config as settings
from contraflow.agents import RFM, AnyAgent
from contraflow.agents.base import Agent
from contraflow.envs import make
from contraflow.envs.base import Env
from contraflow.train import checkpoint
from contraflow.train.artifact import check_schema
from contraflow.train.console import Progress
from contraflow.train.evaluate import evaluate
from contraflow.train.log import TrackerName, check_trackers
from contraflow.train.loop import Carry, Learner, epoch
from contraflow.train.offpolicy import OffPolicy, first_learner
from contraflow.train.record import Record, check_finite
from contraflow.types import PRNGKey, UserError


@dataclass(frozen=True)
class Run:
    """One agent on one environment with one seed. All step counts are environment steps summed over `num_envs`."""

    env: str = "envpool:CartpoleSwingup-v1"
    agent: AnyAgent | Agent = field(default_factory=RFM)
    steps: int = 100_000
    """Environment steps in all, the random ones included."""
    collect: int = 5_000
    """Steps of uniformly random actions before learning starts."""
    num_envs: int = 1
    """Environments stepped in parallel."""
    updates: int = 1
    """Gradient steps after each step of all environments; updates / num_envs is the update-to-data ratio."""
    batch_size: int = 256
    n_step: int = 1
    """Rewards summed before the value is asked: y = sum_{k<n} gamma^k r_k + gamma^n V(s_n), without correction for the
    actions in between being those of older policies."""
    buffer_size: int = 250_000
    eval_every: int = 10_000
    eval_episodes: int = 10
    log_every: int = 1_000
    seed: int = 0
    trackers: tuple[TrackerName, ...] = ("tensorboard",)

    def __post_init__(self):
        counts = "steps", "num_envs", "batch_size", "n_step", "buffer_size", "eval_every", "eval_episodes", "log_every"
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.updates < 0 or self.seed < 0:
            raise ValueError(f"updates and seed must not be negative, got {self.updates} and {self.seed}")
        if not 0 < self.collect < self.steps:
            raise ValueError(f"collect must lie between 0 and steps={self.steps}, got {self.collect}")
        if self.buffer_size < self.num_envs:
            raise ValueError(f"buffer_size={self.buffer_size} is smaller than num_envs={self.num_envs}")
        if self.n_step > 1 and not hasattr(self.agent, "gamma"):
            raise ValueError(f"n_step={self.n_step} needs an agent with a discount `gamma`; use n_step=1")


@dataclass(frozen=True)
class Result:
    """What a run ended with: its folder, its environment steps, and the returns of the last evaluation."""

    folder: Path
    steps: int
    returns: np.ndarray
    interrupted: bool = False


def write_config(run: Run, folder: Path) -> None:
    data = {"schema": settings.SCHEMA, "version": settings.VERSION, "run": settings.to_json(run)}
    temporary = folder / "config.json.tmp"
    temporary.write_text(json.dumps(data, indent=1))
    temporary.rename(folder / "config.json")


def read_config(path: Path, trust: bool = False) -> Run:
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
    return settings.from_json(data["run"], Run, trust, "run")


def check_new(folder: Path) -> None:
    """Raise UserError if `folder` already holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder} already exists: choose another --out, or continue it with `contraflow resume {folder}`"
        )


def train(run: Run, out: str | Path, *, trust: bool = False, quiet: bool = False) -> Result:
    """Train from the start in the new folder `out`. Raises UserError if `out` already holds something."""
    folder = Path(out)
    check_new(folder)
    check_trackers(run.trackers)
    envs = _environments(run, trust)
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
    envs = _environments(run, trust)
    with checkpoint.full_disk_named(folder):
        if steps is not None:
            write_config(run, folder)
        return _drive(run, folder, envs, checkpoint.latest(folder), quiet)


def _environments(run: Run, trust: bool) -> tuple[Env, Env]:
    return (
        make(run.env, run.num_envs, run.seed, trust=trust),
        make(run.env, run.eval_episodes, run.seed + 10_000, trust=trust),
    )


def first_carry(run: Run, folder: Path, env: Env, key: Any, step: int | None) -> Carry:
    """The first carry, or the one of checkpoint `step`."""
    k_init, k_env = jr.split(key)
    agent: Agent = run.agent
    spec = env.spec
    if step is None:
        learner = first_learner(agent, spec, run.buffer_size, k_init)
        env_state, obs = env.reset(k_env)
        # Copied, because a donated carry must not hold one buffer twice, and `obs` may be part of the state.
        return Carry(learner, env_state, jnp.copy(obs) if spec.jittable else obs)
    shapes = jax.eval_shape(lambda k: first_learner(agent, spec, run.buffer_size, k), k_init)
    if spec.jittable:
        env_shapes, obs_shape = jax.eval_shape(env.reset, k_env)
        return checkpoint.load(folder, step, Carry(shapes, env_shapes, obs_shape))
    learner: Learner = checkpoint.load(folder, step, shapes)
    env_state, obs = env.reset(jr.fold_in(k_env, step))
    fresh = Learner(learner.agent, learner.buffer.cut(), learner.returns * 0, learner.steps, learner.iteration)
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


def stretch(run: Run, taken: int) -> tuple[OffPolicy, int]:
    """The phase at step `taken`, and its iterations until something is due."""
    warm_up = taken < run.collect
    milestone = min(
        run.collect if warm_up else run.steps,
        (taken // run.eval_every + 1) * run.eval_every,
        (taken // run.log_every + 1) * run.log_every,
    )
    phase = OffPolicy(warm_up, 0 if warm_up else run.updates, run.batch_size, run.n_step)
    return phase, max(1, -(-(milestone - taken) // run.num_envs))


def evaluation_due(run: Run, before: int, taken: int) -> bool:
    return taken // run.eval_every > before // run.eval_every or taken >= run.steps


def root_keys(run: Run) -> tuple[PRNGKey, PRNGKey, PRNGKey]:
    """Keys of the start, of the loop and of the evaluations."""
    k_start, k_run, k_eval = jr.split(jr.key(run.seed), 3)
    return k_start, k_run, k_eval


def _drive(run: Run, folder: Path, envs: tuple[Env, Env], restored: int | None, quiet: bool) -> Result:
    env, eval_env = envs
    k_start, k_run, k_eval = root_keys(run)
    carry = first_carry(run, folder, env, k_start, restored)
    taken = int(carry.learner.steps)
    record = Record(run, folder, env, taken)
    record.save(taken, carry)  # the first; after a restart only the policy, which a killed process may not have written
    with closing(record), interruptible() as signals, Progress(run, folder, taken, quiet) as progress:
        while taken < run.steps and not signals:
            phase, n = stretch(run, taken)
            before = taken
            carry, metrics, error = epoch(phase, run.agent, env, carry, k_run, n, lambda: bool(signals))
            taken = int(carry.learner.steps)
            if error is None:
                check_finite(metrics, before, taken, folder)
            record.metrics(taken, metrics)
            progress.update(taken, metrics)
            due = evaluation_due(run, before, taken)
            returns = np.zeros(0)
            if due and error is None:
                try:
                    returns = evaluate(run.agent, carry.learner.agent, eval_env, jr.clone(k_eval), run.eval_episodes)
                except UserError as problem:
                    error = problem
            if error is not None:
                record.save(taken, carry)
                raise UserError(f"{error}; the run is saved: `contraflow resume {folder}` once it is mended")
            if due:
                record.evaluation(taken, carry, returns, k_eval, diagnostics=not phase.random)
                progress.evaluated(taken, returns)
                record.save(taken, carry)
        if signals:
            record.save(taken, carry)
    return Result(folder, taken, record.finish(bool(signals)), bool(signals))
