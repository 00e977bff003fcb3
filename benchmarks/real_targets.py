"""Bias and variance of estimators on the critic of a trained flow policy, where nothing is a toy (E1 of docs/study.md).

    python benchmarks/real_targets.py RUN [RUN ...]      # adds to benchmarks/results/real_targets.csv

For states that the policy visits, x_t lies on the path of an endpoint of the policy, and each repeat draws the endpoint
that the chain starts from out of 512 of the policy by its weight given x_t. The reference is the mean of 16 Gibbs
chains of 200 sweeps with 32 candidates, which start at endpoints of the policy. How far it is from the mean of 16 that
start at uniform actions (half the squared distance) is the row "reference". Numbers as in `yardstick.py`, means over
states: bias^2 and variance per dimension of the velocity.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from tables import append

from contraflow import load
from contraflow.envs import make
from contraflow.flow.posterior.control import Fixed, MinVariance
from contraflow.flow.posterior.gibbs import Gibbs
from contraflow.flow.posterior.importance import Reverse
from contraflow.flow.posterior.markov import Markov
from contraflow.flow.posterior.proposal import Mixture, Noise, UniformAction
from contraflow.flow.targets import log_normal
from contraflow.runtime.policy import Policy

TIMES = (0.05, 0.2, 0.5, 0.8, 0.95)
REFERENCE = Gibbs(32, sweeps=200)
CHAINS = 16
POOL = 512
ESTIMATORS = {
    "official 100": Reverse(100, Noise(), MinVariance()),
    "noise 32": Reverse(32, Noise(), Fixed(0)),
    "gradient 32": Reverse(32, Noise(), Fixed(1)),
    "mixture 32": Reverse(32, Mixture(), Fixed(0)),
    "Markov, 4 steps": Markov(16),
    "Markov, 2 steps": Markov(16, sizes=(1.0, 1.0)),
    "Gibbs, 5": Gibbs(5),
    "Gibbs, 8": Gibbs(8),
}


def visited(policy: Policy, states: int, num_envs: int = 4, steps: int = 250) -> jax.Array:
    """Observations of exploring episodes, evenly spread."""
    env = make(policy.env, num_envs, 5)
    state, obs = env.reset(jr.key(0))
    seen = []
    for _ in range(steps):
        state, step = env.step(state, policy(obs, explore=True))
        obs = step.obs
        seen.append(np.asarray(obs))
    return jnp.asarray(np.concatenate(seen))[:: num_envs * steps // states]


@partial(jax.jit, static_argnames=("agent",))
def points(agent, state, obs, t):
    """At each state the endpoints, x_t, the reference, and the error that it seems to have."""

    def one(obs, key):
        """At one state."""
        k_pool, k_noise, k_uniform, *k_reference = jr.split(key, 5)
        log_pi = agent.log_pi(state.critic, obs, agent.lam(state))
        ends = jax.vmap(lambda k: agent.endpoints(state, obs[None], k)[0, 0])(jr.split(k_pool, POOL))
        x_t = agent.path.perturb(jr.normal(k_noise, ends[0].shape), ends[0], t)
        starts = ends[:CHAINS], UniformAction().sample(k_uniform, agent.path, x_t, t, CHAINS, None)
        a, b = (REFERENCE(k, agent.path, log_pi, x_t, t, s).mean for k, s in zip(k_reference, starts, strict=True))
        return ends, x_t, a, jnp.mean((a - b) ** 2) / 2 / agent.path.beta(t) ** 2

    return jax.lax.map(lambda args: one(*args), (obs, jr.split(jr.key(7), obs.shape[0])))


@partial(jax.jit, static_argnames=("agent", "estimator", "repeats"))
def measure(agent, estimator, state, obs, t, given, repeats: int):
    """(bias^2, variance), means over the states `obs` and what `points` found there."""

    def one(obs, ends, x_t, reference, key):
        """(bias^2, variance) at one state, per dimension."""
        k_pick, k_repeat = jr.split(key)
        log_pi = agent.log_pi(state.critic, obs, agent.lam(state))
        log_w = jax.vmap(lambda u: log_normal(x_t, agent.path.alpha(t) * u, agent.path.beta(t)))(ends)
        support = ends[jr.categorical(k_pick, log_w, shape=(repeats,))][:, None]
        keys = jr.split(k_repeat, repeats)
        means = jax.vmap(lambda k, u: estimator(k, agent.path, log_pi, x_t, t, u).mean)(keys, support)
        scale = agent.path.beta(t) ** 2 * x_t.shape[0]
        variance = means.var(0, ddof=1).sum() / scale
        return jnp.sum((means.mean(0) - reference) ** 2) / scale - variance / repeats, variance

    bias2, variance = jax.lax.map(lambda args: one(*args), (obs, *given[:3], jr.split(jr.key(8), obs.shape[0])))
    return bias2.mean(), variance.mean()


def main(runs: tyro.conf.Positional[tuple[Path, ...]], /, states: int = 16, repeats: int = 96) -> None:
    """Print and write the table."""
    out = Path(__file__).parent / "results" / "real_targets.csv"
    rows = []
    for run in runs:
        policy = load(run)
        obs = visited(policy, states)
        given = {t: points(policy.agent, policy.state, obs, jnp.asarray(t)) for t in TIMES}
        for name, estimator in ({"reference": None} | ESTIMATORS).items():
            for t in TIMES:
                if estimator is None:
                    b, v = given[t][3].mean(), jnp.nan
                else:
                    b, v = measure(policy.agent, estimator, policy.state, obs, jnp.asarray(t), given[t], repeats)
                entry = {"env": policy.env, "agent": run.parts[-3], "seed": run.parts[-1].removeprefix("seed")}
                entry |= {"d": policy.spec.action_dim, "estimator": name, "t": t}
                rows.append(entry | {"bias2": float(f"{b:.3g}"), "variance": float(f"{v:.3g}")})
            cells = "  ".join(f"{r['bias2']:7.3f}/{r['variance']:<7.3g}" for r in rows[-len(TIMES) :])
            print(f"{policy.env:30} {name:16} {cells}", flush=True)
    append(out, rows)


if __name__ == "__main__":
    tyro.cli(main)
