"""Demonstrations made on this machine, without a download: scripted controllers, and the oracles of OGBench.

    python examples/demonstrations.py maze --episodes 100 --out maze.npz [--stitch]
    python examples/demonstrations.py cube --episodes 100 --out cube.npz
    python examples/demonstrations.py metaworld --task DrawerOpen --episodes 50 --out ./drawer-open

`maze` and `cube` take the extra `offline`. An OUT that ends in .npz is a file as OGBench publishes it, a row for each
state and no rewards: name a task when it is read, `contraflow data info cube.npz --task cube-single-singletask-v0`. Any
other OUT is a Minari set with the rewards of `--task`. `metaworld` takes the extra `envpool`; its rewards are dense.
Each prints how often the controller succeeded.
"""

import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import tyro

from contraflow.core.types import UserError
from contraflow.data.datasets.dataset import Dataset, join
from contraflow.data.datasets.readers import from_arrays
from contraflow.data.datasets.write import check_target, write
from contraflow.envs.base import prefer_egl

Rows = list[dict[str, np.ndarray]]  # one for each state of an episode; the action of the last is not carried out
Controller = Callable[[np.ndarray, np.ndarray], np.ndarray]


def maze(
    episodes: int,
    out: str,
    size: Literal["medium", "large", "giant"] = "medium",
    stitch: bool = False,
    noise: float = 0.5,
    task: str | None = None,
    seed: int = 0,
) -> None:
    """A point that walks to random cells along shortest paths, with noisy actions: 1000 steps from goal to goal, or
    with --stitch 200 steps between cells that are at most four apart."""
    env = _ogbench(f"pointmaze-{size}-v0", terminate_at_goal=False)
    world, rng = env.unwrapped, np.random.default_rng(seed)
    cells = [(int(i), int(j)) for i, j in np.argwhere(world.maze_map == 0)]

    def goal_from(cell: tuple[int, int], reach: int | None) -> tuple[int, int]:
        distance = world.get_oracle_subgoal(world.ij_to_xy(cell), world.ij_to_xy(cell))[1]
        near = [c for c in cells if distance[c] > 0 and (reach is None or distance[c] <= reach)]
        return near[rng.integers(len(near))]

    def episode() -> tuple[Rows, int, int]:
        """One walk: its rows, the goals it reached, the goals it had to reach."""
        start = cells[rng.integers(len(cells))]
        goal = goal_from(start, 4 if stitch else None)
        obs, _ = env.reset(options={"task_info": {"task_name": "walk", "init_ij": start, "goal_ij": goal}})
        rows, reached = [], 0
        for _ in range(201 if stitch else 1001):
            here = world.get_xy()
            if world.compute_success() and not (stitch and reached):
                reached += 1
                if not stitch:
                    world.set_goal(goal_from(world.xy_to_ij(here), None))
            target = world.cur_goal_xy
            if world.xy_to_ij(here) != world.xy_to_ij(target):
                target = world.get_oracle_subgoal(here, target)[0]
            way = target - here
            action = way / max(1.0, np.linalg.norm(way)) + noise * rng.standard_normal(2)
            action = np.clip(action, -1, 1).astype(np.float32)
            rows.append({"observations": obs, "actions": action, "qpos": here, "qvel": world.data.qvel.copy()})
            obs = env.step(action)[0]
        return rows, reached, int(stitch)  # a walk that goes on has no number of goals to reach

    _save_ogbench(
        out, [episode() for _ in _counted(out, episodes, seed)], task, "goals reached", f"maze oracle, noise {noise:g}"
    )


def cube(episodes: int, out: str, noise: float = 0.1, task: str | None = None, seed: int = 0) -> None:
    """An arm that carries a cube from one random place to another, by a plan with correlated noise: 1000 steps."""
    env = _ogbench("cube-single-v0", mode="data_collection", terminate_at_goal=False)
    from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle

    world, oracle = env.unwrapped, CubePlanOracle(env=env, noise=noise)

    def episode(number: int) -> tuple[Rows, int, int]:
        """One episode: its rows, the cubes that were placed, the plans it had for that."""
        obs, info = env.reset(seed=seed * 100_000 + number)
        oracle.reset(obs, info)
        rows, reached, plans = [], 0, 0
        for _ in range(1001):
            action = np.clip(oracle.select_action(obs, info), -1, 1).astype(np.float32)
            rows.append({"observations": obs, "actions": action, "qpos": info["qpos"], "qvel": info["qvel"]})
            obs, _, _, _, info = env.step(action)
            if oracle.done:
                reached, plans = reached + bool(info["success"]), plans + 1
                obs, info = world.set_new_target(return_info=True)
                oracle.reset(obs, info)
        return rows, reached, plans

    done = [episode(number) for number in _counted(out, episodes, seed)]
    _save_ogbench(out, done, task, "cubes placed", f"cube oracle, noise {noise:g}")


def _ogbench(id: str, **options: Any) -> Any:
    prefer_egl()
    try:
        import gymnasium
        import ogbench  # noqa: F401 - registers its environments
    except ImportError as error:
        raise UserError(f'{id} needs OGBench ({error}): pip install "contraflow[offline]"') from None
    return gymnasium.make(id, max_episode_steps=10_000, **options)


def _counted(out: str, episodes: int, seed: int) -> Any:
    """Numbers of the episodes, with a line on progress; OGBench draws from NumPy's global generator."""
    check_target(out)
    np.random.seed(seed)  # noqa: NPY002
    started = time.perf_counter()
    for number in range(episodes):
        yield number
        if number + 1 == episodes or (number + 1) % 10 == 0:
            print(f"{number + 1} of {episodes} episodes, {time.perf_counter() - started:.0f} s", flush=True)


