"""Two tasks from 64 x 64 images and from their state: cloning, and ReinFlow from the clone.

    python benchmarks/pixels.py train       # runs/pixels: an expert of states, what it does as seen by both, two stages
    python benchmarks/pixels.py evaluate    # docs/data/pixels.csv
    python benchmarks/pixels.py cost --tasks pendulum --names pixels    # a row of docs/data/pixels_cost.csv

The expert is `sac` on the state. Its episodes are recorded twice, from the same seed: what it sees, and what the camera
sees. All networks have two layers of 64; the image encoder is `SEES`.
"""

import resource
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import tyro
from common import DATA, Row, machine, write

from contraflow.agents.offline.bc import BC
from contraflow.agents.online.sac import SAC
from contraflow.agents.onpolicy.reinflow import ReinFlow
from contraflow.core.optim import Optim
from contraflow.core.types import Rollout
from contraflow.data.augment import augmented
from contraflow.data.datasets.readers import load as load_data
from contraflow.data.datasets.write import write as write_data
from contraflow.data.replay import Buffer
from contraflow.data.rows import Rows
from contraflow.data.samplers import Chunk
from contraflow.envs import make
from contraflow.flow.model import Ddim, FlowSpec
from contraflow.nets.encoder import Pixels
from contraflow.nets.mlp import MLPSpec
from contraflow.nets.velocity import ResidualMLP
from contraflow.rl.critics import Critics
from contraflow.rl.ppo import PPOSettings
from contraflow.runtime.collect import record
from contraflow.runtime.policy import load
from contraflow.training.evaluate import evaluate as returns_of
from contraflow.training.run import Run, train
from contraflow.training.sources import Dataset, Replay, Rollouts

