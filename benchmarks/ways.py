"""What a flow policy is for: three tasks with several best ways, before and after one of them is blocked.

    python benchmarks/ways.py train        # runs/ways/TASK-METHOD/seedN, all seeds of each in one program
    python benchmarks/ways.py evaluate     # docs/data/ways.csv
    python benchmarks/ways.py picture      # docs/img/ways.png; `first`: docs/img/peaks.png

Nothing is learned after training. Of each policy 200 episodes are played, by the rule of exploration ("sampled") and by
that of evaluation ("greedy"), and the way that each takes is noted: which goal is reached, or the side to which the arm
bends. Then the way that this policy takes most often is blocked by an obstacle in its middle, and 200 episodes are
played again.

In the third task there is one step: the bandit `two-peak` in six dimensions, whose best soft policy has two narrow
Gaussians on a diagonal, half and half. It is learned with a critic at its own temperature of 1; a way is a draw within
1.5 standard deviations per dimension of a peak, and to block a peak takes its reward away.
"""

import math
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
from contraflow.core.plotting import drawing
from contraflow.envs.bandit import Bandit, TwoPeak
from contraflow.envs.drawing import BLUE, ORANGE, Disc
from contraflow.envs.ways import GOAL, GOALS, MultiGoal, TwoWayArm
from contraflow.policy.best_of import First
from contraflow.presets import preset_run
from contraflow.rl.temperature import Constant, Tuned
from contraflow.runtime.policy import load
from contraflow.training.run import Run, train_seeds

RUNS, IMAGE = Path("runs/ways"), DATA.parent / "img" / "ways.png"
PEAKS = TwoPeak()
TASKS: dict[str, Any] = {"two-peak": Bandit(PEAKS, 6), "multi-goal": MultiGoal(), "two-way-arm": TwoWayArm()}
TITLES = {
    "two-peak": "two peaks in six dimensions\n(actions, two of them shown)",
    "multi-goal": "four goals\n(ways of the point)",
    "two-way-arm": "an arm of eight joints\n(as episodes end)",
}
METHODS = ("rfm", "sac", "td3", "sir")
EPISODES = 200


def settings(task: str, method: str, steps: int) -> Run:
    """12 000 steps of 8 copies, 4 updates for each round of them; networks of two layers of 64.

    Entropy is tuned to 0 per dimension in `rfm` and `sac`, which then has the learning rate and the first temperature
    of `rfm`; `rfm` explores by what it has learned, without a choice among particles, which would narrow it. The arm
    has gamma .95, targets that follow at .02 and three-step returns: else three of five seeds of `rfm` lost near the
    end what they had learned.
    """
    run = preset_run(method)
    agent: Any = run.agent
    agent = replace(agent, critic=replace(agent.critic, width=64, depth=2))
    if method == "rfm":
        agent = replace(agent, choose=replace(agent.choose, explore=First()), temperature=Tuned(0.0))
    elif method != "sir":
        agent = replace(agent, actor=replace(agent.actor, width=64))
    if method == "sac":
        rate = Optim(1e-3)
        agent = replace(agent, target_entropy=0.0, init_alpha=0.1, optim=rate, alpha_optim=rate)
    env = f"bandit:{task}/6" if task == "two-peak" else f"jax:{task}"
    source = replace(run.source, env=env, num_envs=8, collect=2000 if task == "two-peak" else 1000, updates=4)
    if task == "two-peak":
        agent = replace(agent, critic=replace(agent.critic, tau=0.02))
        if method in ("rfm", "sir"):
            agent = replace(agent, temperature=Constant(PEAKS.lam))
        if method == "sac":
            agent = replace(agent, init_alpha=PEAKS.lam, alpha_optim=Optim(1e-30))
    if task == "two-way-arm":
        agent = replace(agent, critic=replace(agent.critic, gamma=0.95, tau=0.02))
        source = replace(source, n_step=3)
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


