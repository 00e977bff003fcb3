"""Making datasets: an episode at a time, in several processes, so that work that was stopped goes on.

Every episode has its own seed. It does not depend on the episodes made before it or in other processes.
"""

import importlib.util
import multiprocessing
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from contraflow.core.errors import UserError
from contraflow.core.files import full_disk_named, locked, make_folder, read_json, replacing, write_json

TRIES = 100  # attempts at an episode that goes well
WAIT = 0.2  # seconds between two checks whether to stop

Arrays = dict[str, np.ndarray]


@runtime_checkable
class Source(Protocol):
    """An environment and what acts in it."""

    def run(self, rng: np.random.Generator) -> Arrays | None:
        """Returns the columns of one episode; None if it went wrong, and is to be tried again."""
        ...


@dataclass(frozen=True)
class Recipe:
    """A set: `name`, `seed` and the number of an episode determine the episode."""

    name: str
    """As its user writes it."""
    seed: int
    steps: int
    """Steps of an episode."""
    source: Callable[[str], Source]
    """From `name`; raises ImportError if a package lacks another one."""
    packages: tuple[str, ...]
    """Those whose versions change the episodes."""
    install: str
    """How to install them."""
    constants: dict[str, Any] = field(default_factory=dict)
    """Arrays of the file that are not columns."""


def make(recipe: Recipe, rows: int, out: Path, jobs: int, progress: Callable[[int], bool]) -> bool:
    """Writes at least `rows` steps, in whole episodes, to the new file `out`; returns whether it is complete.

    Finished episodes are kept in a folder beside the file until it is complete. A later call with the same recipe
    continues from there. `progress` gets the number of steps made so far, and returns True to stop the work. With
    several `jobs` each process imports the main module, as `multiprocessing` does.

    Raises UserError for a missing package, a place that cannot be written, or a file that exists.
    """
    if min(rows, jobs) < 1 or recipe.seed < 0:
        raise UserError(f"rows and jobs must be at least 1 and seed not negative, got {rows}, {jobs} and {recipe.seed}")
    if out.suffix != ".npz" or out.is_dir():
        raise UserError(f"{out} is not the name of an array file: give --out a name that ends in .npz")
    if out.exists():
        raise UserError(f"{out} already exists: choose another --out, or delete it")
    for name in recipe.packages:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{recipe.name} needs the package {name}: {recipe.install}")
    folder = out.with_name(f"{out.name}.making")
    make_folder(folder)
    with _writable(folder), locked(folder):
        _agree(recipe, folder)
        files = [folder / f"{i:06}.npz" for i in range(-(-rows // recipe.steps))]

        def told() -> bool:
            return progress(sum(file.exists() for file in files) * recipe.steps)

        todo = [i for i, file in enumerate(files) if not file.exists()]
        if not told() and todo:
            _work(recipe, folder, todo, min(jobs, len(todo)), told)
        if not all(file.exists() for file in files):
            return False
        _assemble(files, out, recipe.constants)
    shutil.rmtree(folder, ignore_errors=True)
    return True


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        with full_disk_named(folder):
            yield
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error}): choose another --out") from None


def _agree(recipe: Recipe, folder: Path) -> None:
    """Raises UserError if the folder holds episodes of another recipe or of other versions."""
    wanted: dict[str, Any] = {"name": recipe.name, "seed": recipe.seed}
    with suppress(ImportError):
        wanted |= {name: version(name) for name in recipe.packages}
    file = folder / "recipe.json"
    if file.exists() and (found := read_json(file)) != wanted:
        text = ", ".join(f"{key} {value}" for key, value in found.items())
        raise UserError(f"{folder} holds episodes of another set ({text}): delete it, or choose another --out")
    write_json(file, wanted)


def _assemble(files: Sequence[Path], out: Path, constants: dict[str, Any]) -> None:
    episodes = []
    for file in files:
        try:
            with np.load(file) as arrays:
                episodes.append(dict(arrays))
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{file} is damaged ({error}): delete it, and make the set again") from None
    with replacing(out) as temporary, temporary.open("wb") as stream:
        whole = {key: np.concatenate([episode[key] for episode in episodes]) for key in episodes[0]}
        np.savez_compressed(stream, **whole, **constants)  # pyright: ignore[reportArgumentType]


# several processes


def _work(recipe: Recipe, folder: Path, todo: list[int], jobs: int, told: Callable[[], bool]) -> None:
    """Makes the episodes `todo` until all exist or `told` returns True. Episodes that were begun are finished."""
    if jobs == 1:
        maker = Maker(recipe)
        for number in todo:
            maker.write(number, folder)
            if told():
                return
        return
    context, left = multiprocessing.get_context("spawn"), todo[::-1]
    busy: dict[Any, Any] = {}  # pipe -> process
    # Ctrl-C reaches the whole group of processes. The workers inherit a mask that blocks it. The resource tracker
    # unblocks the signal when it starts: start it first.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for _ in range(jobs):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, recipe, folder), daemon=True)
            process.start()
            theirs.close()
            busy[ours] = process
            ours.send(left.pop())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    problem = ""
    while busy:
        ready: list[Any] = list(wait(list(busy), WAIT))
        for pipe in ready:
            try:
                problem = pipe.recv() or problem
            except EOFError:
                problem = problem or "a process ended unexpectedly, perhaps for lack of memory: lower --jobs"
            if problem or told() or not left:
                with suppress(OSError):
                    pipe.send(None)
                busy.pop(pipe).join()
            else:
                pipe.send(left.pop())
        if told():
            left.clear()
    if problem:
        raise UserError(f"{recipe.name}: {problem}")


def _serve(pipe: Connection, recipe: Recipe, folder: Path) -> None:
    """Makes the episodes with the numbers that arrive, and answers "" or an error, until None arrives or the other
    process ends."""
    with suppress(EOFError, OSError):
        maker = None
        while (number := pipe.recv()) is not None:
            try:
                maker = maker or Maker(recipe)
                maker.write(number, folder)
            except UserError as error:
                pipe.send(str(error))
            except Exception as error:
                pipe.send(f"{type(error).__name__}: {error}")
            else:
                pipe.send("")


# episodes


class Maker:
    """One environment, and episodes from it. Raises UserError if the package cannot be imported."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        if sys.platform == "linux" and not os.environ.get("DISPLAY"):
            os.environ.setdefault("MUJOCO_GL", "egl")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # dm_control looks for a display
                self._source = recipe.source(recipe.name)
        except ImportError as error:
            raise UserError(f"{recipe.name} lacks a package ({error}): {recipe.install}") from None

    def episode(self, number: int) -> Arrays:
        """Returns episode `number` of the set. Restores NumPy's global generator, from which some controllers draw."""
        before = np.random.get_state()  # noqa: NPY002
        try:
            for attempt in range(TRIES):
                rng = np.random.default_rng([self.recipe.seed, number, attempt])
                np.random.seed(int(rng.integers(2**32)))  # noqa: NPY002
                if (rows := self._source.run(rng)) is not None:
                    return rows
        finally:
            np.random.set_state(before)  # noqa: NPY002
        raise UserError(f"episode {number} of {self.recipe.name} went wrong {TRIES} times: choose another --seed")

    def write(self, number: int, folder: Path) -> None:
        with replacing(folder / f"{number:06}.npz") as temporary, temporary.open("wb") as stream:
            np.savez(stream, **self.episode(number))  # pyright: ignore[reportArgumentType]
