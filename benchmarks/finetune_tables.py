"""Tables and pictures of the runs of benchmarks/finetune.py, over all tasks.

    python benchmarks/finetune_tables.py table --out DIR     # results/finetune*.csv, docs/img/finetune.png
    python benchmarks/finetune_tables.py finals --out DIR    # results/finetune_TASK.csv, 64 fresh episodes each
    python benchmarks/finetune_tables.py success --out DIR   # share of the drawers that are opened
    python benchmarks/finetune_tables.py fans --out DIR      # docs/img/fans.png, chunks before and after
    python benchmarks/finetune_tables.py film --out DIR      # docs/img/hopper.gif, one episode before and after

R is the mean of a run's last three evaluations (24 episodes), R_BC the return of the imitation that it started from,
R_ref the mean over seeds of the best evaluation of PPO in three times the steps, or the expert's return if that is
better. Reported: (R - R_BC) / (R_ref - R_BC), and the first evaluation at which a run has .5, .75 and .9 of the way.
"""

import sys
from pathlib import Path
from typing import Any, Literal

import jax.random as jr
import numpy as np
import tyro
from finetune import METHODS, TASKS, finished
from tables import write

from contraflow import load
from contraflow.runtime.receding import Receding
from contraflow.runtime.variants import environment
from contraflow.training.evaluate import evaluate
from contraflow.training.log import read_evaluations

RESULTS, PICTURES = Path(__file__).parent / "results", Path(__file__).parent.parent / "docs" / "img"
SCRIPTED = {"drawer": 4112.0}  # demonstrations.py metaworld --speed 1 over whole episodes, mean of 16
LEVELS = (0.5, 0.75, 0.9)
NAMES = {
    "reinflow-4": "ReinFlow, K = 4", "reinflow-1": "ReinFlow, K = 1", "dppo-10": "DPPO, K = 10", "fpo": "FPO",
    "ppo": "PPO, from scratch",
}  # fmt: skip


def curve(folder: Path) -> np.ndarray:
    """[n, 3]: step, seconds, return."""
    return np.array([[row[k] for k in ("step", "seconds", "return_mean")] for row in read_evaluations(folder)])


def cells(out: Path, task: str) -> dict[str, dict[int, np.ndarray]]:
    """Curves of the finished runs by method and seed."""
    return {
        name: {
            seed: curve(folder)
            for seed in range(3)
            if finished(folder := out / task / name / f"seed{seed}")
        }
        for name in NAMES
    }  # fmt: skip


def expert(out: Path, task: str) -> float:
    """The return of who gave the demonstrations, or of the same kind of policy trained for longer."""
    if task in SCRIPTED:
        return SCRIPTED[task]
    policy = load(out / task / "expert" / "seed0" / "best" if TASKS[task].source else out / task / "half")
    with environment(policy, TASKS[task].env, 32, 77) as env:
        return float(evaluate(policy.agent, policy.state, env, jr.key(0), 32).mean())


