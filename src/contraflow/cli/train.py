"""`contraflow train` and `contraflow resume`."""

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from contraflow.agents import presets
from contraflow.cli.evaluate import RANDOM, STILL, final_returns, summary
from contraflow.cli.flags import Modules, Switch, read_flags
from contraflow.cli.settings import as_run, parse_train
from contraflow.core.settings import suggest
from contraflow.core.trust import Trust
from contraflow.core.types import UserError
from contraflow.envs.align import PREFIX
from contraflow.training import run as runs
from contraflow.training.run_writer import best_evaluation
from contraflow.training.sources import Conditions

HELP = """\
usage: contraflow train PRESET [--env ID] [--steps N] [--seed S] [--out DIR] [--agent.critic.gamma 0.98] ...
       contraflow train PRESET --env jax:pendulum --seeds 0 1 2 3 ...    many seeds in one compiled program
       contraflow train PRESET source:offline-to-online --data SET --env ID --offline-steps N ...

PRESET is one of these, a run folder or its config.json (trains it again), or your own agent as module:Class (with
--trust MODULE):

{presets}

`contraflow train PRESET --help` lists the settings that are changed most, `--help-all` every one. The folder given by
--out receives config.json, metrics.jsonl, eval.csv, curve.png, checkpoints/ and policy/."""


@dataclass(frozen=True)
class Resume:
    """Continue a run from its newest checkpoint."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of the run, or of seeds that were trained together."""
    steps: int | None = None
    """Extend the run to this total number of steps."""
    require: float | None = None
    """Exit with code 1 when the final mean return is below this."""
    quiet: Annotated[bool, Switch] = False
    """No progress bar."""
    trust: Modules = ""
    """Modules outside the library that may be imported, separated by commas; `all` allows any."""


def train_command(args: list[str]) -> int:
    """Runs `contraflow train PRESET`: trains and reports; returns 0, 1 below `--require`, or 130 after Ctrl-C."""
    if not args or args[0] in ("-h", "--help", "--help-all"):
        rows = [f"  {preset.name:<14} {preset.title}" for preset in presets().values()]
        print(HELP.format(presets="\n".join(rows)))
        return 0
    preset, *flags = args
    if preset.startswith("-"):
        raise UserError(f"the preset comes first: contraflow train PRESET {preset} ...; {suggest('', presets())}")
    options = parse_train(preset, flags)
    run = as_run(options)
    folder = options.out or default_folder(preset, options)
    given = {flag.partition("=")[0] for flag in flags}
    if {"--seed", "--seeds"} <= given:
        raise UserError("--seed trains one seed, --seeds several: give one of the two")
    start = time.monotonic()
    if "--seeds" in given:
        results = runs.train_seeds(run, options.seeds, folder, trust=options.trust, quiet=options.quiet)
        return _finish_seeds(results, folder, time.monotonic() - start, options.require, options.trust)
    result = runs.train(run, folder, trust=options.trust, quiet=options.quiet)
    return _finish(result, time.monotonic() - start, options.require, options.trust)


def resume_command(args: list[str]) -> int:
    """Runs `contraflow resume FOLDER`: like `train_command`, from the newest checkpoint."""
    options = read_flags(Resume, args, prog="contraflow resume")
    folder, flags = options.folder, {"steps": options.steps, "trust": options.trust, "quiet": options.quiet}
    members = runs.seed_folders(folder)
    start, before = time.monotonic(), [runs.progress(member) for member in members or [folder]]
    results = runs.resume_seeds(folder, **flags) if members else [runs.resume(folder, **flags)]
    if [result.steps for result in results] == before and not results[0].interrupted:
        steps = f"{before[0]:,} steps"
        print(f"{folder} is finished: {steps}. Extend it with `contraflow resume {shlex.quote(str(folder))} --steps N`")
        return 0
    seconds = time.monotonic() - start
    if members:
        return _finish_seeds(results, folder, seconds, options.require, options.trust)
    return _finish(results[0], seconds, options.require, options.trust)


def default_folder(preset: str, options: Any) -> Path:
    """Returns runs/PRESET-ENV-seedN, or -seedsN-M-..., in characters that a path may contain."""
    path = Path(preset)
    name = path.resolve().parent.name if path.name == "config.json" else path.name
    env = options.env.rpartition(":")[2] or Path(getattr(options, "data", "")).stem or "run"
    seeds = "-".join(map(str, options.seeds))
    last = f"seeds{seeds}" if seeds else f"seed{options.seed}"
    return Path("runs") / "-".join([name.rpartition(":")[2], env.replace("/", "-"), last])


def _interrupted(folder: Path, steps: int, what: str) -> int:
    print(f"interrupted at step {steps:,}; {what} saved: contraflow resume {shlex.quote(str(folder))}")
    return 130


def _trained(steps: int, seconds: float, seeds: int = 1) -> None:
    minutes, rest = divmod(round(seconds), 60)
    what = f"trained {seeds} seeds" if seeds > 1 else "trained"
    print(f"{what} to step {steps:,} in {minutes} min {rest} s; evaluating ...", flush=True)


def _finish(result: runs.Result, seconds: float, require: float | None, trust: Trust) -> int:
    """Prints the closing report; returns the exit code."""
    if result.interrupted:
        return _interrupted(result.folder, result.steps, "the run is")
    _trained(result.steps, seconds)
    return _report(result.folder, require, trust)


def _finish_seeds(results: list[runs.Result], folder: Path, seconds: float, require: float | None, trust: Trust) -> int:
    """Prints the closing report of each seed; returns 1 if one of them misses `require`."""
    if results[0].interrupted:
        return _interrupted(folder, results[0].steps, "the runs are")
    _trained(results[0].steps, seconds, len(results))
    codes = []
    for result in results:
        print(f"\n{result.folder.name}")
        codes.append(_report(result.folder, require, trust))
    return max(codes)


def _report(folder: Path, require: float | None, trust: Trust) -> int:
    """Prints the returns of a run's policies on fresh episodes and their places; returns 1 below `require`."""
    best = best_evaluation(folder)
    if best is None:
        print(f"no environment to evaluate in: `contraflow eval {shlex.quote(str(folder))} --env ID` does it later")
        print(f"last policy  {folder / 'policy'}")
        return 0
    run = runs.read_config(folder, trust)
    if run.env.startswith(PREFIX) or isinstance(run.source, Conditions):
        from contraflow.cli import align  # it calls this module

        return align.report(folder, run, require, trust)
    table = final_returns(folder, trust)
    for name, found in table.items():
        print(f"  {name:<42} {summary(found, 8)}")
    print(f"best policy  {folder / 'best'}, from step {best['step']:,}\nlast policy  {folder / 'policy'}")
    print(f"curve        {folder / 'curve.png'}")
    print(f"next         contraflow eval {shlex.quote(str(folder))} --video policy.mp4")
    if require is None:
        return 0
    rows = next(iter(table.values())), table[RANDOM], table[STILL]
    mean, random, still = (float(found.returns.mean()) for found in rows)
    reached = mean >= require
    side = "above" if reached else "below"
    print(f"{mean:.1f} is {side} the bar of {require:g}; random actions score {random:.1f}, no action {still:.1f}")
    if not reached:
        print("the run learned too little: try another --seed or more --steps")
    return 0 if reached else 1
