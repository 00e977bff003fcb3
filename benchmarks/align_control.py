"""A cloned policy aligned with a critic: what the critic says of it, and what it returns.

    python benchmarks/align_control.py data        # a policy of `sac`, and 8000 steps of it with noise
    python benchmarks/align_control.py train       # docs/data/align_control.csv: ifql, then methods from its flow
    python benchmarks/align_control.py table       # means over seeds

Data, flow and critic are those of `ifql` on `jax:pendulum`, for each seed its own; networks have two layers of 64. A
method gets 25 600 rewards. `flow` is the cloned flow alone, `best of 32` what ifql acts by. Rewards are advantages in
units of their deviation in a state.
"""

from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import jax.random as jr
import numpy as np
import tyro
from common import DATA, Row, machine, read, write

from contraflow.cli import main as contraflow
from contraflow.experiments.bridge import with_networks
from contraflow.policy.artifact import load_policy
from contraflow.policy.base import ablations
from contraflow.policy.best_of import ONE
from contraflow.presets import preset_run
from contraflow.training import gallery
from contraflow.training.evaluate import evaluate_one
from contraflow.training.run import Run, train
from contraflow.training.sources import Conditions, Dataset

ENV, SEEDS, EPISODES, REWARDS = "jax:pendulum", 3, 100, 25_600
SIZE: dict[str, Any] = {"width": 64, "depth": 2}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "rfm-align, 2": ("rfm-align", {"temperature": 2.0}),
    "rfm-align, 1": ("rfm-align", {"temperature": 1.0}),
    "rfm-align, .5": ("rfm-align", {"temperature": 0.5}),
    "adjoint-matching, 1": ("adjoint-matching", {"temperature": 1.0}),
    "nft": ("nft", {}),
}


@dataclass(frozen=True)
class Options:
    command: tyro.conf.Positional[str]
    methods: tuple[str, ...] = tuple(METHODS)
    runs: Path = Path("runs/align-control")
    out: Path = DATA / "align_control.csv"


def data(options: Options) -> None:
    """Trains `sac` for 12 000 steps and records 40 episodes of it, with noise of .6 and a fifth of random actions."""
    sac, small = str(options.runs / "sac"), ["--agent.critic.width", "64", "--agent.critic.depth", "2"]
    contraflow(["train", "sac", "--env", ENV, "--steps", "12000", "--trackers", "--out", sac, *small])
    noise = ["--episodes", "40", "--noise", "0.6", "--random", "0.2"]
    contraflow(["record", sac, *noise, "--out", str(options.runs / "data.npz")])


def ifql(options: Options, seed: int) -> Path:
    """The folder of the run with this seed, trained for 6000 gradient steps unless it is there."""
    folder, run = options.runs / f"ifql{seed}", preset_run("ifql")
    if not folder.exists():
        agent: Any = with_networks(run.agent, SIZE)
        agent = replace(agent, critic=replace(agent.critic, **SIZE), value=replace(agent.value, **SIZE))
        source = Dataset(str(options.runs / "data.npz"), ENV)
        train(Run(agent, source, steps=6000, eval_every=6000, seed=seed, trackers=()), folder, quiet=True)
    return folder


def judged(run: Run, policies: dict[str, Any]) -> list[Row]:
    """Mean reward of 2000 actions, and mean return of 100 episodes, of each policy."""
    k_cond, k_draw, k_play = jr.split(jr.key(run.seed), 3)
    with closing(run.source.open(run, "")) as opened:
        env, played = opened.world.env, cast(Any, opened.evaluation)
        cond = env.conditions(k_cond, 2000)
        return [
            {
                "method": name, "seed": run.seed,
                "reward": float(env.each_of(gallery.samples(policy, cond, k_draw), cond).mean()),
                "return": float(evaluate_one(policy, played, k_play, EPISODES).returns.mean()),
            }
            for name, policy in policies.items()
        ]  # fmt: skip


def run(options: Options) -> None:
    for seed in range(SEEDS):
        model = ifql(options, seed)
        source = Conditions(ENV, (f"critic:{model}",), prompts=32, data=str(options.runs / "data.npz"))
        for name in options.methods:
            folder, (preset, settings) = options.runs / f"{name.replace(', ', '-')}-{seed}", METHODS[name]
            agent = replace(cast(Any, preset_run(preset).agent), **settings)
            one = Run(agent, source, REWARDS, str(model), REWARDS, EPISODES, REWARDS, seed, ())
            if not folder.exists():
                train(one, folder, quiet=True)
            policies = {name: load_policy(folder / "policy")[0]}
            if name == options.methods[0]:
                chosen = load_policy(model / "policy")[0]
                policies |= {"flow": ablations(chosen)[ONE], "best of 32": chosen}
            write(options.out, judged(one, policies), mode="a")


def table(options: Options) -> None:
    """Means over seeds and half of a 95 % interval."""
    rows = read(options.out)
    for name in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for column in ("reward", "return"):
            values = np.array([row[column] for row in rows if row["method"] == name], float)
            half = 4.303 * values.std(ddof=1) / len(values) ** 0.5  # Student's t of three seeds
            cells.append(f"{values.mean():9.2f} ± {half:6.2f}")
        print(f"{name:22}" + "".join(f"{cell:>22}" for cell in cells))


def main() -> None:
    options = tyro.cli(Options)
    print(machine())
    {"data": data, "train": run, "table": table}[options.command](options)


if __name__ == "__main__":
    main()
