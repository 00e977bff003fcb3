"""`contraflow record` and `contraflow data info|make`: datasets from policies and scripts, and what is in a dataset."""

import shlex
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from contraflow.cli.flags import Modules, Switch, read_flags
from contraflow.core.interrupt import INTERRUPTED, noted
from contraflow.core.types import UserError
from contraflow.data.datasets.dataset import Dataset, build
from contraflow.data.datasets.inspect import problems, summary
from contraflow.data.datasets.readers import load as load_dataset
from contraflow.data.datasets.write import check_target, write
from contraflow.data.make import make
from contraflow.envs import align
from contraflow.runtime.collect import Behaviour, record
from contraflow.runtime.policy import load
from contraflow.training.console import Progress


@dataclass(frozen=True)
class Record:
    """Roll a policy out in its environment and write the episodes as a dataset."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="POLICY")]
    """Folder of a run or of a policy."""
    out: str
    """A Minari id such as mine/pendulum-v0, or the path of a new folder, or of a new .npz file of plain arrays. What
    has the form of an id is taken for one: begin a path with ./"""
    episodes: int = 200
    env: str | None = None
    """Another environment of the same sizes."""
    camera: str | None = None
    """An environment that plays the same episodes, whose observations are recorded in place of those that the policy
    acts on: `jax:pendulum/pixels` for a policy of `jax:pendulum`."""
    explore: Annotated[bool, Switch] = False
    """Act as in training, not as in evaluation."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise on the actions, which lie in [-1, 1]."""
    random: float = 0.0
    """Share of the steps with a uniform action."""
    seed: int = 0
    format: Literal["hdf5", "arrow", "parquet"] = "hdf5"
    """How Minari keeps the data."""
    trust: Modules = ""
    """Modules outside the library that may be imported, with what lies below them; `all` is any of them."""

    def __post_init__(self):
        if self.episodes < 1 or self.seed < 0:
            raise ValueError("episodes must be at least 1, and seed not negative")
        Behaviour(self.explore, self.noise, self.random)


@dataclass(frozen=True)
class Data:
    """Sizes, returns and ranges of a dataset, and problems found in it."""

    action: Annotated[Literal["info", "make"], tyro.conf.Positional]
    """What to do with the dataset; `contraflow data make --help` explains the second."""
    dataset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATASET")]
    """A Minari id or folder, a LeRobot folder, or an .npz file (OGBench, D4RL, plain arrays)."""
    success: Literal["pre", "post"] = "pre"
    """For OGBench: reward a step for the state it starts from, or leads to."""
    task: str | None = None
    """For OGBench: single-task id that rewards a file without rewards."""
    low: tuple[float, ...] = ()
    """Lower bounds of the actions, one for all or one for each, in place of those that the data state."""
    high: tuple[float, ...] = ()
    """Upper bounds of the actions."""


@dataclass(frozen=True)
class Make:
    """Make a dataset of a benchmark on this machine, with the scripted controllers of its package.

    The steps of a dataset follow from its name and the seed alone; a longer one begins with those of a shorter one.
    Work that is interrupted goes on with the same command.
    """

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """A set of OGBench such as ogbench:cube-single-play or ogbench:pointmaze-large-navigate, a set of MetaWorld such
    as metaworld:reach-expert or metaworld:reach-noisy, or the data of a problem of alignment such as align:digits."""
    out: Path
    """The new file, which ends in .npz."""
    rows: int = 1_000_000
    """Steps, rounded up to whole episodes."""
    seed: int = 0
    jobs: int = 1
    """Processes that make episodes side by side."""
    quiet: Annotated[bool, Switch] = False
    """No progress bar."""


def record_command(args: list[str]) -> int:
    """`contraflow record POLICY --out DATASET`: the exit code."""
    options = read_flags(Record, args, prog="contraflow record")
    check_target(options.out)  # before the work
    policy = load(options.folder, options.seed, options.trust)
    behaviour = Behaviour(options.explore, options.noise, options.random)
    more = {"camera": options.camera, "seed": options.seed, "trust": options.trust}
    data = record(policy, options.episodes, options.env, behaviour=behaviour, **more)
    by = f"{policy!r}, explore {options.explore}, noise {options.noise:g}, random {options.random:g}"
    place = write(data, options.out, options.format, by)
    _print(data)
    print(f"{'written':13}{place}")
    return 0


def data_command(args: list[str]) -> int:
    """`contraflow data info DATASET` and `contraflow data make NAME`: the exit code."""
    if args[:1] == ["make"]:
        return make_command(args[1:])
    options = read_flags(Data, args, prog="contraflow data")
    reading = {key: getattr(options, key) for key in ("success", "task", "low", "high")}
    data = load_dataset(options.dataset, **reading, clip=True)  # what lies outside is a problem that is printed
    _print(data)
    for problem in problems(data):
        print(f"{'problem':13}{problem}")
    return 0


def make_command(args: list[str]) -> int:
    """`contraflow data make NAME --rows N --out FILE`: 0, or 130 after Ctrl-C with the finished episodes kept."""
    options = read_flags(Make, args, prog="contraflow data make")
    if options.name.startswith(align.PREFIX):
        _make_align(options.name, options.out)
        return 0
    header = f"{options.name}, {options.rows:,} rows, seed {options.seed}, in {options.out}"
    start, done = time.monotonic(), []
    with ExitStack() as stack:
        signals = stack.enter_context(noted())
        shown = Progress(header, options.rows, 0, options.quiet)

        def told(rows: int) -> bool:
            if not done:  # what is wrong with the flags was said before
                stack.enter_context(shown)
                signals.started = True
            done.append(rows)
            shown.update("making", rows, {})
            return bool(signals)

        whole = make(options.name, options.rows, options.out, options.seed, options.jobs, told)
    if not whole:
        again = " ".join(["contraflow data make", *map(shlex.quote, args)])
        print(f"interrupted with {done[-1]:,} rows, which are kept: {again}")
        return INTERRUPTED
    seconds, made, size = time.monotonic() - start, done[-1] - done[0], options.out.stat().st_size / 1e6
    speed = f", {made / seconds:,.0f} rows/s" if made else ""
    print(f"written {options.out}: {done[-1]:,} rows in {seconds:.0f} s{speed}, {size:.1f} MB")
    print(f"next    contraflow data info {shlex.quote(str(options.out))}")
    return 0


def _make_align(name: str, out: Path) -> None:
    """Writes the data of a problem of alignment as episodes of one step; rewards are those of its default."""
    problem, _ = align.find(name.removeprefix(align.PREFIX))
    found = problem.data()
    if found is None:
        raise UserError(f"{name} has no data of its own: pretrain on another set")
    cond, x = found
    n = len(x)
    arrays = {"obs": cond, "action": x, "next_obs": cond, "reward": np.zeros(n), "terminated": np.ones(n, bool)}
    data = build(arrays | {"end": np.ones(n, bool)}, name=name, env=name, low=-1.0, high=1.0)
    print(f"written {write(data, out)}: {n:,} rows")


def _print(data: Dataset) -> None:
    for label, text in summary(data):
        print(f"{label:13}{text}")
