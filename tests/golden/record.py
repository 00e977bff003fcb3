"""Numbers that a change of structure must not move: `python tests/golden/record.py [NAME ...] > golden.json`.

For every preset: metrics of two updates from a fixed state, and actions before and after. For every kind of run: what a
short one ends with. All inputs come from NumPy, so that only the library decides.
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from contraflow.agents import presets
from contraflow.agents.offline.bc import BC
from contraflow.core.types import Batch, EnvSpec, Rollout
from contraflow.training.run import Run, train
from contraflow.training.sources import Dataset, Replay, Rollouts

OBS, ACTION, B, T, N = 5, 2, 8, 8, 4
SPEC = EnvSpec(OBS, ACTION, N, 10, True)


def rows(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).standard_normal(shape), jnp.float32)


def coins(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).random_sample(shape) < 0.3)


def replayed(seed: int, gamma: float) -> Batch:
    span = jnp.asarray(np.random.RandomState(seed + 6).randint(1, 4, B), jnp.int32)
    action = jnp.tanh(rows(seed + 1, B, ACTION))
    discount = jnp.where(coins(seed + 4, B), 0.0, gamma**span)
    return Batch(rows(seed, B, OBS), action, rows(seed + 2, B), discount, rows(seed + 3, B, OBS), jnp.ones((B, ACTION)))


def rollout(agent: Any, state: Any, seed: int) -> Rollout:
    obs = rows(seed, T, N, OBS)
    keys = jr.split(jr.key(seed), (T, N))
    _, extras = jax.vmap(jax.vmap(agent.policy(state).sample))(obs, keys)
    valid = ~coins(seed + 9, T, N) | (jnp.arange(T) < 4)[:, None]
    ends = coins(seed + 3, T, N), coins(seed + 4, T, N)
    return Rollout(obs, extras, rows(seed + 1, T, N), rows(seed + 2, T, N, OBS), *ends, valid)


def demonstrated(seed: int) -> Batch:
    obs, zero = rows(seed, B, OBS), jnp.zeros(B)
    mask = (~coins(seed + 2, B, ACTION)).astype(jnp.float32)
    return Batch(obs, jnp.tanh(rows(seed + 1, B, ACTION)), zero, zero, obs, mask)


def actions(agent: Any, state: Any, greedy: bool) -> jax.Array:
    policy = agent.policy(state)
    return jax.vmap(lambda o, k: policy(o, k, greedy))(rows(50, 4, OBS), jr.split(jr.key(7), 4))


def one(name: str) -> dict[str, Any]:
    preset = presets()[name]
    agent = preset.agent
    state = jax.jit(lambda key: agent.init(key, SPEC))(jr.key(0))
    act = jax.jit(lambda state: {"explore": actions(agent, state, False), "greedy": actions(agent, state, True)})
    out: dict[str, Any] = {"before": act(state)}
    for i in range(2):
        if preset.needs == "replay":
            data = replayed(10 * i, agent.gamma)
        elif preset.needs == "rollout":
            data = jax.jit(lambda state, i=i: rollout(agent, state, 100 + 10 * i))(state)
        else:
            data = demonstrated(200 + 10 * i)
        state, out[f"metrics {i}"] = jax.jit(agent.update)(state, data, jr.key(1000 + i))
    return plain(out | {"after": act(state)})


def plain(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x, np.float64).tolist(), jax.device_get(tree))


def data_file(folder: Path) -> Path:
    """Three episodes of a one-dimensional expert, the last without an end of its own."""
    rng, n = np.random.RandomState(3), 60
    obs = rng.uniform(-0.8, 0.8, (n, 1)).astype(np.float32)
    end = np.arange(n) % 20 == 19
    path = folder / "expert.npz"
    np.savez(
        path, obs=obs, action=obs, reward=obs[:, 0], next_obs=np.roll(obs, -1, 0), terminated=end,
        truncated=np.zeros(n, bool), end=end, low=np.array([-1.0]), high=np.array([1.0]),
    )  # fmt: skip
    return path


def runs(folder: Path) -> dict[str, Any]:
    """Short runs of each kind on a probe."""
    env, small = "probe:obs-action", {"eval_every": 100, "log_every": 50, "eval_episodes": 4, "trackers": ()}
    rfm, sac, ppo = (presets()[name].agent for name in ("rfm", "sac", "ppo"))
    replay = Replay(env, num_envs=2, collect=100, batch_size=16)
    two_steps = Replay("probe:two-step", collect=100, n_step=2, batch_size=16)
    ppo = replace(ppo, ppo=replace(ppo.ppo, minibatches=2))
    data = Dataset(str(data_file(folder)), env, batch_size=16, horizon=2, execute=1)
    return {
        "run rfm": Run(rfm, replay, steps=200, **small),
        "run n-step": Run(sac, two_steps, steps=200, **small),
        "run ppo": Run(ppo, Rollouts(env, num_envs=4, unroll=16), steps=256, **small),
        "run bc": Run(BC(), data, steps=150, **small),
    }


def short_run(run: Any, folder: Path) -> dict[str, Any]:
    train(run, folder, quiet=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timing = ("seconds",)
    metrics = {k: v for k, v in lines[-1].items() if k not in timing and not k.startswith("diagnostics/action_share")}
    header, *evals = (folder / "eval.csv").read_text().splitlines()
    column = header.split(",").index("return_mean")
    return {"metrics": metrics, "returns": [float(row.split(",")[column]) for row in evals]}


def main(names: list[str]) -> None:
    out: dict[str, Any] = {}
    for name in presets():
        if not names or name in names:
            print(name, file=sys.stderr, flush=True)
            out[name] = one(name)
    with tempfile.TemporaryDirectory() as folder:
        for name, run in runs(Path(folder)).items():
            if not names or name in names:
                print(name, file=sys.stderr, flush=True)
                out[name] = short_run(run, Path(folder) / name.replace(" ", "-"))
    json.dump(out, sys.stdout, indent=1)


if __name__ == "__main__":
    main(sys.argv[1:])
