"""Benchmarks' datasets, made on this machine by the scripted controllers of their packages."""

from collections.abc import Callable
from pathlib import Path

from contraflow.data.make import episodes, metaworld, ogbench


def make(
    name: str, rows: int, out: Path, seed: int = 0, jobs: int = 1, progress: Callable[[int], bool] = lambda done: False
) -> bool:
    """Makes a set such as `ogbench:cube-single-play` or `metaworld:drawer-open-noisy`; see `episodes.make`.

    Raises UserError for an unknown name, and what `episodes.make` raises.
    """
    find = metaworld.find if name.startswith(metaworld.PREFIX) else ogbench.find
    return episodes.make(find(name, seed), rows, out, jobs, progress)