def _save_ogbench(out: str, done: list[tuple[Rows, int, int]], task: str | None, what: str, by: str) -> None:
    reached, wanted = sum(item[1] for item in done), sum(item[2] for item in done)
    print(
        f"{reached} of {wanted} {what}, {reached / wanted:.0%}" if wanted else f"{reached} {what} in {len(done)} walks"
    )
    arrays = {key: np.stack([row[key] for rows, *_ in done for row in rows]) for key in done[0][0][0]}
    arrays["terminals"] = np.concatenate([np.arange(len(rows)) == len(rows) - 1 for rows, *_ in done])
    arrays = {key: value.astype(np.float32) for key, value in arrays.items()}
    if out.endswith(".npz"):
        place = check_target(out)
        place.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(place.with_suffix(".tmp.npz"), **arrays)  # pyright: ignore[reportArgumentType]
        place.with_suffix(".tmp.npz").rename(place)
        print(f"written {place}")
    else:
        _save(from_arrays(arrays, name=out, task=task), out, by)


def drawer_open(hand: np.ndarray, handle: np.ndarray) -> np.ndarray:
    """Where to move: above the handle, down to it, and back with it."""
    over = abs(hand[0] - handle[0]) < 0.02 and abs(hand[1] - handle[1]) < 0.04
    if not over:
        return handle + np.array([0, 0, 0.12])
    return handle if hand[2] > handle[2] + 0.04 else handle - np.array([0, 0.2, 0])


def press_down(hand: np.ndarray, button: np.ndarray) -> np.ndarray:
    """Where to move: above the button, then down."""
    over = np.linalg.norm(hand[:2] - button[:2]) < 0.03
    return button + np.array([0, 0, -0.2 if over else 0.1])


CONTROLLERS: dict[str, tuple[Controller, float]] = {  # the last number closes (1) or opens (-1) the gripper
    "DrawerOpen": (drawer_open, -1.0),
    "ButtonPressTopdown": (press_down, 1.0),
}


def metaworld(
    episodes: int,
    out: str,
    task: Literal["DrawerOpen", "ButtonPressTopdown"] = "DrawerOpen",
    noise: float = 0.1,
    speed: float = 1.0,
    after: int = 20,
    seed: int = 0,
) -> None:
    """A hand that moves from waypoint to waypoint, with noisy actions, and stops `after` steps beyond its success.

    `speed` in (0, 1] bounds how far it moves in a step."""
    check_target(out)
    try:
        import envpool
    except ImportError:
        raise UserError('MetaWorld tasks need EnvPool: pip install "contraflow[envpool]"') from None
    id, copies, started = f"MetaWorld/{task}-v3", min(episodes, 16), time.perf_counter()
    parts, successes = [], 0
    for batch in range(-(-episodes // copies)):
        pool = envpool.make_gymnasium(id, num_envs=copies, seed=seed * 100_000 + batch * copies)
        rows, first = _demonstrate(pool, *CONTROLLERS[task], noise, speed, after, np.random.default_rng([seed, batch]))
        pool.close()
        for copy in range(min(copies, episodes - len(parts))):
            steps = len(rows["action"]) if first[copy] < 0 else min(len(rows["action"]), first[copy] + 1 + after)
            part = {key: rows[key][:steps, copy] for key in ("action", "reward")}
            parts.append(part | {"obs": rows["obs"][: steps + 1, copy], "terminated": np.zeros(steps, bool)})
            successes += first[copy] >= 0
    print(f"{successes} of {episodes} succeeded, {successes / episodes:.0%}, {time.perf_counter() - started:.0f} s")
    data = join(parts, name=id, env=f"envpool:{id}", low=-1, high=1)
    _save(data, out, f"waypoints, noise {noise:g}, speed {speed:g}, stopped {after} steps after the success")


def _demonstrate(
    pool: Any, controller: Controller, grip: float, noise: float, speed: float, after: int, rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(obs [T+1, N, o], action and reward [T, N, ...]), and the step [N] of the first success, -1 without one."""
    limit = 499  # one less than the task's own: its copies would start anew
    obs, copies = [pool.reset()[0].astype(np.float32)], pool.num_envs
    actions, rewards, first = [], [], np.full(copies, -1)
    for step in range(limit):
        ways = [controller(row[:3], row[4:7]) - row[:3] for row in obs[-1]]
        action = np.array([[*np.clip(10 * way, -speed, speed), grip] for way in ways])
        action[:, :3] += noise * rng.standard_normal((copies, 3))
        actions.append(np.clip(action, -1, 1).astype(np.float32))
        new, reward, *_, info = pool.step(actions[-1])
        order = np.argsort(info["env_id"])
        obs.append(new[order].astype(np.float32))
        rewards.append(reward[order])
        first = np.where((first < 0) & (info["success"][order] > 0), step, first)
        if (first >= 0).all() and step >= first.max() + after:
            break
    return {"obs": np.stack(obs), "action": np.stack(actions), "reward": np.stack(rewards)}, first


def _save(data: Dataset, out: str, by: str) -> None:
    place = write(data, out, algorithm=by)
    lengths = data.lengths
    print(f"written {place}: {len(data)} steps in {len(lengths)} trajectories of {lengths.min()} to {lengths.max()}")


if __name__ == "__main__":
    try:
        tyro.extras.subcommand_cli_from_dict({"maze": maze, "cube": cube, "metaworld": metaworld})
    except UserError as error:
        sys.exit(f"error: {error}")
