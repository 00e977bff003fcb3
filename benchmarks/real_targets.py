"""Bias and variance of estimators on the critic of a trained flow policy, where nothing is a toy (E1 of docs/study.md).

    python benchmarks/real_targets.py RUN [RUN ...]      # adds to benchmarks/results/real_targets.csv

For states that the policy visits, x_t lies on the path of an endpoint of the policy, and each repeat draws the endpoint
that the chain starts from out of 512 of the policy by its weight given x_t. The reference is the weighted mean of
30 000 candidates, half noise and half uniform actions: good in one and two dimensions, refused in more. Numbers as in
`yardstick.py`, means over states: bias^2 and variance per dimension of the velocity.
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
from contraflow.flow.density import log_normal
from contraflow.flow.posterior import Fixed, Markov, MinVariance, Reverse
from contraflow.flow.proposal import Mixture, Noise, UniformAction
from contraflow.runtime.policy import Policy

TIMES = (0.05, 0.2, 0.5, 0.8, 0.95)
REFERENCE = Reverse(30_000, Mixture((Noise(), UniformAction()), (0.5, 0.5)), Fixed(0))
POOL = 512
FINE = (1.0, 0.3, 0.1, 0.03)
ESTIMATORS = {
    "official 100": Reverse(100, Noise(), MinVariance()),
    "noise 32": Reverse(32, Noise(), Fixed(0)),
    "gradient 32": Reverse(32, Noise(), Fixed(1)),
    "mixture 32": Reverse(32, Mixture(), Fixed(0)),
    "Markov()": Markov(),
    "Markov, finer steps": Markov(sizes=FINE),
    "Markov, finer steps, control .1": Markov(sizes=FINE, control=0.1),
    "Markov, no steps, 32": Markov(32, sizes=()),
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


@partial(jax.jit, static_argnames=("agent", "estimator", "repeats"))
def measure(agent, estimator, state, obs, t, repeats: int):
    """(bias^2, variance), means over the states `obs`."""
    lam, d = agent.lam(state), state.actor.dim

    def one(obs, key):
        """(bias^2, variance) at one state, per dimension."""
        k_pool, k_noise, k_pick, k_reference, k_repeat = jr.split(key, 5)
        log_pi = agent.log_pi(state.critic, obs, lam)
        pool = jax.vmap(lambda k: agent.endpoints(state, obs[None], k)[0, 0])(jr.split(k_pool, POOL))
        x_t = agent.path.perturb(jr.normal(k_noise, (d,)), pool[0], t)
        log_w = jax.vmap(lambda u: log_normal(x_t, agent.path.alpha(t) * u, agent.path.beta(t)))(pool)
        support = pool[jr.categorical(k_pick, log_w, shape=(repeats,))][:, None]
        keys = jr.split(k_repeat, repeats)
        means = jax.vmap(lambda k, u: estimator(k, agent.path, log_pi, x_t, t, u).mean)(keys, support)
        scale = agent.path.beta(t) ** 2 * d
        variance = means.var(0, ddof=1).sum() / scale
        reference = REFERENCE(k_reference, agent.path, log_pi, x_t, t).mean
        return jnp.sum((means.mean(0) - reference) ** 2) / scale - variance / repeats, variance

    bias2, variance = jax.lax.map(lambda args: one(*args), (obs, jr.split(jr.key(7), obs.shape[0])))
    return bias2.mean(), variance.mean()


def main(runs: tyro.conf.Positional[tuple[Path, ...]], /, states: int = 50, repeats: int = 96) -> None:
    """Print and write the table."""
    out = Path(__file__).parent / "results" / "real_targets.csv"
    rows = []
    for run in runs:
        policy = load(run)
        if policy.spec.action_dim > 2:
            raise SystemExit(f"{run}: {policy.spec.action_dim} action dimensions have no exact reference; at most 2")
        obs = visited(policy, states)
        for name, estimator in ESTIMATORS.items():
            for t in TIMES:
                b, v = measure(policy.agent, estimator, policy.state, obs, jnp.asarray(t), repeats)
                entry = {"env": policy.env, "agent": run.parts[-3], "d": policy.spec.action_dim, "estimator": name}
                rows.append(entry | {"t": t, "bias2": float(f"{b:.3g}"), "variance": float(f"{v:.3g}")})
            cells = "  ".join(f"{r['bias2']:7.3f}/{r['variance']:<7.3g}" for r in rows[-len(TIMES) :])
            print(f"{policy.env:30} {name:32} {cells}", flush=True)
    append(out, rows)


if __name__ == "__main__":
    tyro.cli(main)