def table(out: Path) -> None:
    """Rows of every evaluation, and one line for each task and method."""
    rows, panels = [], {}
    for task, settings in TASKS.items():
        runs = cells(out, task)
        ppo = np.mean([c[:, 2].max() for c in runs["ppo"].values()])
        best = expert(out, task)
        reference = max(float(ppo), best)
        panels[task] = (runs, reference, {})
        print(f"\n{settings.env}: PPO {ppo:.1f} in {3 * settings.steps:,} steps, expert {best:.1f}")
        for name, by_seed in runs.items():
            way, reached, before, after, seconds = [], [], [], [], []
            for seed, points in by_seed.items():
                cell = {"task": task, "method": name, "seed": seed}
                rows += [
                    cell | {"step": int(s), "seconds": round(t, 1), "return_mean": round(r, 2)} for s, t, r in points
                ]
                points = points[points[:, 0] <= 1.05 * settings.steps]
                start = METHODS[name][0]
                base = curve(out / task / start / f"seed{seed}")[-1, 2] if start else 0.0
                share = (points[:, 2] - base) / (reference - base)
                before.append(base)
                after.append(points[-3:, 2].mean())
                way.append(share[-3:].mean())
                seconds.append(points[-1, 1])
                first = [np.argmax(share >= x) if (share >= x).any() else None for x in LEVELS]
                reached.append([[np.inf] * 2 if i is None else points[i, :2] for i in first])
            if not by_seed:
                print(f"{NAMES[name]:20s} not run")
                continue
            panels[task][2][name] = np.mean(before)
            times = " / ".join(
                f"{step / 1e3:.0f}k, {after_s:.0f} s" if np.isfinite(step) else "-"
                for step, after_s in np.median(reached, axis=0)
            )
            print(
                f"{NAMES[name]:20s} n {len(way)}  {np.mean(before):7.1f} -> {np.mean(after):7.1f} "
                f"({', '.join(f'{x:.0f}' for x in after)})  way {np.mean(way):.2f} ({min(way):.2f} to {max(way):.2f})  "
                f"steps {times}  {np.mean(seconds):.0f} s"
            )
    write(RESULTS / "finetune.csv", rows)
    tried = [
        {"method": folder.parent.name, "trial": folder.name, "step": int(s), "return_mean": round(r, 2)}
        for folder in sorted(out.glob("*/trials/*/*"))
        for s, _, r in curve(folder)
    ]
    write(RESULTS / "finetune_trials.csv", tried)
    _curves(panels)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _curves(panels: dict[str, Any]) -> None:
    """Mean and range over seeds against environment steps."""
    figure = _figure(9.6, 3.3)
    for place, (task, (runs, reference, before)) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), place)
        limit = TASKS[task].steps
        grid = np.linspace(0, limit, 41)
        for name, by_seed in runs.items():
            if not by_seed:
                continue
            lines = []
            for points in by_seed.values():
                first = before[name] if METHODS[name][0] else np.nan
                lines.append(np.interp(grid, np.r_[0, points[:, 0]], np.r_[first, points[:, 2]]))
            axes.plot(grid, np.mean(lines, 0), label=NAMES[name], lw=1.5)
            axes.fill_between(grid, np.min(lines, 0), np.max(lines, 0), alpha=0.15, lw=0)
        axes.axhline(reference, color="0.4", lw=0.8, ls="--")
        axes.set_title(TASKS[task].env.removeprefix("envpool:"), fontsize=10)
        axes.set_xlabel("environment steps")
        axes.ticklabel_format(axis="x", style="sci", scilimits=(3, 3))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("evaluation return")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(PICTURES / "finetune.png", dpi=150)


def finals(out: Path, task: str, episodes: int = 64) -> None:
    """The policies at the end of all runs, and PPO's best, on the same fresh episodes; and the way by these numbers."""
    rows, means = [], {}
    like = load(out / task / "ppo" / "seed0"), load(out / task / "flow" / "seed0")
    single, chunked = (environment(policy, TASKS[task].env, 32, 888) for policy in like)
    with single as single_env, chunked as chunked_env:
        for name in ("flow", "diffusion", *NAMES, "best ppo"):
            for seed in range(3):
                folder = out / task / name.removeprefix("best ") / f"seed{seed}"
                if not finished(folder):
                    continue
                policy = load(folder / "best" if name.startswith("best") else folder)
                env = chunked_env if policy.spec.horizon > 1 else single_env
                values = evaluate(policy.agent, policy.state, env, jr.key(seed), episodes)
                error = values.std() / episodes**0.5
                row = {"task": task, "policy": name, "seed": seed, "return_mean": round(float(values.mean()), 2)}
                rows.append(row | {"standard_error": round(float(error), 2)})
                means[name, seed] = float(values.mean())
    write(RESULTS / f"finetune_{task}.csv", rows)
    best = [value for (name, _), value in means.items() if name == "best ppo"]
    reference = max(np.mean(best), expert(out, task))
    print(f"{task}: reference {reference:.1f} (best of PPO {np.mean(best):.1f})")
    for name, title in NAMES.items():
        seeds = [seed for seed in range(3) if (name, seed) in means]
        after = np.array([means[name, seed] for seed in seeds])
        before = np.array([means[METHODS[name][0], seed] if METHODS[name][0] else 0.0 for seed in seeds])
        way = (after - before) / (reference - before)
        if seeds:
            print(
                f"{title:20s} {before.mean():7.1f} -> {after.mean():7.1f} ({', '.join(f'{x:.0f}' for x in after)})  "
                f"way {way.mean():.2f} ({way.min():.2f} to {way.max():.2f})"
            )


