"""`contraflow record` and `contraflow data info`: datasets from policies, and what is in a dataset."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from contraflow.cli.flags import Modules, Switch, read_flags
from contraflow.data.datasets.dataset import Dataset
from contraflow.data.datasets.inspect import problems, summary
from contraflow.data.datasets.readers import load as load_dataset
from contraflow.data.datasets.write import check_target, write
from contraflow.runtime.collect import Behaviour, record
from contraflow.runtime.policy import load


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

    action: Annotated[Literal["info"], tyro.conf.Positional]
    """What to do with the dataset."""
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


def record_command(args: list[str]) -> int:
    """`contraflow record POLICY --out DATASET`: the exit code."""
    options = read_flags(Record, args, prog="contraflow record")
    check_target(options.out)  # before the work
    policy = load(options.folder, options.seed, options.trust)
    behaviour = Behaviour(options.explore, options.noise, options.random)
    data = record(policy, options.episodes, options.env, behaviour=behaviour, seed=options.seed, trust=options.trust)
    by = f"{policy!r}, explore {options.explore}, noise {options.noise:g}, random {options.random:g}"
    place = write(data, options.out, options.format, by)
    _print(data)
    print(f"{'written':13}{place}")
    return 0


def data_command(args: list[str]) -> int:
    """`contraflow data info DATASET`: the exit code."""
    options = read_flags(Data, args, prog="contraflow data")
    reading = {key: getattr(options, key) for key in ("success", "task", "low", "high")}
    data = load_dataset(options.dataset, **reading, clip=True)  # what lies outside is a problem that is printed
    _print(data)
    for problem in problems(data):
        print(f"{'problem':13}{problem}")
    return 0


def _print(data: Dataset) -> None:
    for label, text in summary(data):
        print(f"{label:13}{text}")