TASKS = {"pendulum": (15_000, 16, 6_000, 16_384), "multi-goal": (6_000, 64, 2_000, 8_192)}
"""Steps of the expert's training, demonstrations, updates of the clone on 64 rows, steps of ReinFlow."""
SEES = Pixels((16, 32), (4, 2), kernel=4)
CLONES = {"states": ("states", 0), "pixels": ("pixels", 0), "pixels-shifted": ("pixels", 4)}
"""Name -> what the policy sees, and the most pixels of a random shift."""
FLOW = FlowSpec(solver=Ddim(4), network=ResidualMLP(64, 2, 32), pixels=SEES)
CLONE = BC(FLOW, optim=Optim(1e-3, max_grad_norm=10.0), ema=0.99)
TUNE = ReinFlow(
    std=(0.1, 0.3),
    clip=0.05,
    ppo=PPOSettings(
        gamma=0.97, epochs=4, warmup=2, target_kl=1.0, critic=MLPSpec(64, 2, "silu", pixels=SEES),
        actor_optim=Optim(3e-4, max_grad_norm=10.0), critic_optim=Optim(1e-3, max_grad_norm=10.0),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    command: tyro.conf.Positional[str]
    names: tuple[str, ...] = tuple(CLONES)
    seeds: tuple[int, ...] = (0, 1, 2)
    tasks: tuple[str, ...] = tuple(TASKS)
    runs: Path = Path("runs/pixels")


def env_of(task: str, seen: str) -> str:
    return f"jax:{task}/pixels" if seen == "pixels" else f"jax:{task}"


def learn(run: Run, folder: Path, seed: int) -> None:
    """Trains unless there is such a run; prints the CPU time."""
    if not folder.exists():
        began = time.process_time()
        train(replace(run, seed=seed, eval_every=run.steps, eval_episodes=32, trackers=()), folder, quiet=True)
        print(folder, f"{time.process_time() - began:.0f} s of CPU", flush=True)


def demonstrations(task: str, folder: Path) -> None:
    """What the expert does, in two files."""
    steps, episodes, _, _ = TASKS[task]
    actor, critics = MLPSpec(64, 2), Critics(width=64)
    learn(Run(SAC(actor=actor, critic=critics), Replay(env_of(task, "states")), steps), folder / "expert", 0)
    for name in ("states", "pixels"):
        file = folder / f"{name}.npz"
        if not file.exists():
            camera = env_of(task, name) if name == "pixels" else None
            data = record(load(folder / "expert"), episodes, camera=camera)
            print(write_data(data, file), f"{len(data)} rows, returns {data.returns.mean():.1f}", flush=True)


def run(options: Options) -> None:
    """Every policy that has no folder yet."""
    for task in options.tasks:
        folder, (_, _, updates, steps) = options.runs / task, TASKS[task]
        demonstrations(task, folder)
        for seed in options.seeds:
            for name in options.names:
                (seen, shift), clone = CLONES[name], folder / f"{name}-bc" / f"seed{seed}"
                data = Dataset(str(folder / f"{seen}.npz"), batch_size=64, random_shift=shift)
                learn(Run(CLONE, data, updates), clone, seed)
                start = Run(TUNE, Rollouts(env_of(task, seen), 16, 64), steps, str(clone))
                learn(start, folder / f"{name}-reinflow" / f"seed{seed}", seed)


def evaluate(options: Options) -> None:
    """A row for each policy, on the same 200 episodes."""
    rows: list[Row] = []
    for task in options.tasks:
        for method in ("bc", "reinflow"):
            for name in options.names:
                for seed in options.seeds:
                    folder = options.runs / task / f"{name}-{method}" / f"seed{seed}"
                    if folder.exists():
                        env = make(env_of(task, CLONES[name][0]), 50)
                        found = returns_of(load(folder).network, env, jr.key(99), 200)
                        what = {"task": task, "observation": name, "method": method, "seed": seed}
                        rows.append(what | {"return": float(found.mean())})
                        print(rows[-1], flush=True)
    write(DATA / "pixels.csv", rows)


def seconds(call: Any, *args: Any, least: float = 3.0) -> float:
    """CPU time of a call, from as many as take `least` seconds: the cores are shared."""
    jax.block_until_ready(call(*args))
    began, n = time.process_time(), 0
    while time.process_time() < began + least:
        jax.block_until_ready(call(*args))
        n += 1
    return (time.process_time() - began) / n


def cost(options: Options) -> None:
    """A row for one name, in a process of its own, because memory is that of the whole process."""
    (name,), (task,) = options.names, options.tasks
    seen, shift = CLONES[name]
    env = make(env_of(task, seen), 16)
    state, obs = jax.jit(env.reset)(jr.key(0))

    @jax.jit
    def play(state):
        def step(state, _):
            state, after = env.step(state, jnp.zeros((16, 1)))
            return state, (after.reward, after.obs[:, 0], after.next_obs[:, 0])

        return jax.lax.scan(step, state, None, 100)

    steps = 1600 / seconds(play, state)
    rows = Rows.of(load_data(options.runs / task / f"{seen}.npz"), successor=False)
    clone, draw = CLONE.init(jr.key(0), env.spec), augmented(Chunk(1, 1.0), shift)
    update = jax.jit(lambda rows, clone, key: CLONE.update(clone, draw(rows, key, 64), jr.fold_in(key, 1)))
    cloning = seconds(update, rows, clone, jr.key(1))

    @jax.jit
    def iteration(learner, state, obs, key):
        policy: Any = TUNE.policy(learner)

        def step(carry, key):
            state, obs = carry
            action, extras = jax.vmap(policy.sample)(obs, jr.split(key, 16))
            state, after = env.step(state, action)
            return (state, after.obs), (obs, extras, after)

        _, (seen, extras, after) = jax.lax.scan(step, (state, obs), jr.split(key, 64))
        ends = after.terminated, after.truncated, after.valid
        return TUNE.update(learner, Rollout(seen, extras, after.reward, after.next_obs, *ends), jr.fold_in(key, 1))

    tuning = seconds(iteration, TUNE.init(jr.key(2), env.spec), state, obs, jr.key(3)) / 1024
    replay = jax.eval_shape(lambda: Buffer.empty(1, env.spec)).rows
    leaves = jax.tree.leaves((replay.obs, replay.next_obs))
    row = {
        "task": task,
        "observation": name,
        "steps_per_s": steps,
        "clone_update_ms": 1e3 * cloning,
        "reinflow_ms_per_step": 1e3 * tuning,
        "replay_bytes_per_row": sum(x.size * x.dtype.itemsize for x in leaves),
        "in_float32": sum(4 * x.size for x in leaves),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(row)
    write(DATA / "pixels_cost.csv", [row], mode="a")


if __name__ == "__main__":
    options = tyro.cli(Options)
    print(machine())
    {"train": run, "evaluate": evaluate, "cost": cost}[options.command](options)
