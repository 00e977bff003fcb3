"""Makes OGBench's datasets (2410.20092) with the environments and scripted oracles of the package `ogbench`.

- `play`: an arm follows open-loop plans to random targets, with correlated noise. `noisy`: closed-loop oracles with
  Gaussian noise of a different strength in each episode, and a share of uniform actions.
- `navigate`: a point walks through a maze from one corner or crossing to the next, with noisy actions. `stitch`: short
  walks to a cell four steps away.

The layout is that of OGBench's files, a row for each state: `observations`, `actions`, `terminals`, `qpos`, `qvel`, and
`button_states` if the world has buttons. The sets of ant, humanoid and ball come from trained policies and are not made
here.
"""

from typing import Any

import numpy as np

from contraflow.core.errors import UserError
from contraflow.core.settings import suggest
from contraflow.data.make.episodes import Arrays, Recipe, Source

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
KINDS = {"terminals": np.bool_, "button_states": np.int64}  # all other arrays are float32


def find(name: str, seed: int = 0) -> Recipe:
    """Returns the recipe of a set such as `ogbench:cube-single-play`. Raises UserError for other sets."""
    plain = name.removeprefix(PREFIX).removesuffix("-v0")
    if not name.startswith(PREFIX) or plain not in NAMES:
        if plain.startswith(("ant", "humanoid", "visual-", "powderworld")):
            raise UserError(f"{name} comes from trained policies or holds images: download the file of OGBench")
        hint = suggest(name if name.startswith(PREFIX) else PREFIX + name, [PREFIX + known for known in NAMES])
        raise UserError(f"there is no dataset {name} that can be made; {hint}")
    install = 'pip install "contraflow[ogbench]" (Python below 3.13)'
    return Recipe(PREFIX + plain, seed, states(plain) - 1, source, ("ogbench", "mujoco"), install)


def states(name: str) -> int:
    """Rows of an episode in the file. The dataset has one step less, because the last row is the state after the last
    step."""
    return 201 if name.endswith("stitch") else 2001 if "pointmaze-giant" in name else 1001


def source(name: str) -> Source:
    """Returns what makes episodes of a set."""
    world, _, kind = name.removeprefix(PREFIX).rpartition("-")
    return Walk(world, kind) if world in MAZES else Arm(world, kind)


class Rows(dict[str, list[Any]]):
    """Columns that grow by one row at a time."""

    def add(self, obs: Any, action: np.ndarray, end: bool, info: dict[str, Any]) -> None:
        row = {"observations": obs, "actions": action, "terminals": end}
        row |= {key: info[f"prev_{key}"] for key in ("qpos", "qvel", "button_states") if f"prev_{key}" in info}
        for key, value in row.items():
            self.setdefault(key, []).append(value)

    def arrays(self) -> Arrays:
        return {key: np.asarray(self[key], KINDS.get(key, np.float32)) for key in self}


class Arm:
    """An arm that moves cubes, buttons, a drawer and a window to random targets, one at a time."""

    def __init__(self, world: str, kind: str):
        import gymnasium
        import ogbench.manipspace  # noqa: F401 - registers its environments
        from ogbench.manipspace.oracles.markov import button_markov, cube_markov, drawer_markov, window_markov
        from ogbench.manipspace.oracles.plan import button_plan, cube_plan, drawer_plan, window_plan

        play = kind == "play"
        puzzle, self.scene = world.startswith("puzzle"), world == "scene"
        self.env: Any = gymnasium.make(
            f"{world}-v0",
            max_episode_steps=states(f"{world}-{kind}"),
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

    def run(self, rng: np.random.Generator) -> Arrays | None:
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
        return None if self.scene and _lost(np.array(rows["qpos"])) else rows.arrays()

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

    def __init__(self, world: str, kind: str):
        import gymnasium
        import ogbench.locomaze  # noqa: F401 - registers its environments

        self.stitch = kind == "stitch"
        self.env: Any = gymnasium.make(
            f"{world}-v0",
            max_episode_steps=states(f"{world}-{kind}"),
            disable_env_checker=True,
            terminate_at_goal=False,
        )
        self.maze: Any = self.env.unwrapped
        free = np.asarray(self.maze.maze_map) == 0
        self.cells = np.argwhere(free)
        ways = [(free[i - 1, j], free[i + 1, j], free[i, j - 1], free[i, j + 1]) for i, j in self.cells]
        passages = {(True, True, False, False), (False, False, True, True)}
        self.corners = self.cells[[tuple(map(bool, way)) not in passages for way in ways]]

    def run(self, rng: np.random.Generator) -> Arrays:
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
        return rows.arrays()


def _one(rng: np.random.Generator, cells: np.ndarray) -> tuple[int, int]:
    i, j = cells[rng.integers(len(cells))]
    return int(i), int(j)
