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

from contraflow.agents import BC
from contraflow.core.types import Chunks, EnvSpec, Rollout, Transition
from contraflow.presets import PRESETS
from contraflow.train.offline import OfflineRun
from contraflow.train.onpolicy import OnPolicyRun
from contraflow.train.run import Run, train

OBS, ACTION, B, T, N = 5, 2, 8, 8, 4
SPEC = EnvSpec(OBS, ACTION, N, 10, True)


def rows(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).standard_normal(shape), jnp.float32)


def coins(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).random_sample(shape) < 0.3)


def off_policy_batch(seed: int, agent: Any) -> Any:
    span = jnp.asarray(np.random.RandomState(seed + 6).randint(1, 4, B), jnp.int32)
    action = jnp.tanh(rows(seed + 1, B, ACTION))
    return Transition(
        rows(seed, B, OBS),
        action,
        rows(seed + 2, B),
        rows(seed + 3, B, OBS),
        coins(seed + 4, B),
        coins(seed + 5, B),
        span,
    )


def rollout(agent: Any, state: Any, seed: int) -> Any:
    obs = rows(seed, T, N, OBS)
    keys = jr.split(jr.key(seed), (T, N))
    _, extras = jax.vmap(jax.vmap(lambda o, k: agent.sample(state, o, k)))(obs, keys)
    valid = ~coins(seed + 9, T, N) | (jnp.arange(T) < 4)[:, None]
    return Rollout(
        obs,
        extras,
        rows(seed + 1, T, N),
        rows(seed + 2, T, N, OBS),
        coins(seed + 3, T, N),
        coins(seed + 4, T, N),
        valid,
    )


def chunks(seed: int) -> Any:
    return Chunks(
        rows(seed, B, OBS), jnp.tanh(rows(seed + 1, B, ACTION)), (~coins(seed + 2, B, ACTION)).astype(jnp.float32)
    )


def actions(agent: Any, state: Any, explore: bool) -> jax.Array:
    obs, keys = rows(50, 4, OBS), jr.split(jr.key(7), 4)
    return jax.vmap(lambda o, k: agent.act(state, o, k, explore))(obs, keys)


def one(name: str) -> dict[str, Any]:
    run = PRESETS[name]
    agent: Any = run.agent
    state = jax.jit(lambda key: agent.init(key, SPEC))(jr.key(0))
    act = jax.jit(lambda state: {"explore": actions(agent, state, True), "greedy": actions(agent, state, False)})
    out: dict[str, Any] = {"before": act(state)}
    for i in range(2):
        if isinstance(run, Run):
            data = off_policy_batch(10 * i, agent)
        elif isinstance(run, OnPolicyRun):
            data = jax.jit(lambda state, i=i: rollout(agent, state, 100 + 10 * i))(state)
        else:
            data = chunks(200 + 10 * i)
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
        path, obs=obs, action=obs, reward=obs[:, 0], next_obs=np.roll(obs, -1, 0), terminated=end, truncated=~end & False,
        end=end, low=np.array([-1.0]), high=np.array([1.0]),
    )  # fmt: skip
    return path


def runs(folder: Path) -> dict[str, Any]:
    """Short runs of each kind on a probe."""
    env, small = "probe:obs-action", {"eval_every": 100, "log_every": 50, "eval_episodes": 4, "trackers": ()}
    return {
        "run rfm": Run(env=env, agent=PRESETS["rfm"].agent, steps=200, collect=100, num_envs=2, batch_size=16, **small),
        "run n-step": Run(
            env="probe:two-step", agent=PRESETS["sac"].agent, steps=200, collect=100, n_step=2, batch_size=16, **small
        ),
        "run ppo": OnPolicyRun(
            env=env, agent=replace(PRESETS["ppo"].agent, minibatches=2), steps=256, num_envs=4, unroll=16, **small
        ),
        "run bc": OfflineRun(
            data=str(data_file(folder)), env=env, agent=BC(), steps=150, batch_size=16, horizon=2, execute=1, **small
        ),
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
    for name in PRESETS:
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
