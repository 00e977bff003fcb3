"""Makes OGBench's datasets (2410.20092) with the environments and scripted oracles of the package `ogbench`.

- `play`: an arm follows open-loop plans to random targets, with correlated noise. `noisy`: closed-loop oracles with
  Gaussian noise of a different strength in each episode, and a share of uniform actions.
- `navigate`: a point walks through a maze from one corner or crossing to the next, with noisy actions. `stitch`: short
  walks to a cell four steps away.

Every episode has its own seed. It does not depend on the episodes made before it or in other processes. The sets of
ant, humanoid and ball come from trained policies and are not made here.
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
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from contraflow.core.errors import UserError
from contraflow.core.files import full_disk_named, locked, make_folder, read_json, replacing, write_json
from contraflow.core.settings import suggest

PREFIX = "ogbench:"
ARMS = (
    "cube-single", "cube-double", "cube-triple", "cube-quadruple", "cube-octuple", "scene", "puzzle-3x3", "puzzle-4x4",
    "puzzle-4x5", "puzzle-4x6",
)  # fmt: skip
MAZES = ("pointmaze-medium", "pointmaze-large", "pointmaze-giant", "pointmaze-teleport")
NAMES = tuple(
    f"{world}-{kind}"
    for worlds, kinds in ((ARMS, ("play", "noisy")), (MAZES, ("navigate", "stitch")))
    for world in worlds
    for kind in kinds
)
STACKING = {
    "cube-double": (0.0, 0.25), "cube-triple": (0.05, 0.35), "cube-quadruple": (0.1, 0.5), "cube-octuple": (0.0, 0.35),
}  # fmt: skip
"""Range of the probability that a cube is put on top of another, drawn for each episode."""
SCALE = np.array([1.0, 1.0, 1.0, 3.0, 10.0])  # of the noise on x, y, z, yaw and gripper
WALK_NOISE, REACH = 0.5, 4  # standard deviation on the actions of a point; cells of a short walk
TRIES = 100  # attempts at an episode in which no cube is lost
KINDS = {"terminals": np.bool_, "button_states": np.int64}  # all other arrays are float32
WAIT = 0.2  # seconds between two checks whether to stop

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Recipe:
    """The name and seed of a set. With its number in the set they determine an episode."""

    name: str
    seed: int

    @property
    def world(self) -> str:
        return self.name.rpartition("-")[0]

    @property
    def kind(self) -> str:
        return self.name.rpartition("-")[2]

    @property
    def states(self) -> int:
        """Rows of an episode in the file. The dataset has one step less, because the last row is the state after the
        last step."""
        return 201 if self.kind == "stitch" else 2001 if self.world == "pointmaze-giant" else 1001


def find(name: str) -> str:
    """Returns the name in `NAMES` of a set such as `ogbench:cube-single-play`. Raises UserError for other sets."""
    plain = name.removeprefix(PREFIX).removesuffix("-v0")
    if not name.startswith(PREFIX) or plain not in NAMES:
        if plain.startswith(("ant", "humanoid", "visual-", "powderworld")):
            raise UserError(f"{name} comes from trained policies or holds images: download the file of OGBench")
        hint = suggest(name if name.startswith(PREFIX) else PREFIX + name, [PREFIX + known for known in NAMES])
        raise UserError(f"there is no dataset {name} that can be made; {hint}")
    return plain


def make(
    name: str, rows: int, out: Path, seed: int = 0, jobs: int = 1, progress: Callable[[int], bool] = lambda done: False
) -> bool:
    """Writes at least `rows` steps, in whole episodes, to the new file `out`; returns whether it is complete.

    The layout is that of OGBench's files, a row for each state: `observations`, `actions`, `terminals`, `qpos`, `qvel`,
    and `button_states` if the world has buttons.

    Finished episodes are kept in a folder beside the file until it is complete. A later call with the same name and
    seed continues from there. `progress` gets the number of steps made so far, and returns True to stop the work. With
    several `jobs` each process imports the main module, as `multiprocessing` does.

    Raises UserError for an unknown name, a missing package, a place that cannot be written, or a file that exists.
    """
    recipe = Recipe(find(name), seed)
    if min(rows, jobs) < 1 or seed < 0:
        raise UserError(f"rows and jobs must be at least 1 and seed not negative, got {rows}, {jobs} and {seed}")
    if out.suffix != ".npz" or out.is_dir():
        raise UserError(f"{out} is not the name of an array file: give --out a name that ends in .npz")
    if out.exists():
        raise UserError(f"{out} already exists: choose another --out, or delete it")
    if importlib.util.find_spec("ogbench") is None:
        raise UserError(f'{name} needs the package ogbench (Python below 3.13): pip install "contraflow[ogbench]"')
    folder = out.with_name(f"{out.name}.making")
    make_folder(folder)
    with _writable(folder), locked(folder):
        _agree(recipe, folder)
        files = [folder / f"{i:06}.npz" for i in range(-(-rows // (recipe.states - 1)))]

        def told() -> bool:
            return progress(sum(file.exists() for file in files) * (recipe.states - 1))

        todo = [i for i, file in enumerate(files) if not file.exists()]
        if not told() and todo:
            _work(recipe, folder, todo, min(jobs, len(todo)), told)
        if not all(file.exists() for file in files):
            return False
        _assemble(files, out)
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
    wanted: dict[str, Any] = asdict(recipe)
    with suppress(ImportError):
        wanted |= {name: version(name) for name in ("ogbench", "mujoco")}
    file = folder / "recipe.json"
    if file.exists() and (found := read_json(file)) != wanted:
        text = ", ".join(f"{key} {value}" for key, value in found.items())
        raise UserError(f"{folder} holds episodes of another set ({text}): delete it, or choose another --out")
    write_json(file, wanted)


def _assemble(files: Sequence[Path], out: Path) -> None:
    episodes = []
    for file in files:
        try:
            with np.load(file) as arrays:
                episodes.append(dict(arrays))
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{file} is damaged ({error}): delete it, and make the set again") from None
    with replacing(out) as temporary, temporary.open("wb") as stream:
        whole = {key: np.concatenate([episode[key] for episode in episodes]) for key in episodes[0]}
        np.savez_compressed(stream, **whole)  # pyright: ignore[reportArgumentType]


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
                self._source = (Walk if recipe.world in MAZES else Arm)(recipe)
        except ImportError as error:
            raise UserError(
                f'{PREFIX}{recipe.name} lacks a package ({error}): pip install "contraflow[ogbench]"'
            ) from None

    def episode(self, number: int) -> Arrays:
        """Returns episode `number` of the set. Restores NumPy's global generator, from which the oracles draw."""
        before = np.random.get_state()  # noqa: NPY002
        try:
            for attempt in range(TRIES):
                rng = np.random.default_rng([self.recipe.seed, number, attempt])
                np.random.seed(int(rng.integers(2**32)))  # noqa: NPY002
                if (rows := self._source.run(rng)) is not None:
                    return {key: np.asarray(rows[key], KINDS.get(key, np.float32)) for key in rows}
        finally:
            np.random.set_state(before)  # noqa: NPY002
        raise UserError(f"episode {number} of {self.recipe.name} went wrong {TRIES} times: choose another --seed")

    def write(self, number: int, folder: Path) -> None:
        with replacing(folder / f"{number:06}.npz") as temporary, temporary.open("wb") as stream:
            np.savez(stream, **self.episode(number))  # pyright: ignore[reportArgumentType]


