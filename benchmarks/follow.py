"""How far and how fast an actor follows a critic that stands still, without anything else in the way.

    python benchmarks/follow.py RUN [--agents rfm rfm-paper] [--updates 1000 2000 4000]   # adds to results/follow.csv

RUN is a finished run of an agent with the study's critics, `sir` say. Each agent, an `RFM` of docs/study.md, starts
afresh and learns from the run's replay while the run's critic stays as it is. On 64 replayed states, means over these,
with 0 the mean Q of uniform actions and 1 the best found by gradient ascent from 32 of them:

    one          mean Q of one particle
    best         Q of the best of 32 particles
    entropy      of a particle, nats per dimension, by a Gaussian: above log 2 = .69 the law has modes on the faces
    saturated    P(|a| > .95)

The rows "uniform actions" and "random corners" have no actor: 32 of these in its place.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import tyro
from passive import CHUNK, beside, replayed, study
from tables import append

from contraflow.agents import RFM
from contraflow.policy.select import First
from contraflow.rl.temperature import gaussian_entropy


@jax.jit
def scale(critic: Any, obs: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean Q of uniform actions and the best that ascent finds, [B] each."""

    def one(obs, key):
        """Both at one state."""
        q = jax.vmap(lambda a: critic.value(obs, a))
        start = jr.uniform(key, (32, critic.members.first.weights[0].shape[1]), minval=-1.0, maxval=1.0)

        def ascend(actions, _):
            slope = jax.vmap(jax.grad(lambda a: critic.value(obs, a)))(actions)
            size = jnp.linalg.norm(slope, axis=-1, keepdims=True)
            return jnp.clip(actions + 0.05 * slope / (size + 1e-6), -1.0, 1.0), None

        end, _ = jax.lax.scan(ascend, start, None, length=100)
        return q(start).mean(), q(end).max()

    return jax.vmap(one)(obs, jr.split(key, obs.shape[0]))


@partial(jax.jit, static_argnames=("agent",))
def look(agent: RFM, state: Any, obs: jax.Array, low: jax.Array, high: jax.Array, key: jax.Array) -> dict[str, Any]:
    """The row of the agent's own particles."""
    actions = agent.flow.action(replace(agent, query=First(32)).endpoints(state, obs, key))
    return worth(state.critic, obs, actions, low, high) | {"temperature": agent.lam(state)}


@jax.jit
def worth(critic: Any, obs: jax.Array, actions: jax.Array, low: jax.Array, high: jax.Array) -> dict[str, Any]:
    """The row of 32 actions [B, 32, a] for each state."""
    q = jax.vmap(lambda o, own: jax.vmap(lambda a: critic.value(o, a))(own))(obs, actions)
    share = (q - low[:, None]) / (high - low)[:, None]
    return {
        "one": share.mean(),
        "best": share.max(1).mean(),
        "entropy": jax.vmap(gaussian_entropy)(actions).mean(),
        "saturated": jnp.mean(jnp.abs(actions) > 0.95),
    }


def main(
    folder: tyro.conf.Positional[Path],
    /,
    agents: tuple[str, ...] = ("rfm", "rfm-paper"),
    updates: tuple[int, ...] = (1000, 2000, 4000),
    seed: int = 0,
) -> None:
    """Print and write the rows."""
    run, env, learner = replayed(folder)
    k_obs, k_scale, k_init, k_learn, k_look = jr.split(jr.key(seed), 6)[1:]
    critic, buffer = learner.agent.critic, learner.buffer
    obs = jax.jit(lambda key: buffer.sample(key, 64, 1, 0.99))(k_obs).obs
    low, high = scale(critic, obs, k_scale)
    out = Path(__file__).parent / "results" / "follow.csv"
    uniform = jr.uniform(jr.clone(k_look), (obs.shape[0], 32, env.spec.action_dim), minval=-1.0, maxval=1.0)
    rows = []

    def tell(name: str, updates: int, seen: dict[str, jax.Array]) -> None:
        numbers = {k: float(f"{float(v):.3g}") for k, v in ({"temperature": jnp.nan} | seen).items()}
        rows.append(
            {"env": run.env, "critic": folder.parts[-3], "agent": name, "seed": seed, "updates": updates} | numbers
        )
        print(rows[-1], flush=True)

    tell("uniform actions", 0, worth(critic, obs, uniform, low, high))
    tell("random corners", 0, worth(critic, obs, jnp.sign(uniform), low, high))
    for name in agents:
        agent, state = beside(name, run.agent, critic, env.spec, k_init, width=64)
        done = 0
        for count in sorted(updates):
            while done < count:
                state = study(run, agent, state, buffer, jr.fold_in(k_learn, done))
                done += CHUNK
            tell(name, done, look(agent, state, obs, low, high, jr.clone(k_look)))
    append(out, rows)


if __name__ == "__main__":
    tyro.cli(main)
