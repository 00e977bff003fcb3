"""Improve a weak cloned policy beside its frozen weights, or by changing them: the table of docs/methods/residual.md.

    python benchmarks/steer.py --out DIR      # the same again continues

A half-trained SAC acts with noise on the cart-pole, `bc` clones it in chunks of four, and every method begins with that
clone and takes the same steps. Returns are of the last policy, on 64 fresh episodes; docs/data/steer.csv.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.random as jr
import tyro
from common import DATA, write

from contraflow import load
from contraflow.agents import presets
from contraflow.core.optim import Optim
from contraflow.data.datasets.write import write as write_data
from contraflow.flow.model import Ddim, FlowSpec
from contraflow.nets.mlp import MLPSpec
from contraflow.nets.velocity import ResidualMLP
from contraflow.runtime.collect import Behaviour, record
from contraflow.runtime.variants import environment
from contraflow.training.evaluate import evaluate
from contraflow.training.run import Run, train, train_seeds
from contraflow.training.sources import Dataset, Replay, Rollouts

ENV, STEPS = "jax:cartpole-swingup", 16_000
SMALL = {"actor": MLPSpec(64, 2), "optim": Optim(1e-3)}


def agent(name: str) -> Any:
    """The agent of a preset with critics of width 64 and gamma .995 for a decision of four steps."""
    found = presets()[name].agent
    return replace(found, critic=replace(found.critic, width=64, gamma=0.995, optim=Optim(1e-3)), **SMALL)


def passes(name: str) -> Any:
    """An on-policy agent with a critic of width 64 and 4 minibatches."""
    found = presets()[name].agent
    ppo = replace(found.ppo, minibatches=4, critic=MLPSpec(64, 2), actor_optim=replace(found.ppo.actor_optim, lr=3e-4))
    return replace(found, ppo=ppo)


REPLAY = Replay(ENV, 4, collect=1_600, updates=4, batch_size=128, buffer_size=20_000, warm_up="policy")
METHODS: dict[str, tuple[Any, Any]] = {
    "dsrl-sac": (agent("dsrl-sac"), replace(REPLAY, warm_up="random")),
    "dsrl": (agent("dsrl"), REPLAY),
    "residual": (agent("residual"), REPLAY),
    "reinflow": (passes("reinflow"), Rollouts(ENV, 4, 50, 4, 4)),
}


def clone(out: Path) -> Path:
    """The weak policy that all begin with."""
    if not (out / "demo").exists():
        sac = replace(presets()["sac"].agent, critic=replace(presets()["sac"].agent.critic, width=64))
        source = Replay(ENV, 4, updates=2)
        run = Run(replace(sac, actor=MLPSpec(64, 2)), source, 40_000, eval_every=4_000, seed=100, trackers=())
        train(run, out / "demo", quiet=True)
        noisy = Behaviour(noise=1.0)
        write_data(record(load(out / "demo" / "best"), 20, behaviour=noisy, seed=1), out / "data.npz")
    if not (out / "clone").exists():
        flow = FlowSpec(solver=Ddim(5), network=ResidualMLP(64, 2))
        bc = presets()["bc"].agent
        bc = replace(bc, flow=flow, optim=replace(bc.optim, lr=1e-3))
        source = Dataset(str(out / "data.npz"), ENV, horizon=4, execute=4)
        train(Run(bc, source, 4_000, eval_every=2_000, trackers=()), out / "clone", quiet=True)
    return out / "clone"


def main(out: Path, seeds: tuple[int, ...] = (0, 1, 2), methods: tuple[str, ...] = (), steps: int = STEPS) -> None:
    """Train all, then print and write the table."""
    start, rows = clone(out), []

    def judge(name: str, folder: Path, seed: int) -> None:
        policy = load(folder)
        with environment(policy, ENV, 32, 888) as env:
            found = evaluate(policy.network, env, jr.key(seed), 64)
        rows.append(
            {"policy": name, "seed": seed, "return_mean": float(found.mean()), "return_std": float(found.std())}
        )

    judge("demonstrator", out / "demo" / "best", 0)
    judge("clone", start, 0)
    for name in methods or METHODS:
        learner, source = METHODS[name]
        base = {"source": replace(source, base=str(start))} if name == "dsrl-sac" else {"pretrained": str(start)}
        run = Run(learner, source, steps, eval_every=steps // 2, eval_episodes=4, log_every=steps // 4, trackers=())
        folder, began = out / name, time.process_time()
        if not folder.exists():
            train_seeds(replace(run, **base), seeds, folder, quiet=True)
            print(f"{name}: {time.process_time() - began:.0f} s of processor time", flush=True)
        for seed in seeds:
            judge(name, folder / f"seed{seed}", seed)
        print(name, *(f"{row['return_mean']:.0f}" for row in rows if row["policy"] == name), flush=True)
    write((DATA if steps == STEPS and not methods else out) / "steer.csv", rows)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