class Rows(dict[str, list[Any]]):
    """Columns that grow by one row at a time."""

    def add(self, obs: Any, action: np.ndarray, end: bool, info: dict[str, Any]) -> None:
        row = {"observations": obs, "actions": action, "terminals": end}
        row |= {key: info[f"prev_{key}"] for key in ("qpos", "qvel", "button_states") if f"prev_{key}" in info}
        for key, value in row.items():
            self.setdefault(key, []).append(value)


class Arm:
    """An arm that moves cubes, buttons, a drawer and a window to random targets, one at a time."""

    def __init__(self, recipe: Recipe):
        import gymnasium
        import ogbench.manipspace  # noqa: F401 - registers its environments
        from ogbench.manipspace.oracles.markov import button_markov, cube_markov, drawer_markov, window_markov
        from ogbench.manipspace.oracles.plan import button_plan, cube_plan, drawer_plan, window_plan

        world, play = recipe.world, recipe.kind == "play"
        puzzle, self.scene = world.startswith("puzzle"), world == "scene"
        self.env: Any = gymnasium.make(
            f"{world}-v0",
            max_episode_steps=recipe.states,
            disable_env_checker=True,
            mode="data_collection",
            terminate_at_goal=False,
            visualize_info=False,
        )
        self.stacking = STACKING.get(world, (0.0, 0.0))
        self.noisy, self.random = not play, 0.0 if play else 0.2 if puzzle else 0.1
        parts: dict[str, Any] = {
            "cube": (cube_plan.CubePlanOracle, cube_markov.CubeMarkovOracle),
            "button": (button_plan.ButtonPlanOracle, button_markov.ButtonMarkovOracle),
            "drawer": (drawer_plan.DrawerPlanOracle, drawer_markov.DrawerMarkovOracle),
            "window": (window_plan.WindowPlanOracle, window_markov.WindowMarkovOracle),
        }
        parts = parts if self.scene else {key: parts[key] for key in (("button",) if puzzle else ("cube",))}
        options = {"noise": 0.1, "noise_smoothing": 0.5} if play else {"min_norm": 0.4}
        options |= {"gripper_always_closed": True} if puzzle else {}
        self.oracles = {key: pair[self.noisy](env=self.env, **options) for key, pair in parts.items()}

    def run(self, rng: np.random.Generator) -> Rows | None:
        """Returns one episode; None if the cube of the scene was lost."""
        rows, end = Rows(), False
        stacking, noise = rng.uniform(*self.stacking), rng.uniform(0, 0.1) * SCALE
        obs, info = self.env.reset(seed=int(rng.integers(2**31)))
        oracle = self._oracle(obs, info)
        while not end:
            if self.random and rng.random() < self.random:
                action = rng.uniform(-1, 1, 5)
            else:
                action = np.asarray(oracle.select_action(obs, info)) + self.noisy * noise * rng.standard_normal(5)
            action = np.clip(action, -1, 1).astype(np.float32)
            following, _, terminated, truncated, info = self.env.step(action)
            end = terminated or truncated
            rows.add(obs, action, end, info)
            obs = following
            if oracle.done:
                obs, info = self.env.unwrapped.set_new_target(p_stack=stacking)
                oracle = self._oracle(obs, info)
        return None if self.scene and _lost(np.array(rows["qpos"])) else rows

    def _oracle(self, obs: Any, info: dict[str, Any]) -> Any:
        oracle = self.oracles[info["privileged/target_task"]]
        oracle.reset(obs, info)
        return oracle


