"""Fine-tuning on a sparse reward: what lets the second and third seed learn (docs/background/finetuning-results.md).

    python benchmarks/sparse.py imitate --out DIR                     # demonstrations and a flow for every seed
    python benchmarks/sparse.py tune --out DIR --settings whole-loud  # DIR/SETTING-SEEDS.json; all settings by default
    python benchmarks/sparse.py table --out DIR                       # docs/data/sparse.csv and sparse_curves.csv

All seeds of a setting learn in one program. A setting is an agent, the number of environments and of decisions between
two updates; every run takes 400 000 environment steps. Returns are means over 64 fresh episodes of the last policy.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from common import DATA, write
from finetune import BC, FLOW, METHODS, TASKS, data, passes, run

from contraflow import load
from contraflow.agents import presets
from contraflow.envs import make
from contraflow.envs.chunk import Chunked
from contraflow.training.evaluate import evaluate_seeds
from contraflow.training.loop import Carry, Learner, World
from contraflow.training.run import Run
from contraflow.training.sources import Dataset
from contraflow.training.sources.rollouts import Unroll

ENV, STEPS, CHUNK = "jax:cartpole-swingup-sparse", 400_000, 4
TASK = replace(TASKS["sparse"], half=220_000)  # demonstrations that earn 42
ONE = METHODS["reinflow-1"][1]
SDE, PLUS = (presets()[name].agent for name in ("flow-sde", "fpo++"))
LOUD = (0.1, 0.5)


def ppo(agent: Any, **settings: Any) -> Any:
    return replace(agent, ppo=replace(agent.ppo, **settings))


# Agent, environments, decisions of each between two updates. An episode has 250 decisions.
SETTINGS: dict[str, tuple[Any, int, int]] = {
    "half": (ONE, 16, 125),
    "half-both": (replace(ONE, clip=0.06, std=LOUD), 16, 125),
    "sixteen": (ppo(ONE, minibatches=32), 16, 250),
    "sixteen-warm": (ppo(ONE, minibatches=32, warmup=2), 16, 250),
    "whole": (ONE, 8, 250),
    "whole-clip": (replace(ONE, clip=0.06), 8, 250),
    "whole-loud": (replace(ONE, std=LOUD), 8, 250),
    "whole-both": (replace(ONE, clip=0.06, std=LOUD), 8, 250),
    "whole-sde": (passes(SDE, 10, 2e-4), 8, 250),
    "whole-fpo++": (passes(PLUS, 4, 5e-5, pairs=8, trust="clip", zero_start=False), 8, 250),
}


def imitate(out: Path, seeds: tuple[int, ...]) -> None:
    """PPO stopped early on the dense task, 40 episodes on the sparse one, and a flow that imitates them."""
    data(TASK, out)
    source = Dataset(str(out / "data.npz"), TASK.env, horizon=CHUNK, execute=CHUNK)
    agent = replace(BC, flow=FLOW, optim=replace(BC.optim, lr=1e-3, decay_steps=TASK.imitation))
    for seed in seeds:
        often: dict[str, Any] = {"eval_every": TASK.imitation, "eval_episodes": 16, "trackers": ()}
        run(Run(agent, source, TASK.imitation, seed=seed, **often), out / "flow" / f"seed{seed}")


def tune(out: Path, name: str, seeds: tuple[int, ...]) -> None:
    """One setting, unless it is there already."""
    file, start = out / f"{name}-{'_'.join(map(str, seeds))}.json", time.process_time()
    if file.exists():
        return
    agent, envs, unroll = SETTINGS[name]
    env, test = (Chunked(make(ENV, n), CHUNK, CHUNK) for n in (envs, 32))
    policies = [load(out / "flow" / f"seed{seed}").network for seed in seeds]
    agent, keys = agent.starting_from(policies[0]), lambda base: jnp.stack([jr.key(base + seed) for seed in seeds])
    fresh = jax.jit(jax.vmap(lambda key: agent.init(key, env.spec)))(keys(0))
    each = [agent.adopt(jax.tree.map(lambda x, i=i: x[i], fresh), policy) for i, policy in enumerate(policies)]
    learner = Learner(
        jax.tree.map(lambda *x: jnp.stack(x), *each),
        None,
        jnp.zeros((len(seeds), envs)),
        jnp.zeros(len(seeds), int),
        jnp.zeros(len(seeds), int),
    )
    carry = Carry(learner, *jax.jit(jax.vmap(env.reset))(keys(1000)))
    stage, world, rollouts = Unroll(unroll), World(env.spec, env), round(STEPS / envs / unroll / CHUNK)
    iterate = jax.jit(jax.vmap(lambda carry, key: stage.iterate(agent, world, carry, key)))

    def judge(base: int) -> np.ndarray:
        """Mean returns [S] over 32 episodes of the present policies."""
        states = [jax.tree.map(lambda x, i=i: x[i], carry.learner.agent) for i in range(len(seeds))]
        return evaluate_seeds([agent.policy(state) for state in states], test, keys(base), 32).returns.mean(1)

    before, rows = judge(777), []
    for _ in range(rollouts):
        carry, metrics = iterate(carry, keys(2000))
        rows.append({name: np.asarray(x).round(5).tolist() for name, x in metrics.items()})
    after = (judge(777 + 10 * rollouts) + judge(807)) / 2
    found = {"name": name, "seeds": seeds, "envs": envs, "unroll": unroll, "before": before.tolist()}
    found |= {"after": after.tolist(), "rows": rows, "cpu": time.process_time() - start}
    file.write_text(json.dumps(found))
    print(f"{name} {seeds}: {before.round(1)} -> {after.round(1)}", flush=True)


def table(out: Path) -> None:
    """What every run began and ended with, and what it saw at every rollout."""
    ends, curves = [], []
    for name in SETTINGS:
        for file in sorted(out.glob(f"{name}-[0-9]*.json")):
            found = json.loads(file.read_text())
            for i, seed in enumerate(found["seeds"]):
                who = {"setting": name, "seed": seed}
                pair = {key: round(found[key][i], 1) for key in ("before", "after")}
                ends.append(who | {"envs": found["envs"], "unroll": found["unroll"]} | pair)
                for k, row in enumerate(found["rows"]):
                    ended = row["episodes"][i]
                    seen = {"return": round(row["episode_return_sum"][i] / ended, 1) if ended else ""}
                    seen |= {key: round(row[key][i], 3) for key in ("explained_variance", "clip_share")}
                    curves.append(who | {"rollout": k + 1} | seen)
            print(name, found["seeds"], np.round(found["before"]), "->", np.round(found["after"]))
    write(DATA / "sparse.csv", ends)
    write(DATA / "sparse_curves.csv", curves)


def main(
    what: Literal["imitate", "tune", "table"],
    /,
    out: Path,
    seeds: tuple[int, ...] = (0, 1, 2),
    settings: tuple[str, ...] = (),
) -> None:
    """One stage."""
    out.mkdir(parents=True, exist_ok=True)
    if what == "imitate":
        imitate(out, seeds)
    elif what == "tune":
        for name in settings or SETTINGS:
            tune(out, name, seeds)
    else:
        table(out)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