def closed(task: Any, found: np.ndarray, bodies: np.ndarray) -> Any:
    """The task with an obstacle on the way that most of these episodes took: on the straight way to a goal, or where
    the joint of the arm that is farthest to the side ends on the average."""
    favourite = int(np.bincount(found[found >= 0], minlength=1).argmax())
    if isinstance(task, MultiGoal):
        return replace(task, blocked=favourite)
    places = np.asarray(jax.vmap(task.places)(jnp.asarray(bodies[-1])))  # [N, joints, 2]
    mean = places[found == favourite if np.any(found == favourite) else found < 0].mean(0)
    x, y = mean[np.abs(mean[:, 0]).argmax()]
    return replace(task, blocked=(float(x), float(y)))


def row_of(policy: Any, name: str, greedy: bool) -> Row:
    """Returns and ways with all of them open, and with the favourite one blocked."""
    if name == "two-peak":
        return row_of_bandit(policy, greedy)
    task = replace(TASKS[name], num_envs=EPISODES)
    n = len(GOALS) if name == "multi-goal" else 2
    returns, found, bodies = play(policy, task, greedy, 0)
    counts = np.bincount(found[found >= 0], minlength=n)
    shares = counts / len(found)
    p = counts[counts > 0] / max(counts.sum(), 1)
    returns_blocked, found_blocked, _ = play(policy, closed(task, found, bodies), greedy, 1)
    return {
        "return": float(returns.mean()), "success": float(shares.sum()), "bits": float(-(p * np.log2(p)).sum()) + 0.0,
        "ways": int((shares > 0.05).sum()), "favourite": float(shares.max()),
        "blocked_return": float(returns_blocked.mean()), "blocked_success": float((found_blocked >= 0).mean()),
    }  # fmt: skip