def _lost(qpos: np.ndarray) -> bool:
    """Returns whether the cube of the scene fell off to a side, or behind the drawer and not into it."""
    _, y, z = qpos[:, 14:17].T
    return bool((y >= 0.29).any() or ((y <= -0.3) & ((z < 0.06) | (z > 0.08))).any())


class Walk:
    """A point that follows the shortest path through a maze."""

    def __init__(self, recipe: Recipe):
        import gymnasium
        import ogbench.locomaze  # noqa: F401 - registers its environments

        self.stitch = recipe.kind == "stitch"
        self.env: Any = gymnasium.make(
            f"{recipe.world}-v0",
            max_episode_steps=recipe.states,
            disable_env_checker=True,
            terminate_at_goal=False,
        )
        self.maze: Any = self.env.unwrapped
        free = np.asarray(self.maze.maze_map) == 0
        self.cells = np.argwhere(free)
        ways = [(free[i - 1, j], free[i + 1, j], free[i, j - 1], free[i, j + 1]) for i, j in self.cells]
        passages = {(True, True, False, False), (False, False, True, True)}
        self.corners = self.cells[[tuple(map(bool, way)) not in passages for way in ways]]

    def run(self, rng: np.random.Generator) -> Rows:
        """Returns one episode. In `navigate` the walk gets a new goal each time it arrives."""
        maze, rows, end = self.maze, Rows(), False
        maze.action_space.seed(int(rng.integers(2**31)))
        start = _one(rng, self.cells)
        near = np.argwhere(maze.get_oracle_subgoal(maze.ij_to_xy(start), maze.ij_to_xy(start))[1] == REACH)
        goal = _one(rng, self.corners) if not self.stitch else _one(rng, near) if len(near) else start
        task = {"task_name": "walk", "init_ij": start, "goal_ij": goal}
        obs, _ = self.env.reset(seed=int(rng.integers(2**31)), options={"task_info": task})
        while not end:
            here, target = maze.get_xy(), np.array(maze.cur_goal_xy)
            if maze.xy_to_ij(here) != maze.xy_to_ij(target):  # the centre of its cell may be too far from the goal
                target = maze.get_oracle_subgoal(here, target)[0]
            way = target - here
            action = way / (np.linalg.norm(way) + 1e-6) + WALK_NOISE * rng.standard_normal(2)
            action = np.clip(action, -1, 1).astype(np.float32)
            following, _, terminated, truncated, info = self.env.step(action)
            end = terminated or truncated
            rows.add(obs, action, end, info)
            obs = following
            if info["success"] and not self.stitch:
                maze.set_goal(goal_xy=maze.add_noise(maze.ij_to_xy(_one(rng, self.corners))))
        return rows


def _one(rng: np.random.Generator, cells: np.ndarray) -> tuple[int, int]:
    i, j = cells[rng.integers(len(cells))]
    return int(i), int(j)
