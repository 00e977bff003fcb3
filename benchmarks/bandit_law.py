"""Does the flow learn the law it is meant to? One-step bandits whose Boltzmann policy is known in closed form.

    python benchmarks/bandit_law.py              # writes benchmarks/results/bandit_law.csv and prints the table

Q = 0 and Q / lambda = 2 sum_j a_j in d = 1, 2, 6, 20 dimensions. The agent's own `update` trains the actor; its critic
is set by hand to the known Q and does not move, and the actor is averaged over the last half of the updates, so that
only the estimator and the solver are on trial. Compared with the exact law is that of one particle, tanh(u) at the end
of the flow: mean, standard deviation and P(|a| > .95), averaged over dimensions, for the agent's own solver and for 10
and 100 steps of it.
"""

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from tables import write

from contraflow.agents.online.rfm import RFM, RFMState
from contraflow.core.types import EnvSpec, Transition
from contraflow.flow.posterior.control import Fixed
from contraflow.flow.posterior.importance import Reverse
from contraflow.flow.posterior.markov import Markov
from contraflow.flow.posterior.proposal import Mixture, Noise, UniformAction
from contraflow.flow.solver import Euler, Midpoint, Solver
from contraflow.nets.critic import QEnsemble
from contraflow.policy.select import First
from contraflow.presets import FAMILY, RFM_PAPER
from contraflow.rl.temperature import Constant

SLOPES = (0.0, 2.0)
EDGE = 0.95
TOLERANCE = 0.03


def agents() -> dict[str, RFM]:
    """The agents compared; they differ in estimator and solver only, but for the temperature input of `rfm-paper` and
    the average velocity of `mfpo`."""
    rfm = RFM()
    return {
        "rfm": rfm,
        "Markov": replace(rfm, estimator=Markov(sizes=(1.0, 1.0)), query=First(8), solver=Midpoint(3)),
        "rfm-paper": replace(RFM_PAPER, query=First()),
        "noise 100": replace(rfm, estimator=Reverse(100, Noise(), Fixed(0.0))),
        "gradient 100": replace(rfm, estimator=Reverse(100, Noise(), Fixed(1.0))),
        "uniform 100": replace(rfm, estimator=Reverse(100, UniformAction(), Fixed(0.0))),
        "mfpo": replace(FAMILY["mfpo"], density=None, temperature=Constant(0.02), critic=rfm.critic),
        "mixture 32": replace(rfm, estimator=Reverse(32, Mixture(), Fixed(0.0))),
    }


def exact_law(slope: float) -> np.ndarray:
    """Mean, standard deviation and P(|a| > .95) of one coordinate of exp(slope a) on [-1, 1]."""
    if slope == 0:
        return np.array([0.0, 3**-0.5, 1 - EDGE])
    mean = 1 / np.tanh(slope) - 1 / slope
    second = 1 - 2 * mean / slope
    middle = np.sinh(slope * EDGE) / np.sinh(slope)
    return np.array([mean, np.sqrt(second - mean**2), 1 - middle])


def known_critic(dim: int, slope: jax.Array, key: jax.Array) -> QEnsemble:
    """One hidden unit that never sleeps: relu(slope sum_j a_j + |slope| d) - |slope| d, on the cube slope sum a."""
    critic = QEnsemble(1, 1, dim, 1, 1, key=key)
    shift = jnp.abs(slope) * dim
    parts = lambda q: (*q.members.first.weights, q.members.first.bias, q.members.last.weight, q.members.last.bias)
    values = [jnp.full_like(x, v) for x, v in zip(parts(critic), (slope, 0.0, shift, 1.0, -shift), strict=True)]
    return eqx.tree_at(parts, critic, values)


def prepare(agent: RFM, width: int = 64) -> RFM:
    """The agent with one particle and temperature, and a critic that stays where it is put."""
    frozen = replace(agent.critic, members=1, width=1, depth=1, lr=1e-30)
    one = {"backup": First(), "greedy": First()}
    return replace(agent, width=width, critic=frozen, temperature=Constant(0.02), **one)


def start(agent: RFM, dim: int, slope: jax.Array, key: jax.Array) -> RFMState:
    state = agent.init(key, EnvSpec(1, dim, 1, 1, True))
    critic = known_critic(dim, slope * agent.lam(state), jr.clone(key))
    return eqx.tree_at(lambda s: (s.critic, s.target), state, (critic, jax.tree.map(jnp.copy, critic)))


