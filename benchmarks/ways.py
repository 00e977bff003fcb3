"""What a flow policy is for: two tasks with several best ways, before and after one of them is blocked.

    python benchmarks/ways.py train        # runs/ways/TASK-METHOD/seedN, five seeds of each in one program
    python benchmarks/ways.py evaluate     # docs/data/ways.csv
    python benchmarks/ways.py picture      # docs/img/ways.svg

Nothing is learned after training. Of each policy 200 episodes are played, by the rule of exploration ("sampled") and by
that of evaluation ("greedy"), and the way that each takes is noted: which goal is reached, or the side to which the arm
bends. Then the way that this policy takes most often is blocked, and 200 episodes are played again.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from common import DATA, Row, machine, write

from contraflow.core.optim import Optim
from contraflow.envs.ways import GOAL, GOALS, MultiGoal, TwoWayArm
from contraflow.policy.best_of import First
from contraflow.presets import preset_run
from contraflow.rl.temperature import Tuned
from contraflow.runtime.policy import load
from contraflow.training.run import Run, train_seeds

RUNS = Path("runs/ways")
TASKS: dict[str, Any] = {"multi-goal": MultiGoal(), "two-way-arm": TwoWayArm()}
METHODS = ("rfm", "sac", "td3", "sir")
EPISODES = 200


def settings(task: str, method: str, steps: int) -> Run:
    """12 000 steps of 8 copies, 4 updates for each round of them; networks of two layers of 64.

    Entropy is tuned to 0 per dimension in `rfm` and `sac`, which then has the learning rate and the first temperature
    of `rfm`; `rfm` explores by what it has learned, without a choice among particles, which would narrow it.
    """
    run = preset_run(method)
    agent = run.agent
    agent = replace(agent, critic=replace(agent.critic, width=64, depth=2))
    if method == "rfm":
        agent = replace(agent, choose=replace(agent.choose, explore=First()), temperature=Tuned(0.0))
    elif method != "sir":
        agent = replace(agent, actor=replace(agent.actor, width=64))
    if method == "sac":
        rate = Optim(1e-3)
        agent = replace(agent, target_entropy=0.0, init_alpha=0.1, optim=rate, alpha_optim=rate)
    source = replace(run.source, env=f"jax:{task}", num_envs=8, collect=1000, updates=4)
    return replace(run, agent=agent, source=source, steps=steps, eval_every=steps // 4, eval_episodes=16)


@partial(jax.jit, static_argnums=(1, 2))
def episodes(policy: Any, task: Any, greedy: bool, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Bodies [T, N, s], rewards and whether the episode was still going [T, N] of the first episode of each copy."""
    k_reset, k_act = jr.split(key)
    state, obs = task.reset(k_reset)

    def step(carry, key):
        state, obs, going = carry
        action = jax.vmap(lambda o, k: policy(o, k, greedy))(obs, jr.split(key, task.num_envs))
        body = state.body
        state, after = task.step(state, action)
        return (state, after.obs, going & ~(after.terminated | after.truncated)), (body, after.reward, going)

    carry = state, obs, jnp.ones(task.num_envs, bool)
    return jax.lax.scan(step, carry, jr.split(k_act, task.spec.episode_length))[1]


def ways(task: Any, bodies: np.ndarray, going: np.ndarray) -> np.ndarray:
    """The way of each episode [N]: a goal or a side, -1 where none was reached."""
    last = bodies[going.sum(0) - 1, np.arange(bodies.shape[1])]
    if isinstance(task, MultiGoal):
        squares = np.sum((last[:, None] - np.asarray(GOALS)) ** 2, -1)
        near = np.sqrt(squares.min(1)) < GOAL + 0.1  # the step that ends an episode is not among the bodies
        return np.where(near & (going.sum(0) < len(bodies)), squares.argmin(1), -1)
    places = np.asarray(jax.vmap(task.places)(jnp.asarray(last)))
    near = np.linalg.norm(places[:, -1] - np.array([0.0, 0.5]), axis=1) < 0.1
    return np.where(near, (places[..., 0].mean(1) > 0).astype(int), -1)


def play(policy: Any, task: Any, greedy: bool, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(returns [N], ways [N], bodies [T, N, s] with NaN after the end)."""
    bodies, rewards, going = map(np.asarray, episodes(policy, task, greedy, jr.key(seed)))
    shown = np.where(going[..., None], bodies, np.nan)
    return (rewards * going).sum(0), ways(task, bodies, going), shown


def row_of(policy: Any, name: str, greedy: bool) -> Row:
    """Returns and ways with all of them open, and with the favourite one blocked."""
    task = replace(TASKS[name], num_envs=EPISODES)
    n = len(GOALS) if name == "multi-goal" else 2
    returns, found, _ = play(policy, task, greedy, 0)
    counts = np.bincount(found[found >= 0], minlength=n)
    shares = counts / len(found)
    p = counts[counts > 0] / max(counts.sum(), 1)
    favourite = int(counts.argmax())
    blocked = replace(task, blocked=favourite if name == "multi-goal" else 2 * favourite - 1)
    returns_blocked, found_blocked, _ = play(policy, blocked, greedy, 1)
    return {
        "return": float(returns.mean()), "success": float(shares.sum()), "bits": float(-(p * np.log2(p)).sum()) + 0.0,
        "ways": int((shares > 0.05).sum()), "favourite": float(shares.max()),
        "blocked_return": float(returns_blocked.mean()), "blocked_success": float((found_blocked >= 0).mean()),
    }  # fmt: skip


@dataclass(frozen=True)
class Options:
    command: tyro.conf.Positional[str]
    tasks: tuple[str, ...] = tuple(TASKS)
    methods: tuple[str, ...] = METHODS
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int = 12_000
    runs: Path = RUNS


def train(options: Options) -> None:
    for task in options.tasks:
        for method in options.methods:
            folder = options.runs / f"{task}-{method}"
            if not folder.exists():
                train_seeds(settings(task, method, options.steps), options.seeds, folder, quiet=True)
                print(folder, flush=True)


def evaluate(options: Options) -> None:
    rows: list[Row] = []
    for task in options.tasks:
        for method in options.methods:
            for seed in options.seeds:
                policy = load(options.runs / f"{task}-{method}" / f"seed{seed}").network
                for rule in ("sampled", "greedy"):
                    row = row_of(policy, task, rule == "greedy")
                    rows.append({"task": task, "method": method, "seed": seed, "rule": rule} | row)
            for rule in ("sampled", "greedy"):
                same = [r for r in rows if (r["task"], r["method"], r["rule"]) == (task, method, rule)]
                means = {k: np.mean([r[k] for r in same]) for k in list(same[0])[4:]}
                print(task, method, rule, " ".join(f"{k} {v:.2f}" for k, v in means.items()), flush=True)
    write(DATA / "ways.csv", rows)


if __name__ == "__main__":
    options = tyro.cli(Options)
    print(machine())
    {"train": train, "evaluate": evaluate}[options.command](options)