def row_of_bandit(policy: Any, greedy: bool) -> Row:
    """As `row_of`, of 2000 actions."""
    act = jax.jit(jax.vmap(lambda key: policy(jnp.zeros(1), key, greedy)))
    actions = np.asarray(act(jr.split(jr.key(0), 10 * EPISODES)))
    off = np.stack([np.linalg.norm(actions - side * PEAKS.centre, axis=1) for side in (1, -1)], 1)
    near = off.min(1) < 1.5 * PEAKS.width * math.sqrt(actions.shape[1])
    shares = np.bincount(off.argmin(1)[near], minlength=2) / len(actions)
    p = shares[shares > 0] / max(shares.sum(), 1e-9)
    favourite = int(shares.argmax())
    other = -0.5 * (off[:, 1 - favourite] / PEAKS.width) ** 2
    return {
        "return": float(jax.vmap(PEAKS)(jnp.asarray(actions)).mean()), "success": float(shares.sum()),
        "bits": float(-(p * np.log2(p)).sum()) + 0.0, "ways": int((shares > 0.05).sum()),
        "favourite": float(shares.max()), "blocked_return": float(other.mean()), "blocked_success": float(shares.min()),
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
    """Every task and method that has no folder yet."""
    for task in options.tasks:
        for method in options.methods:
            folder = options.runs / f"{task}-{method}"
            if not folder.exists():
                train_seeds(settings(task, method, options.steps), options.seeds, folder, quiet=True)
                print(folder, flush=True)


def evaluate(options: Options) -> None:
    """A row for each policy and rule of acting; means over seeds are printed."""
    rows: list[Row] = []
    for task in options.tasks:
        for method in options.methods:
            for seed in options.seeds:
                if not (options.runs / f"{task}-{method}" / f"seed{seed}").exists():
                    continue
                policy = load(options.runs / f"{task}-{method}" / f"seed{seed}").network
                for rule in ("sampled", "greedy"):
                    row = row_of(policy, task, rule == "greedy")
                    rows.append({"task": task, "method": method, "seed": seed, "rule": rule} | row)
            for rule in ("sampled", "greedy"):
                same = [r for r in rows if (r["task"], r["method"], r["rule"]) == (task, method, rule)]
                means = {k: np.mean([r[k] for r in same]) for k in list(same[0])[4:]}
                print(task, method, rule, " ".join(f"{k} {v:.2f}" for k, v in means.items()), flush=True)
    write(DATA / "ways.csv", rows)


def picture(options: Options) -> None:
    """Draws and episodes of seed 0 of a flow and of a Gaussian policy, as they explore."""
    with drawing(IMAGE, 7.2, 5.2) as figure:
        axes = figure.subplots(2, 3)
        for i, (method, label) in enumerate((("rfm", "flow (rfm)"), ("sac", "Gaussian (sac)"))):
            axes[i, 0].set_ylabel(label)
            for j, name in enumerate(TASKS):
                ax, policy = axes[i, j], load(options.runs / f"{name}-{method}" / "seed0").network
                row = row_of(policy, name, False)
                if name == "two-peak":
                    act = jax.vmap(lambda key, policy=policy: policy(jnp.zeros(1), key, False))
                    draws = np.asarray(act(jr.split(jr.key(2), 400)))
                    for side in (1, -1):
                        discs(ax, [Disc((side * PEAKS.centre, side * PEAKS.centre), PEAKS.width, ORANGE)])
                    ax.plot(*draws[:, :2].T, ".", color=BLUE, markersize=3, alpha=0.6)
                    ax.set(xlim=(-1, 1), ylim=(-1, 1))
                else:
                    task = replace(TASKS[name], num_envs=24)
                    _, _, bodies = play(policy, task, False, 2)
                    discs(ax, backdrop(task))
                    for k in range(24):
                        ax.plot(*trace(task, bodies[:, k]).T, color=BLUE, linewidth=1.2, alpha=0.45)
                    low, reach = (-0.25, 0.7) if name == "two-way-arm" else (-1.3, 1.3)
                    ax.set(xlim=(-reach, reach), ylim=(low, low + 2 * reach))
                ax.set(xticks=[], yticks=[], aspect="equal")
                open_, blocked = (f"{100 * row[k]:.0f} %" for k in ("success", "blocked_success"))
                ax.set_xlabel(f"{open_} arrive; favourite blocked: {blocked}", fontsize=8)
                if i == 0:
                    ax.set_title(TITLES[name], fontsize=9)
    print(IMAGE.name)


def first(options: Options) -> None:
    """The first picture of the README: 400 actions of a flow and of a Gaussian policy where two actions are best."""
    with drawing(IMAGE.with_name("peaks.png"), 7.2, 3.9) as figure:
        axes = figure.subplots(1, 2)
        for ax, (method, label) in zip(
            axes, (("rfm", "flow policy (rfm)"), ("sac", "Gaussian policy (sac)")), strict=True
        ):
            policy = load(options.runs / f"two-peak-{method}" / "seed0").network
            act = jax.vmap(lambda key, policy=policy: policy(jnp.zeros(1), key, False))
            draws = np.asarray(act(jr.split(jr.key(2), 400)))
            for side in (1, -1):
                discs(ax, [Disc((side * PEAKS.centre, side * PEAKS.centre), PEAKS.width, ORANGE)])
            ax.plot(*draws[:, :2].T, ".", color=BLUE, markersize=3.5, alpha=0.6)
            ax.set(xlim=(-1, 1), ylim=(-1, 1), xticks=[-1, 0, 1], yticks=[-1, 0, 1], aspect="equal")
            ax.set_xlabel("first of six action dimensions")
            ax.set_title(label)
        axes[0].set_ylabel("second")


def discs(axes: Any, shapes: list[Disc]) -> None:
    from matplotlib.patches import Circle

    for disc in shapes:
        x, y = map(float, disc.centre)
        axes.add_patch(Circle((x, y), disc.radius, color=disc.colour, linewidth=0))


def backdrop(task: Any) -> list[Disc]:
    """Goals and obstacles."""
    body = jnp.full(2, 9.0) if isinstance(task, MultiGoal) else jnp.zeros(task.joints)
    return [
        shape
        for shape in task.sketch(body)
        if isinstance(shape, Disc) and shape.radius >= 0.05 and shape.colour != BLUE
    ]


def trace(task: Any, bodies: np.ndarray) -> np.ndarray:
    """The way of the point, or the arm as the episode ends: [n, 2]."""
    bodies = bodies[~np.isnan(bodies[:, 0])]
    if isinstance(task, MultiGoal):
        return bodies
    return np.concatenate([np.zeros((1, 2)), np.asarray(task.places(jnp.asarray(bodies[-1])))])


if __name__ == "__main__":
    options = tyro.cli(Options)
    print(machine())
    {"train": train, "evaluate": evaluate, "picture": picture, "first": first}[options.command](options)