@partial(jax.jit, static_argnums=(0, 1, 3, 4))
def learn(agent: RFM, dim: int, key: jax.Array, updates: int, batch_size: int) -> RFMState:
    """One actor for each of the two Q's, after `updates` updates."""
    zeros = jnp.zeros((batch_size, 1))
    ended = jnp.ones(batch_size, bool)
    batch = Transition(
        zeros, jnp.zeros((batch_size, dim)), zeros[:, 0], zeros, ended, ~ended, jnp.ones(batch_size, int)
    )

    def one(slope, key):
        """The last state for one Q, with the averaged actor."""
        k_start, k_learn = jr.split(key)

        def step(carry, inputs):
            state, average = carry
            key, weight = inputs
            state, _ = agent.update(state, batch, key)
            average = jax.tree.map(lambda new, old: old + weight * (new - old), state.actor, average)
            return (state, average), None

        state = start(agent, dim, slope, k_start)
        # The mean of the last half: the noise of the last few batches would blur the comparison of estimators.
        weights = 1.0 / jnp.maximum(1.0, jnp.arange(updates) - updates // 2)
        (state, average), _ = jax.lax.scan(step, (state, state.actor), (jr.split(k_learn, updates), weights))
        return eqx.tree_at(lambda s: s.actor, state, average)

    return jax.vmap(one)(jnp.asarray(SLOPES), jr.split(key, len(SLOPES)))


@partial(jax.jit, static_argnums=(0, 3))
def action_law(agent: RFM, states: RFMState, key: jax.Array, samples: int) -> jax.Array:
    """[slope, 3]: mean, standard deviation, P(|a| > .95) of the policy's actions, averaged over dimensions."""

    def one(state, key):
        a = jax.vmap(lambda k: agent.act(state, jnp.zeros(1), k, False))(jr.split(key, samples))
        return jnp.stack([a.mean(), a.std(0).mean(), jnp.mean(jnp.abs(a) > EDGE)])

    return jax.vmap(one)(states, jr.split(key, len(SLOPES)))


def solvers(agent: RFM) -> dict[str, Solver]:
    own: Any = type(agent.solver)
    return {"own": agent.solver, "10": own(steps=10), "100": own(steps=100), "euler 10": Euler(10)}


@dataclass(frozen=True)
class Row:
    d: int
    agent: str
    q: str
    solver: str
    nfe: int
    mean: float
    std: float
    edge: float
    mean_exact: float
    std_exact: float
    edge_exact: float

    def __str__(self) -> str:
        verdict = "" if self.error < TOLERANCE else f"off by {self.error:.3f}"
        return (
            f"d={self.d:<2} {self.agent:13} Q={self.q:8} {self.solver:8} ({self.nfe:3} calls)"
            f"  mean {self.mean:+.3f} ({self.mean_exact:.3f})  std {self.std:.3f} ({self.std_exact:.3f})"
            f"  P(|a|>.95) {self.edge:.3f} ({self.edge_exact:.3f})  {verdict}"
        )

    @property
    def error(self) -> float:
        """The largest of the three deviations."""
        return max(abs(self.mean - self.mean_exact), abs(self.std - self.std_exact), abs(self.edge - self.edge_exact))


def compare(name: str, agent: RFM, dim: int, updates: int, batch_size: int, samples: int, seed: int) -> list[Row]:
    """Train one agent in one dimension and measure its law under each solver."""
    agent = prepare(agent)
    states = learn(agent, dim, jr.key(seed), updates, batch_size)
    rows = []
    for label, solver in solvers(agent).items():
        law = np.asarray(action_law(replace(agent, solver=solver), states, jr.key(seed + 1), samples), float)
        for slope, got in zip(SLOPES, law, strict=True):
            q = "0" if slope == 0 else "2 sum a"
            numbers = [round(float(x), 4) for x in (*got, *exact_law(slope))]
            rows.append(Row(dim, name, q, label, solver.nfe, *numbers))
    return rows


def main(
    out: Path = Path(__file__).parent / "results",
    dims: tuple[int, ...] = (1, 2, 6, 20),
    names: tuple[str, ...] = (),
    updates: int = 4000,
    batch_size: int = 256,
    samples: int = 4000,
    seed: int = 0,
) -> None:
    """Train every agent (or those named) in every dimension; print and write the table."""
    rows: list[Row] = []
    for dim in dims:
        for name, agent in agents().items():
            if names and name not in names:
                continue
            begin = time.perf_counter()
            new = compare(name, agent, dim, updates, batch_size, samples, seed)
            for r in new:
                print(r, flush=True)
            print(f"      {time.perf_counter() - begin:.0f} s", flush=True)
            rows += new
            write(out / "bandit_law.csv", [vars(r) | {"error": round(r.error, 4)} for r in rows])


if __name__ == "__main__":
    tyro.cli(main)