def success(out: Path, episodes: int = 32) -> None:
    """Whether a drawer was ever open within an episode, for all methods and seeds."""
    import envpool

    for name in ("flow", "diffusion", *NAMES):
        shares = []
        for seed in range(3):
            folder = out / "drawer" / name / f"seed{seed}"
            if not finished(folder):
                continue
            act = Receding(load(folder), copies=episodes)
            pool = envpool.make_gymnasium("MetaWorld/DrawerOpen-v3", num_envs=episodes, seed=99)
            obs, opened = pool.reset()[0], np.zeros(episodes, bool)
            for _ in range(499):
                obs, *_, info = pool.step(np.clip(act(obs.astype(np.float32)), -1, 1))
                order = np.argsort(info["env_id"])
                obs, opened = obs[order], opened | (info["success"][order] > 0)
            pool.close()
            shares.append(opened.mean())
        print(f"{name:12s} {', '.join(f'{x:.2f}' for x in shares)}")


def fans(out: Path, chunks: int = 200) -> None:
    """Chunks of the policy before and after, at three observations of the imitated policy's episode on Hopper."""
    before, after = load(out / "hopper" / "flow" / "seed0"), load(out / "hopper" / "reinflow-4" / "seed0")
    with environment(before, TASKS["hopper"].env, 1, 5) as env:
        state, obs = env.reset(jr.key(0))
        seen = []
        for _ in range(40):
            seen.append(np.asarray(obs)[0])
            state, step = env.step(state, before(obs))
            obs = step.obs
    names = ("thigh", "leg", "foot")
    figure = _figure(8.0, 5.6)
    for row, number in enumerate((2, 12, 25)):
        batch = np.repeat(seen[number][None], chunks, 0)
        for column, name in enumerate(names):
            axes = figure.add_subplot(3, 3, 3 * row + column + 1)
            for policy, colour in ((before, "C0"), (after, "C1")):
                plan = policy(batch).reshape(chunks, -1, len(names))[..., column]
                axes.plot(range(1, plan.shape[1] + 1), plan.T, color=colour, alpha=0.05, lw=1)
                axes.plot(range(1, plan.shape[1] + 1), plan.mean(0), color=colour, lw=2)
            axes.set_ylim(-1.05, 1.05)
            axes.set_xticks(range(1, plan.shape[1] + 1))
            if row == 0:
                axes.set_title(f"torque of the {name}", fontsize=10)
            if column == 0:
                axes.set_ylabel(f"decision {number}")
            if row == 2:
                axes.set_xlabel("action of the chunk")
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=c, lw=2) for c in ("C0", "C1")]
    figure.legend(
        lines, ["imitated", "fine-tuned (ReinFlow, K = 4)"], loc="outside lower center", ncols=2, frameon=False
    )
    figure.savefig(PICTURES / "fans.png", dpi=100)


def film(out: Path, steps: int = 600, every: int = 10) -> None:
    """Side by side from the same start; an episode that ends keeps its last picture, darker."""
    import imageio.v3 as iio

    from contraflow.envs.envpool import EnvPool

    films = []
    for name in ("flow", "reinflow-4"):
        env = EnvPool("Hopper-v5", 1, 3, render=True, render_size=(160, 160))
        state, obs = env.reset(jr.key(0))
        act, frames, total = Receding(load(out / "hopper" / name / "seed0")), [], 0.0
        for number in range(steps):
            if number % every == 0:
                frames.append(env.frame())
            state, step = env.step(state, act(obs))
            obs, total = step.obs, total + float(step.reward[0])
            if step.terminated[0]:
                break
        env.close()
        print(f"{name}: return {total:.0f} in at most {steps} steps")
        films.append(frames + [frames[-1] // 2] * (-(-steps // every) - len(frames)))
    both = [np.concatenate(pair, axis=1) for pair in zip(*films, strict=True)]
    iio.imwrite(PICTURES / "hopper.gif", both, duration=80, loop=0)


def main(what: Literal["table", "finals", "success", "fans", "film"], /, out: Path) -> None:
    """One table or picture."""
    if what == "finals":
        for task in TASKS:
            finals(out, task)
    else:
        {"table": table, "success": success, "fans": fans, "film": film}[what](out)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
