"""E4 of docs/study.md: agents learn, without acting, from the replay that another agent collected.

    python benchmarks/passive.py RUN [RUN ...] [--students rfm rfm-paper]  # adds to benchmarks/results/passive.csv

For each finished run of a matrix and each student (an agent of one of the matrices): as many updates as the run made,
at its settings, on all that its replay holds, from fresh networks; then the evaluation of the matrix. If the ranking
follows the estimator, students differ on the same replay; if it follows the data, they differ between replays.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import tyro
from study import MATRICES
from tables import append

from contraflow.core.types import EnvSpec
from contraflow.envs import make
from contraflow.experiments.compare.matrix import NETWORK, with_networks
from contraflow.experiments.compare.worker import SEED
from contraflow.runtime.policy import Policy
from contraflow.runtime.variants import variants
from contraflow.training.checkpoint import latest
from contraflow.training.evaluate import evaluate
from contraflow.training.run import first_carry, read_config

CHUNK = 500
# By name; of a name in several matrices the last, "test", so that `rfm` is the candidate.
AGENTS = {name: agent for part in MATRICES.values() for name, agent in part.agents.items()}


@partial(jax.jit, static_argnames=("run", "agent"), donate_argnames=("state",))
def study(run: Any, agent: Any, state: Any, buffer: Any, key: jax.Array) -> Any:
    """CHUNK updates on batches of the replay."""
    teacher: Any = run.agent

    def update(state, key):
        k_sample, k_update = jr.split(key)
        batch = buffer.sample(k_sample, run.batch_size, run.n_step, teacher.critic.gamma)
        return agent.update(state, batch, k_update)[0], None

    return jax.lax.scan(update, state, jr.split(key, CHUNK))[0]


def replayed(folder: Path) -> tuple[Any, Any, Any]:
    """The run, its environment, and what it had learned and replayed at its last checkpoint."""
    run: Any = read_config(folder)
    env = make(run.env, run.num_envs, run.seed)
    return run, env, first_carry(run, folder, env, jr.key(run.seed), latest(folder)).learner


def fitted(name: str, teacher: Any) -> Any:
    """The agent of that name with the networks of another."""
    return with_networks(AGENTS[name], {field: getattr(teacher, field) for field in NETWORK if hasattr(teacher, field)})


def judged(policy: Policy, key: jax.Array, episodes: int) -> list[dict[str, Any]]:
    """The mean return by each rule of acting, from the same starts for all policies."""
    judge = make(policy.env, episodes, SEED)
    returns = {
        rule: evaluate(agent, state, judge, jr.clone(key), episodes)
        for rule, (agent, state) in variants(policy).items()
    }
    return [{"rule": rule, "return": round(float(values.mean()), 1)} for rule, values in returns.items()]


def beside(name: str, teacher: Any, critic: Any, spec: EnvSpec, key: jax.Array, **changes: Any) -> tuple[Any, Any]:
    """The agent `name` and its first state, with a critic that stands still."""
    agent = replace(fitted(name, teacher), critic=replace(teacher.critic, lr=1e-30), **changes)
    state = jax.jit(lambda key: agent.init(key, spec))(key)
    return agent, eqx.tree_at(lambda s: (s.critic, s.target), state, jax.tree.map(jnp.copy, (critic, critic)))


def learn(folder: Path, name: str, episodes: int) -> list[dict[str, Any]]:
    """One row per rule of acting of the student `name`."""
    run, env, learner = replayed(folder)
    k_init, k_learn, k_eval = jr.split(jr.key(run.seed), 3)
    agent = fitted(name, run.agent)
    state = jax.jit(lambda key: agent.init(key, env.spec))(k_init)
    updates = (run.steps - run.collect) // run.num_envs * run.updates
    for i in range(updates // CHUNK):
        state = study(run, agent, state, learner.buffer, jr.fold_in(k_learn, i))
    about = {"env": run.env, "replay": folder.parts[-3], "student": name, "seed": run.seed}
    returns = judged(Policy(agent, env.spec, run.env, state), k_eval, episodes)
    return [about | row | {"updates": updates // CHUNK * CHUNK} for row in returns]


def main(
    runs: tyro.conf.Positional[tuple[Path, ...]], /, students: tuple[str, ...] = ("rfm", "rfm-paper"), episodes: int = 8
) -> None:
    """Print and write the rows."""
    out = Path(__file__).parent / "results" / "passive.csv"
    for folder in runs:
        for name in students:
            rows = learn(folder, name, episodes)
            append(out, rows)
            print(rows, flush=True)


if __name__ == "__main__":
    tyro.cli(main)
