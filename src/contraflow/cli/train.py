"""`contraflow train` and `contraflow resume`."""

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from contraflow.cli.evaluate import final_returns
from contraflow.cli.settings import Switch, Train, as_run, parse_train
from contraflow.config import suggest
from contraflow.presets import PRESETS
from contraflow.train import run as runs
from contraflow.train.log import read_evaluations
from contraflow.types import UserError

HELP = """\
usage: contraflow train PRESET [--env ID] [--steps N] [--seed S] [--out DIR] [--agent.gamma 0.98] ...

PRESET is one of these, a run folder or its config.json (trains it again), or your own agent as module:Class (with
--trust):

{presets}

`contraflow train PRESET --help` lists all settings. The folder given by --out receives config.json, metrics.jsonl,
eval.csv, curve.png, checkpoints/ and policy/."""


@dataclass(frozen=True)
class Resume:
    """Continue a run from its newest checkpoint."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of the run."""
    steps: int | None = None
    """Extend the run to this many environment steps in all."""
    require: float | None = None
    """Exit with code 1 when the final mean return is below this."""
    quiet: Annotated[bool, Switch] = False
    """No progress bar."""
    trust: Annotated[bool, Switch] = False
    """Import code named `module:Class` in the run's config.json."""


def train_command(args: list[str]) -> int:
    """`contraflow train PRESET`: train and report; 0, 1 below `--require`, 130 after Ctrl-C."""
    if not args or args[0] in ("-h", "--help"):
        rows = [
            f"  {name:<14} {type(run.agent).__name__:<4} on {run.env}, {run.steps:,} steps"
            for name, run in PRESETS.items()
        ]
        print(HELP.format(presets="\n".join(rows)))
        return 0
    preset, *flags = args
    if preset.startswith("-"):
        raise UserError(f"the preset comes first: contraflow train PRESET {preset} ...; {suggest('', PRESETS)}")
    options = parse_train(preset, flags)
    run = as_run(options)
    folder = options.out or default_folder(preset, options)
    start = time.monotonic()
    result = runs.train(run, folder, trust=options.trust, quiet=options.quiet)
    return _finish(result, time.monotonic() - start, options.require, options.trust)


def resume_command(args: list[str]) -> int:
    """`contraflow resume FOLDER`: as `train_command`, from the newest checkpoint."""
    options = tyro.cli(Resume, prog="contraflow resume", args=args)
    folder = options.folder
    start = time.monotonic()
    before = runs.progress(folder, options.trust)
    result = runs.resume(folder, steps=options.steps, trust=options.trust, quiet=options.quiet)
    if result.steps == before and not result.interrupted:
        print(f"{folder} is finished: {before:,} steps. Extend it with `contraflow resume {folder} --steps N`")
        return 0
    return _finish(result, time.monotonic() - start, options.require, options.trust)


def default_folder(preset: str, options: Train) -> Path:
    """runs/PRESET-ENV-seedN, in letters that a path may hold."""
    path = Path(preset)
    name = path.resolve().parent.name if path.name == "config.json" else path.name
    env = options.env.rpartition(":")[2]
    return Path("runs") / "-".join([name.rpartition(":")[2], env.replace("/", "-"), f"seed{options.seed}"])


def _finish(result: runs.Result, seconds: float, require: float | None, trust: bool) -> int:
    """The closing report; the exit code."""
    folder = result.folder
    if result.interrupted:
        print(f"interrupted at step {result.steps:,}; the run is saved: contraflow resume {shlex.quote(str(folder))}")
        return 130
    minutes, rest = divmod(round(seconds), 60)
    print(f"trained to step {result.steps:,} in {minutes} min {rest} s; evaluating ...", flush=True)
    table = final_returns(folder, trust)
    for name, returns in table.items():
        print(f"  {name:<42} {_summary(returns)}")
    step = max(read_evaluations(folder), key=lambda row: row["return_mean"])["step"]
    print(f"best policy  {folder / 'best'}, from step {int(step):,}\nlast policy  {folder / 'policy'}")
    print(f"curve        {folder / 'curve.png'}")
    mean = float(next(iter(table.values())).mean())
    if require is not None and not mean >= require:
        print(f"the mean return {mean:.1f} is below the required {require:g}")
        return 1
    return 0


def _summary(returns: np.ndarray) -> str:
    return f"mean {returns.mean():8.1f}  std {returns.std():6.1f}  min {returns.min():8.1f}  max {returns.max():8.1f}"
